"""How much memory and time it takes to turn text into token ids.

    python benchmarks/data_memory.py            # 1 GB in one file; some minutes on one core
    python benchmarks/data_memory.py --megabytes 100

Writes that much text (the standard library, over and over) into one file of a temporary folder and tokenizes it with
a byte-level BPE of 4,096 tokens in a process of its own. Peak memory is that process's largest resident set
(`getrusage`), with Python, torch and transformers in it. The claim: at most 1.5 GB for 1 GB of text.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT = 1.5e9  # bytes


def write_text(file: Path, size: int) -> None:
    """`size` bytes, cut at a document's end, of the standard library repeated; each round says its number."""
    from smelt.data.stdlib import Stdlib

    done, turn = 0, 0
    with open(file, "wb") as out:
        while done < size:
            for document in Stdlib().documents("train"):
                done += out.write(f"# {document.name}, round {turn}\n{document.text}\n".encode("utf-8", "replace"))
                if done >= size:
                    break
            turn += 1


def child(pattern: str, tokenizer_folder: str, out: str) -> dict[str, Any]:
    """Tokenize the train split in this process; its own peak memory."""
    from transformers import AutoTokenizer

    from smelt.data._tokens import tokenize
    from smelt.data.files import Files

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer("warm up")
    before, began = _peak(), time.monotonic()
    tokens = tokenize(Files(path=pattern), "train", tokenizer, Path(out))
    seconds = time.monotonic() - began
    return {"peak": _peak(), "before": before, "seconds": seconds, "bytes": tokens.bytes, "tokens": len(tokens)}


def _peak() -> int:
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def measure(megabytes: float, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """The figures of one run over `megabytes` (10^6 bytes) of text, in a new process."""
    folder.mkdir(parents=True)
    write_text(folder / "text.txt", int(megabytes * 1e6))
    tokenizer.save_pretrained(folder / "tokenizer")
    command = [sys.executable, __file__, "--child", str(folder / "text.txt"), str(folder / "tokenizer"), str(folder / "ids")]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000.0)
    parser.add_argument("--child", nargs=3, metavar=("GLOB", "TOKENIZER", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return 0
    from smelt.data.stdlib import Stdlib
    from smelt.model.mistral import byte_level_bpe

    tokenizer = byte_level_bpe((d.text for d in Stdlib().documents("train")), 4096, 2048)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.megabytes, tokenizer, Path(folder) / "run")
    print(f"text       {arguments.megabytes:.0f} MB in one file, {found['bytes'] / 1e6:.0f} MB of it in the train split")
    print(f"tokens     {found['tokens'] / 1e6:.1f} million, {found['bytes'] / found['tokens']:.2f} bytes each")
    print(f"peak       {found['peak'] / 1e6:.0f} MB resident, {found['before'] / 1e6:.0f} MB of it before the first byte of text")
    print(f"speed      {found['bytes'] / 1e6 / found['seconds']:.2f} MB/s, {found['seconds']:.0f} s, {os.cpu_count()} cores")
    print(f"claim      at most {LIMIT / 1e6:.0f} MB: {'holds' if found['peak'] <= LIMIT else 'does NOT hold'}")
    return 0 if found["peak"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
