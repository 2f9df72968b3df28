"""ActQKV: a window of a long prompt asks for old blocks with one query that stands for its unusual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from smelt.cache import KVCache
from smelt.cache._blocks import picked
from smelt.cache._layers import Attending, Grown, Run, capacity
from smelt.model._rotary import Rotary
from smelt.model._walk import parts
from smelt.spec import Paper, SmeltError

__all__ = ["ActQKV"]

FLAT = 1e-10  # variance of a channel, as a share of the mean square of all, that counts as none (rounding of float32)


@dataclass(frozen=True)
class ActQKV(KVCache):
    """p = sum_j phi_j q_j / sum_j phi_j, phi_j = sum_c (q_jc - mean_c)^2 / var_c over a window; read the blocks of greatest p . mean(K_B).

    A prompt is read in windows of `window` tokens, cut at multiples of it, whether it comes in one call or in several. A window
    attends the newest `local` tokens before it (up to `block` - 1 more, where a block is cut), itself, block 0, and the `budget` - 1
    blocks before those of greatest pi = softmax(p . mean(K_B) / sqrt d), averaged over the query heads of a kv head, each kv head its
    own. Queries go into phi without rotary angles; the probe has the angle of the window's middle; keys keep
    theirs, so retrieved blocks stand where they stood. Equal queries have phi = 0 and equal weights.

    A single token is its own probe, and the number of its blocks follows density rho = exp(entropy(pi)) / blocks: with R blocks
    left for this layer and the later ones, it takes R rho / (rho + later * mean of rho so far), rounded, at least `least`, and the last
    takes R, so the layers of a step share layers * budget exactly (less where one has no more blocks; the next gets it).
    Within its share a head stops where its pi adds up to `coverage`.

    Bytes: the full cache and mean keys, n / `block` d per kv head. Reads per query: (budget * block + local + window) d, not n d;
    per window or step 2 n / block d FLOPs per query head. A step at n = 8,192 took 0.95 to 1.3 of a full one here: no time saved.
    attend: [b, hq, t, d] -> [b, t, hq, d]. `crop` is exact. Raises SmeltError: `least` above `budget`; padded rows
    (runtime); models whose queries cannot be turned back.

    Reconstruction: no code was found; the sum over channels, the probe as a weighted mean, mean keys, the density and its sharing
    are our definitions. Differs from the paper: a layer knows the densities of the layers before it only, so the first always
    has `budget`; blocks are not offloaded. The choice for a token depends on all of its window, later tokens too (never beyond it), and
    a loss measured in windows may profit from that.
    """

    paper: ClassVar = Paper(
        "Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference", "arXiv:2502.13542", "section 3"
    )
    padded: ClassVar[bool] = False
    attends: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True
    budget: Annotated[int, Ge(1)] = 48  # blocks, the first among them
    block: Annotated[int, Ge(1)] = 32  # tokens
    local: Annotated[int, Ge(1)] = 512  # tokens
    window: Annotated[int, Ge(1)] = 512  # tokens that share a probe
    least: Annotated[int, Ge(1)] = 4  # blocks of a layer in decoding
    coverage: Annotated[float, Interval(gt=0, le=1)] = 0.95

    def __post_init__(self) -> None:
        if self.least > self.budget:
            raise SmeltError(f"actqkv: least={self.least} blocks of a layer is more than the budget={self.budget} of all on average")

    @classmethod
    def unlimited(cls) -> Self:
        return cls(budget=1 << 40)

    @classmethod
    def example(cls) -> Self:
        return cls(budget=3, block=4, local=6, window=16, least=2)

    def layer(self, config: Any, index: int) -> ActQKVLayer:
        return ActQKVLayer(self, Rotary(config))

    def bytes_held(self, config: Any, prompt: int, written: int = 0, itemsize: int = 4, batch: int = 1) -> int:
        n, sizes = prompt + written, parts(config)
        rows = batch * sizes.kv_heads * (2 * capacity(n) + capacity(n // self.block))
        return sizes.layers * (rows * sizes.head_dim * itemsize + Rotary(config).frequency.untyped_storage().nbytes())


class ActQKVLayer(Attending):
    """All rows, the mean keys of full blocks, and the other layers of the cache, with which a step's budget is shared."""

    is_croppable = True

    def __init__(self, method: ActQKV, rotary: Rotary) -> None:
        super().__init__()
        self.method, self.rotary = method, rotary
        self.means = Grown()  # [b, h, n / block, d]
        self.peers: list[Any] = [self]  # all layers in order, once they are one cache
        self.spent: tuple[int, Tensor, Tensor] | None = None  # of the step under way: tokens seen, density [b], blocks [b]

    def attend(self, query: Tensor, mask: Tensor | None, run: Run) -> Tensor:
        size, n = self.method.block, self.seen
        start = n - query.shape[2]
        if n // size > (done := len(self.means)):
            full = self.key_rows.rows[:, :, done * size : n // size * size]
            self.means.append(full.unflatten(2, (-1, size)).float().mean(3).to(full.dtype))
        outputs, low = [], start
        while low < n:
            last = n - 1 if self._past(n - 1) <= self.method.budget else low  # nothing to leave out: no need for windows
            high = min(n, (last // self.method.window + 1) * self.method.window)
            outputs.append(self._window(query[:, :, low - start : high - start], low, mask, start, run))
            low = high
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]

    def _past(self, position: int) -> int:
        """Blocks before the local tokens of a window that starts here."""
        return max(0, position - self.method.local) // self.method.block

    def _window(self, query: Tensor, low: int, mask: Tensor | None, start: int, run: Run) -> Tensor:
        """Queries of positions low .. high - 1 of a call that began at `start` -> [b, t, hq, d]."""
        high = low + query.shape[2]
        past = self._past(low)
        near = past * self.method.block if past > self.method.budget else 0
        key, value = self.key_rows.rows[:, :, near:high], self.value_rows.rows[:, :, near:high]
        seen = None
        if mask is not None:
            seen = mask[:, :, low - start : high - start, near:high]
        elif low and high - low > 1:
            at = torch.arange(near, high, device=query.device)
            seen = (at <= torch.arange(low, high, device=query.device)[:, None])[None, None]
        if not near:
            return run(query, key, value, seen)
        index, open_ = self.retrieve(query, low, past, start == self.seen - 1)
        far = [picked(grown, index, self.method.block) for grown in (self.key_rows, self.value_rows)]
        if seen is not None or not bool(open_.all()):
            shown = open_.repeat_interleave(self.method.block, 2).repeat_interleave(query.shape[1] // index.shape[1], 1)[:, :, None]
            seen = shown.new_ones(1, 1, 1, high - near) if seen is None else seen
            seen = torch.cat([part.expand(*query.shape[:3], -1) for part in (shown, seen)], 3)
        return run(query, torch.cat([far[0], key], 2), torch.cat([far[1], value], 2), seen)

    def retrieve(self, query: Tensor, low: int, past: int, step: bool) -> tuple[Tensor, Tensor]:
        """(blocks [b, h, m] of the first `past`, block 0 first and then by pi; which are read [b, h, m]). `step`: one token alone."""
        at = torch.arange(low, low + query.shape[2], device=query.device)
        middle = low + (at[-1:] - low) / 2
        asked = self.rotary.turn(probe(self.rotary.turn(query, at, back=True)).float(), middle)
        mean = self.means.rows[:, :, :past].float()
        score = asked.view(*mean.shape[:2], -1, mean.shape[3]) @ mean.mT * mean.shape[3] ** -0.5
        pi = score.softmax(-1).mean(2)  # [b, h, past]
        count = self._share(density(pi).mean(1), past) if step else torch.full_like(pi[:, 0, 0], self.method.budget).long()
        rank = torch.cat([torch.full_like(pi[..., :1], 2), pi[..., 1:]], -1)  # block 0 before all
        index = rank.topk(int(count.max()), -1).indices
        open_ = torch.arange(index.shape[2], device=pi.device) < count[:, None, None]
        if step and self.method.coverage < 1:
            taken = pi.gather(2, index)
            open_ = open_ & (taken.cumsum(-1) - taken < self.method.coverage)
        most = int(open_.sum(-1).max())
        return index[..., :most], open_.expand(index.shape)[..., :most]

    def _share(self, rho: Tensor, past: int) -> Tensor:
        """Blocks of this layer in this step [b], from its density and what the layers before it took."""
        place, least = next(i for i, layer in enumerate(self.peers) if layer is self), self.method.least
        before = [layer.spent for layer in self.peers[:place]]
        if any(spent is None or spent[0] != self.seen for spent in before):
            raise SmeltError("actqkv: the layers of one cache take turns in their order; this one was called out of turn")
        later = len(self.peers) - 1 - place
        mean = torch.stack([*(one for _, one, _ in before), rho]).mean(0)
        left = torch.full_like(rho, len(self.peers) * self.method.budget).long() - sum(taken for _, _, taken in before)
        count = (left * rho / (rho + later * mean)).round().long()
        count = torch.minimum(count.clamp(min=least), left - later * least).clamp(max=past)
        self.spent = (self.seen, rho, count)
        if not later:
            for layer in self.peers:
                layer.spent = None
        return count

    def crop(self, tokens_to_remove: int) -> None:
        left = self.seen - abs(tokens_to_remove)
        if left < 0:
            raise SmeltError(f"actqkv: {-tokens_to_remove} tokens cannot be taken back, {self.seen} were seen")
        if self.is_initialized:
            for grown, rows in ((self.key_rows, left), (self.value_rows, left), (self.means, left // self.method.block)):
                grown.slice(0, min(rows, len(grown)))
            self.seen = left
            self.show()


def probe(query: Tensor) -> Tensor:
    """Queries of a window without angles [b, hq, m, d] -> their mean [b, hq, 1, d], weighted by how far each is from it."""
    q = query.double()
    away = (q - q.mean(2, keepdim=True)) ** 2
    variance = away.mean(2, keepdim=True)
    still = variance <= FLAT * q.square().mean((2, 3), keepdim=True)
    phi = torch.where(still, 0, away / torch.where(still, 1, variance)).sum(3, keepdim=True)
    phi = torch.where(phi.sum(2, keepdim=True) > 0, phi, 1.0)
    return ((phi / phi.sum(2, keepdim=True)) * q).sum(2, keepdim=True).to(query.dtype)


def density(pi: Tensor) -> Tensor:
    """exp(entropy) / n of distributions [..., n]: 1 where all are equal, 1 / n for one alone."""
    return torch.special.entr(pi).sum(-1).exp() / pi.shape[-1]
