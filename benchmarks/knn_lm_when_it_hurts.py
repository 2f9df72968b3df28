"""When nearest neighbours help a language model and when they hurt it.

    python benchmarks/knn_lm_when_it_hurts.py                    # embedded model, 100,000 keys; minutes on one core
    python benchmarks/knn_lm_when_it_hurts.py --keys 10000 --tokens 4096 --weight 0.25

Every held-out token is predicted once by the plain model and once by the mixture of decode/knn_lm. The tokens are then put into
buckets: how often the token stands in the store, how far the nearest neighbour is (quartiles), how much of p_kNN is on one
token (do the neighbours agree), and whether that token is what the model itself would have said. For each bucket: its share of the
tokens, nats per token plain and mixed, their difference (below 0: the neighbours help) and the share of tokens that lose.
No token can lose more than ln(1 / (1 - weight)) nats. Neighbours are searched once, so several weights cost little.
"""

from __future__ import annotations

import argparse
import itertools
import math

import torch
from torch import Tensor

from smelt.decode._datastore import Datastore, keys_seen
from smelt.decode.knn_lm import KNNLM
from smelt.evaluate import Variant
from smelt.evaluate._text import encoded, room
from smelt.model._load import load

Row = tuple[str, str, Tensor]  # kind of bucket, its name, which tokens


def measured(variant: Variant, store: Datastore, method: KNNLM, tokens: int) -> dict[str, Tensor]:
    """Of each held-out token: ln p plain, p_kNN, the nearest distance, agreement, whether both say the same, and its id."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("plain", "neighbours", "nearest", "agreement", "same", "token")}
    longest = room(variant.model, 1536)
    with torch.no_grad(), keys_seen(variant.model) as seen:
        for document in encoded(variant, tokens, longest):
            ids = torch.tensor([document.ids[:longest]], device=variant.model.device)
            plain = variant.model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            distances, said = store.nearest(seen[0][0, :-1], method.k)
            law, following = method.law(distances, said, plain.shape[1]), ids[0, 1:]
            parts["plain"].append(plain.gather(1, following[:, None])[:, 0])
            parts["neighbours"].append(law.gather(1, following[:, None])[:, 0])
            parts["nearest"].append(distances[:, 0])
            parts["agreement"].append(law.max(1).values)
            parts["same"].append(law.argmax(1) == plain.argmax(1))
            parts["token"].append(following)
    return {name: torch.cat(found).cpu() for name, found in parts.items()}


def buckets(found: dict[str, Tensor], counts: Tensor) -> list[Row]:
    often, near, agreement, same = counts[found["token"]], found["nearest"], found["agreement"], found["same"]
    rows: list[Row] = [("all", "", torch.ones_like(same))]
    for name, low, high in (("never", 0, 1), ("1 to 9", 1, 10), ("10 to 99", 10, 100), ("100 to 999", 100, 1000), ("more", 1000, 1 << 60)):
        rows.append(("token in the store", name, (often >= low) & (often < high)))
    edges = [-math.inf, *torch.quantile(near.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist(), math.inf]
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        rows.append(("nearest distance", f"quartile {place + 1}, up to {high:.4g}", (near > low) & (near <= high)))
    for low, high in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 0.95), (0.95, 2.0)):
        rows.append(("neighbours agree", f"{low:.2f} to {min(high, 1.0):.2f}", (agreement >= low) & (agreement < high)))
    sure = agreement >= 0.5
    rows += [
        ("agreeing (>= 0.50)", "on the model's own token", sure & same),
        ("agreeing (>= 0.50)", "on another token", sure & ~same),
        ("not agreeing", "", ~sure),
    ]
    return rows


def table(found: dict[str, Tensor], rows: list[Row], weight: float) -> str:
    plain = found["plain"].double()
    mixed = torch.logaddexp(plain + math.log1p(-weight), found["neighbours"].double().log() + math.log(weight))
    lines = [f"weight {weight:g}: no token loses more than {-math.log1p(-weight):.4f} nats", ""]
    lines += ["| bucket | | share | plain | mixed | difference | of all | tokens that lose |", "|---|---|---|---|---|---|---|---|"]
    for kind, name, inside in rows:
        if not inside.any():
            continue
        share, a, b = float(inside.double().mean()), -plain[inside], -mixed[inside]
        change = float((b - a).mean())
        figures = f"{share:.1%} | {a.mean():.3f} | {b.mean():.3f} | {change:+.4f} | {share * change:+.4f} | {(b > a).double().mean():.0%}"
        lines.append(f"| {kind} | {name} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=16_384, help="of held-out text")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--weight", type=float, nargs="+", default=[0.05, 0.1, 0.25])
    parser.add_argument("--store", default="", help="a folder that keeps the datastore")
    given = parser.parse_args()
    loaded = load(given.model)
    method = KNNLM(data=given.data, tokens=given.keys, k=given.k, store=given.store)
    store = method.built(loaded.model, loaded.tokenizer)
    print(f"{len(store):,} keys, {store.bytes / 1e6:.1f} MB", flush=True)
    found = measured(Variant("plain", loaded.model, loaded.tokenizer), store, method, given.tokens)
    counts = torch.bincount(store.values.long().cpu(), minlength=loaded.model.config.get_text_config().vocab_size)
    print(f"{len(found['token']):,} held-out tokens\n", flush=True)
    for weight in given.weight:
        print(table(found, buckets(found, counts), weight) + "\n")


if __name__ == "__main__":
    main()
