"""Eigen Attention: keys and values in the subspace that calibration text spans."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from smelt.cache._calibrated import Calibrated
from smelt.cache._narrow import Narrow, Narrowing, NarrowLayer, narrow_bytes
from smelt.cache._tap import still, taps
from smelt.model._rotary import Rotary
from smelt.model._walk import blocks, parts, stack
from smelt.spec import Paper

__all__ = ["Eigen"]

BLOCK = 1024  # keys turned at a time: what they need stays in the processor's caches
STEP = 0.02  # of the threshold, when a layer's ranks are searched


@dataclass(frozen=True)
class Eigen(Calibrated, Narrowing):
    """k ~ R_p U_k (U_k^T k_0), softmax(q k^T) v ~ (softmax(q k^T) (v U_v)) U_v^T; k_0 = R_p^T k, R_p the rotation to place p.

    U_k and U_v [h, d, r] are the first r eigenvectors of sum x x^T over the calibration text, x the keys (before
    rotation) or values of one key/value head; U^T U = 1. What is held is [b, h, n, r_k] and [b, h, n, r_v].
    Ranks are multiples of `multiple` (or d), the same for all heads of a layer. With `error` None every layer gets rank d,
    rounded up. With `error` the threshold e of a layer falls from 1 by 0.02: a head's rank is the smallest whose
    singular values sum to e of their total, the layer takes the largest of its heads, none below rank d; the last ranks
    are taken with |layer(x) - layer_low(x)| <= error |layer(x)| on the first batch, x the uncompressed stream.

    Bytes: b h n (r_k + r_v) itemsize a layer, at most 1/8 more for room to grow, and its tables 4 h d (r_k + r_v) once.
    FLOPs of a step: keys are rebuilt (2 n r_k d for each key/value head) and turned, scores stay 2 n d for each query head;
    values are never rebuilt, 2 n r_v for each query head instead of 2 n d. It saves bytes, and no time on the key side.

    Tokens of the call that starts an empty cache see each other in full, as the model computes them; a later token sees
    itself and its call in full and everything before narrow. `crop` is exact. Raises SmeltError for models whose rotary
    angles cannot be taken back, before it was measured (`weights`), and (runtime) for padded rows, whose positions are not
    those of the cache.

    Differs from the paper: projections are not merged into the weights but applied where keys and values enter the cache,
    so the checkpoint stays plain; a key basis for each head, where its Llama code has one for a layer; the last good
    threshold is taken, not the one before it; models without rotary angles are not covered.
    """

    paper: ClassVar = Paper("Eigen Attention: Attention in Low-Rank Space for KV Cache Compression", "arXiv:2408.05646", "section 4")
    rank: Annotated[float, Gt(0), Le(1)] = 0.6  # share of the head size; with `error`, the least of it
    error: Annotated[float, Gt(0)] | None = None  # relative, of a layer's output
    multiple: Annotated[int, Ge(1)] = 8  # channels
    weights: str | None = None

    @classmethod
    def unlimited(cls) -> Self:
        return cls(rank=1.0)

    @classmethod
    def example(cls) -> Self:
        return cls(rank=0.5)

    def fits(self, config: Any) -> None:
        Rotary(config)
        parts(config)

    def narrow(self, config: Any, index: int) -> Subspace:
        state = self.state(config, index)
        return Subspace(state["keys"], state["values"], Rotary(config))

    def split(self, tokens: int) -> tuple[int, int]:
        return tokens, tokens

    def layer(self, config: Any, index: int) -> NarrowLayer:
        return NarrowLayer(self.narrow(config, index), self.split)

    def bytes_held(self, config: Any, prompt: int, written: int = 0, itemsize: int = 4, batch: int = 1) -> int:
        tokens = prompt + written
        return narrow_bytes(self, config, prompt, tokens, self.split(tokens), itemsize, batch)

    def measure(self, model: Any, batches: Iterable[Tensor]) -> dict[str, Tensor]:
        rotary, batches = Rotary(model.config.get_text_config(decoder=True)), list(batches)
        sums: dict[tuple[int, str], Any] = {}
        with still(model), torch.no_grad():
            for ids in batches:
                stack(model)(ids.to(model.device), past_key_values=(cache := taps(model)), use_cache=True)
                for index, tap in enumerate(cache.layers):
                    at = torch.arange(ids.shape[1], device=model.device)
                    for name, rows in (("keys", rotary.turn(tap.keys, at, back=True)), ("values", tap.values)):
                        flat = rows.transpose(0, 1).flatten(1, 2).double()  # [h, b t, d]
                        sums[index, name] = sums.get((index, name), 0) + flat.transpose(1, 2) @ flat
            found: dict[str, Tensor] = {}
            inputs = _inputs(model, batches[0]) if self.error is not None else []
            for index, block in enumerate(blocks(model)):
                spread, basis = zip(*(_sorted(sums[index, name]) for name in ("keys", "values")), strict=True)
                least = self._rounded(math.ceil(self.rank * spread[0].shape[1] - 1e-9), spread[0].shape[1])
                ranks = (least, least)
                if self.error is not None:
                    layer_error = _errors(model, block, inputs[index], rotary, basis)
                    ranks = self._searched(spread, least, layer_error)
                for name, every, rank in zip(("keys", "values"), basis, ranks, strict=True):
                    found[f"{index}.{name}"] = every[..., :rank].float()
        return found

    def _rounded(self, rank: int, width: int) -> int:
        return min(width, -(-rank // self.multiple) * self.multiple)

    def _searched(self, spread: Any, least: int, layer_error: Any) -> tuple[int, int]:
        """The ranks of keys and values at the last threshold with a small error."""
        width = spread[0].shape[1]
        best = (width, width)
        shares = [part.cumsum(-1) / part.sum(-1, keepdim=True) for part in spread]  # [h, d]
        for step in range(1, round(1 / STEP)):
            needed = [int((share < 1 - step * STEP).sum(-1).max()) + 1 for share in shares]
            ranks = max(least, self._rounded(needed[0], width)), max(least, self._rounded(needed[1], width))
            if ranks != best and layer_error(*ranks) > (self.error or 0):
                break
            best = ranks
        return best


class Subspace(Narrow):
    """Rows times the first eigenvectors of their head: `key_basis` and `value_basis` [h, d, r]."""

    def __init__(self, keys: Tensor, values: Tensor, rotary: Rotary) -> None:
        self.key_basis, self.value_basis, self.rotary = keys, values, rotary
        self.key_width, self.value_width = keys.shape[2], values.shape[2]

    def to(self, device: torch.device) -> None:
        self.key_basis, self.value_basis = self.key_basis.to(device), self.value_basis.to(device)

    def table_bytes(self) -> int:
        return 4 * (self.key_basis.numel() + self.value_basis.numel() + len(self.rotary.frequency))

    def choose(self, asked: Tensor, key: Tensor) -> Tensor:
        raise NotImplementedError("a subspace is known beforehand")

    def keys(self, key: Tensor, start: int, chosen: Tensor | None) -> Tensor:
        at = torch.arange(start, start + key.shape[2], device=key.device)
        return (self.rotary.turn(key.float(), at, back=True) @ self.key_basis).to(key.dtype)

    def values(self, value: Tensor) -> Tensor:
        return (value.float() @ self.value_basis).to(value.dtype)

    def scores(self, query: Tensor, rows: Tensor, chosen: Tensor | None) -> Tensor:
        query, up, made = query.float(), self.key_basis.transpose(1, 2), []
        for start in range(0, rows.shape[2], BLOCK):
            part = rows[:, :, start : start + BLOCK].float() @ up
            at = torch.arange(start, start + part.shape[2], device=rows.device)
            made.append(query @ self.rotary.turn(part, at).transpose(2, 3))
        return torch.cat(made, -1) if len(made) > 1 else made[0]

    def mixed(self, weights: Tensor, rows: Tensor) -> Tensor:
        return (weights @ rows).float() @ self.value_basis.transpose(1, 2)


def _sorted(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [h, d] and eigenvectors [h, d, d], the largest first."""
    values, vectors = torch.linalg.eigh(sums)
    return values.clamp(min=0).sqrt().flip(-1), vectors.flip(-1)


def _inputs(model: Any, ids: Tensor) -> list[tuple]:
    """What each block is called with on these ids."""
    seen: list[tuple] = []
    hooks = [block.register_forward_pre_hook(lambda _, args, kw: seen.append((args, kw)), with_kwargs=True) for block in blocks(model)]
    try:
        stack(model)(ids.to(model.device), past_key_values=taps(model), use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _errors(model: Any, block: nn.Module, given: tuple[tuple, dict[str, Any]], rotary: Rotary, basis: Any) -> Any:
    """(key rank, value rank) -> |layer(x) - layer_low(x)| / |layer(x)|."""

    def output(change: Any) -> Tensor:
        made = block(*given[0], **{**given[1], "past_key_values": taps(model, change)})
        return made[0] if isinstance(made, tuple) else made

    def low(key_rank: int, value_rank: int) -> float:
        up, out = basis[0][..., :key_rank].float(), basis[1][..., :value_rank].float()

        def change(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            at = torch.arange(key.shape[2], device=key.device)
            key = rotary.turn(rotary.turn(key, at, back=True) @ up @ up.transpose(1, 2), at)
            return key, value @ out @ out.transpose(1, 2)

        return float((output(lambda _: change) - exact).norm() / exact.norm())

    exact = output(None)
    return low
