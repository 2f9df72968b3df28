"""Put the result of recipes/embedded.yaml into the package, as bfloat16 safetensors.

smelt run recipes/embedded.yaml
python benchmarks/ship_embedded.py runs/embedded/model
"""

from __future__ import annotations

import sys

import torch

from smelt.model._load import EMBEDDED, load, save


def main() -> None:
    model, tokenizer, _ = load(sys.argv[1])
    save(model, tokenizer, EMBEDDED, dtype=torch.bfloat16)
    size = (EMBEDDED / "model.safetensors").stat().st_size
    if size > 16_000_000:
        raise SystemExit(f"{size:,} bytes are more than the 16 MB that may be shipped")
    print(f"{EMBEDDED}: {model.num_parameters():,} parameters, {size:,} bytes")


if __name__ == "__main__":
    main()
