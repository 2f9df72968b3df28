"""Bits per byte of the embedded model on held-out modules, beside xz and zstd with the training text as dictionary.

    python benchmarks/embedded_quality.py [MODEL] [--tokens N]

Every byte of the test split of `stdlib` is counted; the model never saw those modules, xz and zstd get the whole
training text in front. By position: bits per byte of the first 128 tokens of a window against tokens 1,024 to 2,048.
"""

from __future__ import annotations

import argparse
import lzma
import time

import zstandard

from smelt.data.stdlib import Stdlib


def compressors(train: bytes, test: bytes) -> dict[str, float]:
    """{name: bits per byte of `test`}. xz sees the training text by difference: |xz(train + test)| - |xz(train)|."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 64 << 20}]

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))

    def zstd(data: bytes, dictionary: zstandard.ZstdCompressionDict | None) -> int:
        parameters = zstandard.ZstdCompressionParameters.from_level(19, enable_ldm=True, window_log=27)
        kwargs = {"dict_data": dictionary} if dictionary else {}
        return len(zstandard.ZstdCompressor(compression_params=parameters, **kwargs).compress(data))

    raw = zstandard.ZstdCompressionDict(train, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    sizes = {
        "xz -9e": xz(test),
        "xz -9e, training text in front": xz(train + test) - xz(train),
        "zstd -19 --long": zstd(test, None),
        "zstd -19 --long, training text as dictionary": zstd(test, raw),
    }
    return {name: 8 * size / len(test) for name, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--tokens", type=int, default=1 << 30, help="budget of test tokens")
    given = parser.parse_args()
    corpus = Stdlib()
    text = {s: "".join(d.text for d in corpus.documents(s)).encode() for s in ("train", "test")}
    print(f"train {len(text['train']):,} bytes, test {len(text['test']):,} bytes, {corpus.digest()}")
    for name, bits in compressors(text["train"], text["test"]).items():
        print(f"{name:<48}{bits:8.4f} bits/byte", flush=True)
    from smelt.evaluate import Variant
    from smelt.evaluate.perplexity import Perplexity
    from smelt.model._load import load

    model, tokenizer, _ = load(given.model)
    began = time.monotonic()
    probe = Perplexity(context=2048, stride=1024, tokens=given.tokens, document=1 << 30, by_position=True)
    for metric in probe(Variant("model", model, tokenizer, data=corpus)):
        print(f"{given.model + ' ' + metric.name:<48}{metric.value:8.4f} {metric.unit}")
    print(f"measured in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
