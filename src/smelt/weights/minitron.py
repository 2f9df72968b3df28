"""Structured pruning: a smaller model of the same architecture, from importance measured forward only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from smelt.model._slice import everything, resized, sliced
from smelt.model._walk import Parts, blocks, parts
from smelt.spec import Paper, SmeltError
from smelt.weights._importance import Energy, Rows, influence, removal_loss
from smelt.weights._whole import Restructure

__all__ = ["Minitron"]

Size = Annotated[int, Ge(0)] | Annotated[float, Interval(gt=0, lt=1)]  # a number, or a share of the model's


@dataclass(frozen=True)
class Minitron(Restructure):
    """Keep the neurons with the largest rms(a_i) ||W_down[:, i]||, and heads, channels and layers by the like.

    neuron i    rms over tokens of what enters down_proj, times the norm of the column it is multiplied with
    head h      rms over tokens of ||W_o[:, h] Attn_h(x)||, the length of what the head writes; inside each kv group
    kv group    the root sum of squares of its heads
    channel j   sum over all norms of rms(Norm(x)_j)
    layer l     depth="loss": nats per token without it; "influence": 1 - E cos(its input, its output)

    0 keeps a size; layers, hidden and ffn may be shares, as in `layers=0.5`.
    Shapes stay uniform, head_dim stays, tied embeddings are cut once; neurons and heads are chosen per
    layer, channels for the whole model. After channels were cut every norm's gain is multiplied by sqrt(hidden / kept):
    RMSNorm divides by the root mean square of fewer channels, and this is exact when the others carried nothing.
    (Measured on three small trained models: better at every width than no correction, by up to 0.56 nats, and than
    rms(kept) / rms(all) of the calibration tokens.) Cost: one forward pass over the rows for the widths, one per layer
    for depth="loss" (one in all for "influence"). Memory: the old and the new model. Padding never counts.

    Raises SmeltError for sizes above the model's, heads that kv_heads does not divide, and unknown architectures.
    Differs from the paper: root mean squares throughout, as SwiGLU products are signed and their means cancel; the
    lengths of what is written instead of activations; the norms' gains are corrected; pruned heads are not merged
    into kept ones; one given shape instead of a search over shapes.
    """

    paper: ClassVar = Paper("Compact Language Models via Pruning and Knowledge Distillation", "arXiv:2407.14679", "section 2")
    gentlest: ClassVar[Mapping[str, Any]] = {}
    layers: Size = 0
    hidden: Size = 0
    ffn: Size = 0
    heads: Annotated[int, Ge(0)] = 0  # query heads of all groups; 0 keeps their number per kv group
    kv_heads: Annotated[int, Ge(0)] = 0
    depth: Literal["loss", "influence"] = "loss"  # how layers are ranked
    contiguous: bool = False  # drop neighbouring layers only

    def target(self, config: Any) -> Any:
        sizes = self._sizes(parts(config))
        return resized(config, list(range(sizes.layers)), sizes.hidden, sizes.heads, sizes.kv_heads, sizes.ffn)

    def __call__(self, model: Any, rows: Iterable[Mapping[str, Tensor]]) -> Any:
        old, batches = parts(model.config), list(rows)
        new, keep = self._sizes(old), everything(model)
        if new == old:
            return model
        if not batches:
            raise SmeltError("minitron measures importance first; it needs calibration rows")
        was_training = model.training
        model.eval()
        with torch.no_grad():
            if new.layers < old.layers:
                keep.layers = self._layers(model, batches, new.layers)
            if new._replace(layers=old.layers) != old:
                seen = Energy(model, batches)
                if new.hidden < old.hidden:
                    keep.channels = best(seen.channels(), new.hidden)
                for at in keep.layers:
                    keep.neurons[at] = best(seen.neurons(at), new.ffn)
                    keep.groups[at], keep.queries[at] = grouped(seen.heads(at).view(old.kv_heads, -1), new.kv_heads, new.heads)
            made = sliced(model, keep)
        model.train(was_training)
        return made.train(was_training)

    def _sizes(self, old: Parts) -> Parts:
        """The sizes asked for. Raises SmeltError when the model cannot have them."""
        kv_heads = self.kv_heads or old.kv_heads
        layers, hidden, ffn = (
            _size(wanted, has) for wanted, has in zip((self.layers, self.hidden, self.ffn), (old.layers, old.hidden, old.ffn))
        )
        heads = self.heads or kv_heads * (old.heads // old.kv_heads)
        new = old._replace(layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_heads=kv_heads)
        for name in ("layers", "hidden", "ffn", "kv_heads"):
            if getattr(new, name) > getattr(old, name):
                raise SmeltError(f"minitron: {name}={getattr(new, name)} is more than the model's {getattr(old, name)}")
        most = kv_heads * (old.heads // old.kv_heads)
        if heads % kv_heads or heads > most:
            right = min(most, max(1, round(heads / kv_heads)) * kv_heads)
            raise SmeltError(f"minitron: heads={heads} must be a multiple of {kv_heads} kv heads and at most {most}, such as heads={right}")
        return new

    def _layers(self, model: Any, batches: Rows, count: int) -> list[int]:
        total = len(blocks(model))
        drop = total - count
        size = drop if self.contiguous else 1
        windows = [list(range(at, at + size)) for at in range(total - size + 1)]
        score = removal_loss if self.depth == "loss" else influence
        harm = torch.tensor(score(model, batches, windows))
        order = harm.argsort(stable=True).tolist()
        gone = set(windows[order[0]]) if self.contiguous else set(order[:drop])
        return [at for at in range(total) if at not in gone]


def _size(wanted: int | float, has: int) -> int:
    """A share is rounded to the nearest whole number, above 64 to the nearest multiple of 8 (vectors of the processor)."""
    if isinstance(wanted, int):
        return wanted or has
    step = 8 if has > 64 else 1
    return max(step, round(wanted * has / step) * step)


def best(score: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest, in rising order; of equals the first."""
    return score.argsort(descending=True, stable=True)[:count].sort().values.cpu()


def grouped(score: Tensor, kv_heads: int, heads: int) -> tuple[Tensor, Tensor]:
    """(kept kv groups, kept query heads) from the energy of each head, score [groups, heads per group]."""
    groups = best(score.sum(1), kv_heads)
    inside = [at * score.shape[1] + best(score[at], heads // kv_heads) for at in groups.tolist()]
    return groups, torch.cat(inside)
