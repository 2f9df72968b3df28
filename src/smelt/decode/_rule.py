"""The exact rules by which drafted tokens are kept, as functions of probabilities (arXiv:2211.17192; trees: arXiv:2305.09781).

p the target's law after all processors, q the law a drafted token was drawn from after its own. Whatever the draft,
the kept tokens followed by the one that every rule adds have exactly the law p, token by token:

    certain of itself   draw y ~ p; keep the drafted x iff y = x, else put y in its place and stop
    drawn from q        keep x with probability min(1, p(x) / q(x)), else draw from norm(max(p - q, 0)) and stop
    k drawn from q      the same for one after the other, p <- norm(max(p - q, 0)) after each that is refused
    greedy              keep x while it is arg max p, and add arg max p

Using an arg-max draft with its soft q in the second rule is wrong; the tests plant that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["drawn", "keep_chain", "keep_tree"]


def drawn(law: Tensor) -> Tensor:
    """One token of each law [..., V], from the global generator."""
    return torch.multinomial(law.reshape(-1, law.shape[-1]), 1).view(law.shape[:-1])


def _rest(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(p - q, 0)); p itself where nothing is left, which only rounding brings about."""
    left = (p - q).clamp(min=0)
    total = left.sum()
    return left / total if total > 0 else p


def keep_chain(tokens: Tensor, scores: Tensor, law: Tensor | None, sample: bool) -> tuple[int, int]:
    """(how many of the drafted tokens [n] stay, the token after them). `scores` [n + 1, V] are processed logits, `law` [n, V]."""
    n = len(tokens)
    if not sample or law is None:
        chosen = drawn(scores.softmax(-1)) if sample else scores.argmax(-1)
        differs = (chosen[:n] != tokens).nonzero()
        kept = int(differs[0]) if len(differs) else n
        return kept, int(chosen[kept])
    p = scores.softmax(-1)
    at = torch.arange(n, device=p.device)
    refused = (torch.rand(n, device=p.device) * law[at, tokens] >= p[at, tokens]).nonzero()
    if not len(refused):
        return n, int(drawn(p[n]))
    kept = int(refused[0])
    return kept, int(drawn(_rest(p[kept], law[kept])))


def keep_tree(tokens: Tensor, parents: Sequence[int], scores: Tensor, law: Tensor | None, sample: bool) -> tuple[list[int], int]:
    """(the nodes that stay, root first; the token after them).

    `parents` gives each node's parent, -1 for the text's end, always before the node; `scores` [n + 1, V] has the text's
    end first. With `law` [n, V] siblings are independent draws from one law; without it they differ from each other.
    """
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    said = tokens.tolist()
    path: list[int] = []
    at = -1
    chosen = None if sample else scores.argmax(-1).tolist()
    while True:
        below = children.get(at, [])
        if not sample or law is None:
            token = chosen[at + 1] if chosen is not None else int(drawn(scores[at + 1].softmax(-1)))
            follow = next((node for node in below if said[node] == token), None)
        else:
            p, follow = scores[at + 1].softmax(-1), None
            for node in below:
                if float(torch.rand((), device=p.device)) * float(law[node, said[node]]) < float(p[said[node]]):
                    follow = node
                    break
                p = _rest(p, law[node])
            token = -1 if follow is not None else int(drawn(p))
        if follow is None:
            return path, token
        path.append(follow)
        at = follow
