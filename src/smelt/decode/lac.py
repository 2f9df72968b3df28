"""Layers in which a token's state hardly grows, found by its norm: their output left out, or the layers not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from smelt.decode import Steered
from smelt.decode._given import corpus_of, rows_of
from smelt.decode._skip import Policy, Used, inputs, skipping
from smelt.model._walk import blocks
from smelt.spec import Paper

__all__ = ["LAC"]


@dataclass(frozen=True)
class LAC(Steered):
    """void_l iff D_l < alpha (max_{k<l} D_k - min_{k<l} D_k), D_l = |h_l| - |h_{l-1}|: of a token, in its layer l, by the L2 norm.

    h_l [b, t, d] is the output of layer l = 0..L-1, h_{-1} its input; the first two layers have no spread before them and
    are void only where the norm falls. `threshold` replaces the right side in every layer; a large negative one: no voids.

    mode="report", as the authors do it: all layers run on the ordinary stream, and the head reads the output of each
    token's last layer that is not void (h_{-1} where all are). Nothing is saved; it says what the voids are worth.

    mode="skip" is another method, ours. D_l is not known before layer l has run, so what is compared is g_l |h_{l-1}|, g_l =
    sum D_l / sum |h_{l-1}| over `tokens` tokens of `data` (None: the standard library), measured when bound on the plain model
    without position 0. A void layer does not run for that token: it hands its input on and writes keys and values of it, so
    caches stay whole. The spread is over layers that ran. Position 0 runs every layer, as others attend to it most. Saved
    for each void in a call where all tokens skip the layer: the layer less its first norm and the maps of keys and values.
    In generation at batch 1 that is every void; in a prompt nothing, since position 0 runs (later pieces of a prompt
    read in pieces can save).

    `attach` yields `Used`: shares of tokens whose layer is not void, by layer, for prompt and response, without position 0.
    Cost: 2 d FLOPs per token and layer, and in "skip" one pass over `tokens`.

    Where it loses: a model of 6 layers lost .003, .20, .65 and .72 nats at alpha 0, .2, .5 and .8 in "report" (mean active shares .96,
    .50, .35, .33). The embedded model (8 layers, 2,500 tokens) needed 1.00, 1.26 and 2.30 times the bits at 0, .2 and .8 (shares
    1.00, .74, .37); "skip" 1.48 and 2.45 at .2 and .8 (.71, .25). In small models every layer matters: no gain shows.

    Raises SmeltError for models whose keys and values cannot be written apart; in "skip" without tokenizer or text.

    Differs from the paper: mode="skip", `threshold`, and statistics without position 0, whose norm dwarfs all others.
    """

    paper: ClassVar = Paper("Void in Language Models", "arXiv:2505.14467", "L2 adaptive computation")
    alpha: Annotated[float, Ge(0)] = 0.8
    mode: Literal["report", "skip"] = "report"
    threshold: float | None = None
    data: Any = None  # a corpus, or text as after `data:` in a recipe; "skip" alone reads it
    tokens: Annotated[int, Ge(2)] = 4096

    def __post_init__(self) -> None:
        corpus_of(self.data, "lac")

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        return {}

    @contextmanager
    def attach(self, model: Any, tokenizer: Any) -> Iterator[Used]:
        layers = len(blocks(model))
        policy: _Report | _Skip
        if self.mode == "report":
            policy = _Report(_Bar(self), layers)
        else:
            policy = _Skip(_Bar(self), growth(model, rows_of(self.data, model, tokenizer, self.tokens, "lac")))
        with skipping(model, policy):
            yield policy.used

    @classmethod
    def example(cls, draft: Path) -> LAC:
        return cls(threshold=1e9)


@torch.no_grad()
def growth(model: Any, rows: Iterator[Tensor]) -> Tensor:
    """g [layers], float64: sum of |h_l| - |h_{l-1}| over the sum of |h_{l-1}|, without the first token of each row."""
    sizes = torch.zeros(2, len(blocks(model)), dtype=torch.float64)
    for ids in rows:
        with inputs(model) as seen:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for states, sums in zip(zip(*((state, out) for state, _, out in seen), strict=True), sizes, strict=True):
            sums += torch.tensor([float(size(state)[:, 1:].double().sum()) for state in states])
    return sizes[1] / sizes[0] - 1


def size(state: Tensor) -> Tensor:
    """The norm of each state, float32 [b, t]."""
    return state.detach().float().norm(dim=-1)


class _Bar:
    """What D has to reach, from the D of the layers before."""

    def __init__(self, method: LAC):
        self.alpha, self.threshold = method.alpha, method.threshold

    def begin(self, norm: Tensor) -> None:
        self.low, self.high = torch.full_like(norm, torch.inf), torch.full_like(norm, -torch.inf)

    def __call__(self) -> Tensor:
        if self.threshold is not None:
            return torch.full_like(self.low, self.threshold)
        return self.alpha * (self.high - self.low).clamp_min(0)  # no layer yet: -inf, so 0

    def add(self, grown: Tensor, ran: Tensor | None = None) -> None:
        low, high = torch.minimum(self.low, grown), torch.maximum(self.high, grown)
        self.low, self.high = (low, high) if ran is None else (torch.where(ran, low, self.low), torch.where(ran, high, self.high))


class _Report(Policy):
    """`carry`: the output of the last layer that was not void."""

    def __init__(self, bar: _Bar, layers: int):
        self.bar, self.layers, self.used = bar, layers, Used(layers)

    def runs(self, layer: int, state: Tensor, places: Tensor | None) -> None:
        if layer == 0:
            self.carry, self.norm = state, size(state)
            self.bar.begin(self.norm)

    def left(self, layer: int, state: Tensor, out: Tensor, places: Tensor | None) -> Tensor:
        norm = size(out)
        grown, self.norm = norm - self.norm, norm
        active = grown >= self.bar()
        self.bar.add(grown)
        self.carry = torch.where(active[..., None], out, self.carry)
        self.used.count(layer, active, places)
        return self.carry if layer == self.layers - 1 else out


class _Skip(Policy):
    def __init__(self, bar: _Bar, growth: Tensor):
        self.bar, self.growth, self.used = bar, growth.tolist(), Used(len(growth))

    def runs(self, layer: int, state: Tensor, places: Tensor | None) -> Tensor:
        if layer == 0:
            self.norm = size(state)
            self.bar.begin(self.norm)
        self.ran = self.growth[layer] * self.norm >= self.bar()
        if places is not None:
            self.ran = self.ran | (places == 0)
        return self.ran

    def left(self, layer: int, state: Tensor, out: Tensor, places: Tensor | None) -> Tensor:
        norm = size(out)
        self.bar.add(norm - self.norm, self.ran)
        self.norm = norm
        self.used.count(layer, self.ran, places)
        return out
