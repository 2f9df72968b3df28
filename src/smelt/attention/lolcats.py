"""LoLCATs: softmax in a sliding window, learned linear attention for all that has left it, in the place of softmax attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.nn.functional import pad

from smelt.attention._heads import adopt, attended, heads, refuse, shape
from smelt.attention._mixer import MixerModule, State, Transferring
from smelt.model._walk import parts
from smelt.spec import Paper

__all__ = ["Lolcats"]

CHUNK = 64  # queries worked on together; like SPAN it changes speed and memory, never what comes out
SPAN = 1024  # tokens of a pass: what is held between its steps stays in the processor's cache however long the row
WORTH = 1000.0  # of the squared error, so that its gradient is not lost beside AdamW's epsilon


class LolcatsMixer(MixerModule):
    """h query heads in g groups of key and value heads. State: the window's keys and values [b, g, <= w, d] with `real`
    [b, <= w], and `far` [b, g, h/g, 2f, d + 1] float32, the sums of phi(k) v^T and, in the last column, of phi(k)."""

    owner: ClassVar[str] = "attention.lolcats"
    o_proj: nn.Linear
    head_dim: int
    scaling: float

    def __init__(self, was: Any, window: int, features: int, gamma: float = 0.1):
        super().__init__(was)
        adopt(self, was)
        self.window, self.features = window, features
        count, groups, d, _ = shape(was)
        like = was.o_proj.weight
        self.query_map = nn.Parameter(like.new_empty(groups, count // groups, d, features))
        self.key_map = nn.Parameter(like.new_empty(groups, count // groups, d, features))
        self.factor = nn.Parameter(like.new_full((groups, count // groups), math.log(gamma / (1 - gamma))))

    def settings(self) -> dict[str, Any]:
        return {"window": self.window, "features": self.features}

    @classmethod
    def build(cls, was: Any, *, window: int, features: int) -> Self:
        refuse(was, "lolcats")
        return cls(was, window, features)

    def mix(self, hidden: Tensor, angles: tuple[Tensor, Tensor], state: State | None, real: Tensor | None) -> Tensor:
        held = state.held if state is not None else {}
        pieces = []
        for start in range(0, hidden.shape[1], SPAN):
            cut = slice(start, start + SPAN)
            query, key, value = heads(self, hidden[:, cut], (angles[0][:, cut], angles[1][:, cut]))
            out, held = self.hybrid(query, key, value, held, None if real is None else real[:, cut])
            pieces.append(self.o_proj(out.to(hidden.dtype).transpose(1, 2).flatten(2)))
        if state is not None:
            state.held = {name: part.clone(memory_format=torch.contiguous_format) for name, part in held.items()}
        return torch.cat(pieces, 1)

    def hybrid(
        self, query: Tensor, key: Tensor, value: Tensor, held: dict[str, Tensor], real: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """query [b, h, t, d], key and value [b, g, t, d] of the new tokens -> (out [b, h, t, d] float32, the new state).

        Keys are laid out as `width` of the window, then t new ones. A chunk of `size` queries meets the `size + width` keys that some
        of them has in its window; the first `size` of those leave the window within the chunk, and all before are in `far`.
        """
        b, groups, t, d = key.shape
        shared = query.shape[1] // groups
        real = key.new_ones((b, t), dtype=torch.bool) if real is None else real
        if held:
            key, value, real = torch.cat([held["key"], key], 2), torch.cat([held["value"], value], 2), torch.cat([held["real"], real], 1)
        seen = key.shape[2]
        width, size = min(self.window, seen), min(CHUNK, t)
        front, more = width + t - seen, -t % size
        now = {"key": key[:, :, -width:], "value": value[:, :, -width:], "real": real[:, -width:]}
        query = pad(query.float(), (0, 0, 0, more)).unflatten(1, (groups, shared))
        key, value = pad(key.float(), (0, 0, front, more)), pad(value.float(), (0, 0, front, more))
        real = pad(real, (front, more))

        # softmax over the window
        rows = query.unflatten(3, (-1, size)).transpose(2, 3).flatten(3, 4)  # [b, g, chunks, h/g size, d]
        score = (rows @ key.unfold(2, size + width, size) * self.scaling).unflatten(3, (shared, size))
        row = torch.arange(size, device=key.device)[:, None]
        column = torch.arange(size + width, device=key.device)
        visible = (column > row) & (column <= row + width) & real.unfold(1, size + width, size)[:, None, :, None, None]
        score = score.masked_fill(~visible, -torch.inf)
        top = score.amax(-1, keepdim=True)
        gamma = self.factor.float().sigmoid()[:, None, :, None, None]
        weight = gamma * (score - top.masked_fill(top == -torch.inf, 0)).exp()
        out = (weight.flatten(3, 4) @ value.unfold(2, size + width, size).mT).unflatten(3, (shared, size)).transpose(2, 3)
        total = weight.sum(-1, keepdim=True).transpose(2, 3)  # [b, g, h/g, chunks, size, 1]

        # linear attention over what has left it
        far = held["far"] if held else key.new_zeros(b, groups, shared, 2 * self.features, d + 1)
        if seen > self.window:
            reach = t + more
            leaves = real[:, :reach] & (torch.arange(reach, device=key.device) < t)  # the rest of the last chunk is not there yet
            asked = mapped(query, self.query_map).unflatten(3, (-1, size))
            kept = mapped(key[:, :, None, :reach], self.key_map) * leaves[:, None, None, :, None]
            kept = kept.unflatten(3, (-1, size))
            given = pad(value[:, :, None, :reach], (0, 1), value=1.0).unflatten(3, (-1, size))
            change = kept.mT @ given
            before = torch.cat([far[:, :, :, None], change[:, :, :, :-1]], 3).cumsum(3)
            added = (asked @ kept.mT).tril() @ given + asked @ before
            out, total = out + added[..., :d], total + added[..., d:]
            far = before[:, :, :, -1] + change[:, :, :, -1]
        out = out / total.clamp(min=torch.finfo(total.dtype).tiny)  # nothing but padding before it: zero
        return out.flatten(3, 4)[:, :, :, :t].flatten(1, 2), now | {"far": far}


def mapped(x: Tensor, weight: Tensor) -> Tensor:
    """phi: x [b, g, h/g or 1, t, d], weight [g, h/g, d, f] -> [b, g, h/g, t, 2f]."""
    made = x @ weight.float()
    return torch.cat([made.softmax(-1), (-made).softmax(-1)], -1).clamp(min=1e-12)


@dataclass(frozen=True)
class Lolcats(Transferring):
    """y_i = (g sum_near e^(s_ij - m_i) v_j + sum_far phi(q_i)^T phi(k_j) v_j) / (g sum_near e^(s_ij - m_i) + sum_far phi(q_i)^T phi(k_j)).

    near: i - w < j <= i; far: j <= i - w. s_ij = q_i.k_j scaling and m_i its largest over near; phi(x) = [softmax(x W), softmax(-x W)],
    2f features, W [d, f] of each head for its queries and another for its keys; g = sigmoid(factor) of each head. q, k (rotated),
    v and o_proj are the model's own. For w at least the length it is softmax attention, whatever g is.

    With a `train:` block the maps and factors alone learn, layer by layer: 1000 times the mean squared difference of what
    softmax and this give before o_proj. Rows longer than `window` are needed; the paper has AdamW at lr 1e-2 and no weight decay.
    The second stage is a `distill` stage with `adapter: lora(rank=8)`; an adapter on all maps leaves the W and factors as they are.

    Cost per token and layer, at any length: h (4 d (w + c) + 2 c (2 f + d) + 12 f d) FLOPs beside the projections, c = 64 the chunk
    (1 in decode). The parallel form goes over 1,024 tokens at a time, with about h (3 w + 4 c + 4 f + 4 f d / c) floats for each.
    State: 2 g_kv w d numbers, w flags, and h 2f (d + 1) float32 sums, for any length above w; a token that leaves the window
    enters the sums once. Learned: 2 h d f + h numbers a layer.

    Scores, features and sums are float32. A row's padding is left out of both parts. Raises SmeltError for attention it cannot keep:
    fused otherwise than qkv_proj, sliding windows, capped scores.
    Differs from the paper: the window keeps keys and values of the key heads, not repeated for the query heads. Only sliding windows,
    not the terraced ones: their blocks begin at positions of the row, so padding on the left would move them.
    """

    paper: ClassVar = Paper("LoLCATs: On Low-Rank Linearizing of Large Language Models", "arXiv:2410.10254", "sections 3.2 and 3.3")
    module: ClassVar = LolcatsMixer
    window: Annotated[int, Ge(1)] = 64
    features: Annotated[int, Ge(1)] = 64  # f; phi has twice as many
    gamma: Annotated[float, Interval(gt=0, lt=1)] = 0.1  # where every head's g starts
    layers: tuple[int, ...] | None = None  # None: all

    @classmethod
    def example(cls) -> Self:
        return cls(window=16, features=8)

    def mixer(self, was: nn.Module, config: Any) -> LolcatsMixer:
        refuse(was, "lolcats")
        made = LolcatsMixer(was, self.window, self.features, self.gamma)
        bound = math.sqrt(6 / (made.head_dim * self.features))  # the authors' code: Kaiming's, with d f inputs
        for weight in (made.query_map, made.key_map):
            nn.init.uniform_(weight, -bound, bound)
        return made

    def state_bytes(self, config: Any, tokens: int, batch: int = 1, itemsize: int = 4) -> int:
        sizes, near = parts(config), min(tokens, self.window)
        far = sizes.heads * 2 * self.features * (sizes.head_dim + 1) * 4
        layers = sizes.layers if self.layers is None else len(self.layers)
        return layers * batch * (2 * sizes.kv_heads * near * sizes.head_dim * itemsize + near + far)

    def learned(self, module: Any) -> list[nn.Parameter]:
        return [module.query_map, module.key_map, module.factor]

    def lost(self, module: Any, was: Any, hidden: Tensor, angles: tuple[Tensor, Tensor], progress: float) -> Tensor:
        with torch.no_grad():
            query, key, value = heads(was, hidden, angles)
            wanted = attended(query, key, value, was.scaling).float()
        made, _ = module.hybrid(query, key, value, {}, None)
        return WORTH * (made - wanted).pow(2).mean((1, 3))
