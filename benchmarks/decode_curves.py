"""What the lossy decoding methods lose, against what they leave out: `python benchmarks/decode_curves.py [--small FOLDER]`, minutes.

On held-out text (the test split of `stdlib`, what the probe perplexity reads), a row for each setting:

    share         lac, early_exit: layers used, mean over tokens and layers, the token at position 0 left out. A layer
                  is used in lac's mode "report" where it is not void, though it runs; elsewhere where the token runs it
    bits/byte     of the text, every token after the true ones before it
    / plain       its ratio to the plain model, with the 95 % bootstrap interval over documents

    entropy_switch (with `--small`, a model with the tokenizer of the large one): share is that of tokens predicted by the large
    model. Each token counts as the model that would have written it predicts it, and the switch sees the entropies of
    the true text. "written" is the share in greedy continuations of `--prompts` beginnings by `--new` tokens: written text has
    lower entropy than given text, so it differs. Rows small and large are the two ends.

Ends with the table and a JSON file of all samples (`--json`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from smelt import registry
from smelt.decode._count import count
from smelt.decode.entropy_switch import EntropySwitch, Switch, entropy, switched
from smelt.evaluate import Metric, Variant
from smelt.evaluate._measure import ratio
from smelt.evaluate._text import encoded, room
from smelt.evaluate.perplexity import Perplexity
from smelt.model._load import load
from smelt.progress import track

STEERED = (
    *(f"lac(alpha={alpha})" for alpha in (0.0, 0.2, 0.5, 0.8)),
    *(f"lac(alpha={alpha}, mode='skip')" for alpha in (0.0, 0.1, 0.2, 0.5, 0.8)),
    *(f"early_exit(threshold={threshold})" for threshold in (1.0, 0.99, 0.95, 0.9, 0.7, 0.5)),
    *(f"early_exit(threshold={threshold}, by='cosine')" for threshold in (0.99, 0.97, 0.95, 0.9)),
)
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def steered(variant: Variant, text: str, probe: Perplexity) -> tuple[Metric, dict[str, Any]]:
    method = registry.parse(text, "decode")
    with method.attach(variant.model, variant.tokenizer) as used:
        bits = probe(variant)[0]
    layers = used.shares()
    return bits, {"share": float(layers.mean()), "layers": layers.tolist()}


@torch.no_grad()
def read(model: Any, rows: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(bits [t - 1] of each next token, entropy [t - 1] where it is predicted) of each row."""
    found = []
    for ids in rows:
        given = torch.tensor([ids], device=model.device)
        logits = model(input_ids=given[:, :-1], use_cache=False).logits[0].double()
        bits = -logits.log_softmax(-1).gather(1, given[0, 1:, None])[:, 0] / torch.log(torch.tensor(2.0))
        found.append((bits.cpu(), entropy(logits).cpu()))
    return found


def mixed(small: Any, large: Any, sizes: list[int], taus: tuple[float, float], method: EntropySwitch) -> tuple[Metric, float]:
    """(bits per byte, share of tokens of the large model) when the switch says whose prediction counts."""
    samples, mine, all_of = [], 0, 0
    for (bits0, entropy0), (bits1, entropy1) in zip(small, large, strict=True):
        switch, total = Switch(taus, method.window, method.least), 0.0
        for at in range(len(bits0)):
            mine += switch.large
            total += float((bits1 if switch.large else bits0)[at])
            switch.wrote(float((entropy1 if switch.large else entropy0)[at]))
        samples.append(total)
        all_of += len(bits0)
    metric = Metric("bits_per_byte", sum(samples) / sum(sizes), "bits per byte", "lower", tuple(samples), tuple(map(float, sizes)))
    return metric, mine / all_of


def switching(
    variant: Variant, small: Any, name: str, probe: Perplexity, asked: argparse.Namespace, advance: Any
) -> list[tuple[str, Metric, dict]]:
    large = variant.model
    documents = encoded(variant, probe.tokens, probe.document)
    rows = [document.ids[: room(large, len(document.ids))] for document in documents]
    sizes = [int(document.bytes[1 : len(row)].sum()) for document, row in zip(documents, rows, strict=True)]
    ends = read(small, rows), read(large, rows)
    prompts = [row[: asked.length] for row in rows if len(row) >= asked.length][: asked.prompts]
    found = []
    settings: list[tuple[str, tuple[float, float]]] = [("large", (-1.0, -1.0)), ("small", (float("inf"),) * 2)]
    for quantile in asked.quantiles:
        method = EntropySwitch(name, quantile=quantile, least=asked.least)
        settings.append((registry.text(method), method.measured(small, large, variant.tokenizer)))
    for text, taus in settings:
        method = EntropySwitch(name, least=1 if text == "large" else asked.least)
        metric, share = mixed(*ends, sizes, taus, method)
        loop = switched(small, lambda taus=taus, method=method: Switch(taus, method.window, method.least))
        calls = new = 0
        for prompt in prompts:
            ids = torch.tensor([prompt], device=large.device)
            with count(large) as seen:
                options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": asked.new, "do_sample": False, "pad_token_id": 1}
                made = large.generate(ids, custom_generate=loop, **options)
            calls, new = calls + seen.calls, new + made.shape[1] - len(prompt)
        found.append(
            (
                text,
                metric,
                {
                    "share": share,
                    "written": calls / new if new else None,
                    "thresholds": [tau if math.isfinite(tau) else None for tau in taus],
                },
            )
        )
        advance(1, text)
    return found


def table(lines: list[dict[str, Any]]) -> str:
    rows = [("method", "share", "written", "bits/byte", "/ plain")]
    for line in lines:
        middle, low, high = line["ratio"]
        written = "-" if line.get("written") is None else f"{line['written']:.3f}"
        rows.append(
            (line["name"], f"{line['share']:.3f}", written, f"{line['bits_per_byte']:.4f}", f"{middle:.3f} [{low:.3f}, {high:.3f}]")
        )
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide))) for row in rows)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="embedded", help="the large model")
    ask.add_argument("--small", help="a folder or a hub id; without it entropy_switch is left out")
    ask.add_argument("--methods", nargs="*", default=list(STEERED), help="methods that steer the model, as in a recipe")
    ask.add_argument("--quantiles", nargs="*", type=float, default=list(QUANTILES), help="of entropy_switch")
    ask.add_argument("--least", type=int, default=10, help="tokens between switches")
    ask.add_argument("--tokens", type=int, default=32_768, help="of held-out text")
    ask.add_argument("--prompts", type=int, default=20)
    ask.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    ask.add_argument("--new", type=int, default=64, help="tokens written after it")
    ask.add_argument("--json", type=Path, default=Path("decode_curves.json"))
    asked = ask.parse_args()

    loaded = load(asked.model, dtype=torch.float32)
    small = load(asked.small, dtype=torch.float32).model.eval() if asked.small else None
    variant = Variant("plain", loaded.model.eval(), loaded.tokenizer)
    probe = Perplexity(tokens=asked.tokens)
    with track("curves", 1 + len(asked.methods) + (len(asked.quantiles) + 2 if asked.small else 0), "settings") as shown:
        plain = probe(variant)[0]
        shown.advance(1, "plain")
        found: list[tuple[str, Metric, dict[str, Any]]] = [("plain", plain, {"share": 1.0})]
        for text in asked.methods:
            found.append((text, *steered(variant, text, probe)))
            shown.advance(1, text)
        if small is not None:
            found += switching(variant, small, asked.small, probe, asked, shown.advance)
    lines = [
        {"name": name, "bits_per_byte": bits.value, "ratio": ratio(bits, plain), **more, "bits": bits.samples, "bytes": bits.weights}
        for name, bits, more in found
    ]
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    asked_for = {name: str(value) if isinstance(value, Path) else value for name, value in vars(asked).items()}
    asked.json.write_text(json.dumps({"asked": asked_for, **machine, **versions, "results": lines}, indent=1, allow_nan=False))
    print(table(lines))
    print(f"{len(plain.samples)} documents; all samples in {asked.json}")


if __name__ == "__main__":
    main()
