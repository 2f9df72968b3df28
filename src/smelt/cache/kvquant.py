"""KVQuant: keys before rotation and values, as codes of a table fitted to what matters, with outliers kept exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Le
from torch import Tensor

from smelt.cache._calibrated import Calibrated
from smelt.cache._codes import pack, unpack
from smelt.cache._layers import Grown, Held, capacity
from smelt.cache._table import fitted, normed, quantiles, sampled
from smelt.cache._tap import slopes, still
from smelt.model._rotary import Rotary
from smelt.model._walk import parts
from smelt.spec import Paper, SmeltError

__all__ = ["Kvquant"]

LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Kvquant(Calibrated):
    """x ~ r C[i] + z, i the nearest of 2^bits centroids to (x - z) / r; C = argmin sum F (x' - C)^2, F = (d loss / d x)^2.

    Keys are taken back to where they were before rotation; z and r come for each channel from calibration: the middle and half the
    distance of the quantiles outliers / 2 and 1 - outliers / 2. Values have z and r for each token, the middle and half the
    range of its H d entries without the outliers. One table C for the keys of a layer and one for its values, by Lloyd's
    iterations weighted with the Fisher information F of the entries, outliers left out. At 2 bits Q-Norm moves the
    decoded centroids so that mean and deviation of the calibration entries are kept. Of each token's H d keys, and values,
    m = 2 ceil(outliers H d / 2) are kept exactly: of the keys those farthest outside their channel's range, of the values
    the largest and smallest halves. The `first` tokens are held in full.

    update: [b, H, t, d] -> [b, H, n, d] twice; new tokens are attended in full. Bytes of a layer and row, before at most
    1/8 for room to grow: (n - first)(2 H d bits / 8 + 2 m (itemsize + 2) + 4) + 2 first H d itemsize; three bits are stored
    as two and one, so they are three. Tables once: 8 H d + 8 2^bits + 8 (2^bits - 1) and the angles, 2 d.
    FLOPs: those of the full cache, and to look up and turn n d entries a step; it saves memory and no time here.

    The state depends only on the tokens seen; `crop` is exact. Raises SmeltError for models whose rotary angles cannot be taken
    back, a head size that is no multiple of 8, before it was measured (`weights`), and (runtime) for padded rows.

    Differs from the paper: keys too have a fixed number of exact entries a token (so bytes are a formula); what lies beyond
    that is clamped to the nearest centroid. Fitting uses at most 4,096 tokens of each layer. No fused kernel.
    """

    paper: ClassVar = Paper(
        "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization", "arXiv:2401.18079", "section 3"
    )
    padded: ClassVar[bool] = False
    bits: Literal[2, 3, 4] = 3
    outliers: Annotated[float, Ge(0), Le(1)] = 0.01  # share of the entries
    first: Annotated[int, Ge(0)] = 1  # tokens
    weights: str | None = None

    @classmethod
    def unlimited(cls) -> Self:
        return cls(outliers=1.0)

    @classmethod
    def example(cls) -> Self:
        return cls(bits=2, first=3)

    def fits(self, config: Any) -> None:
        Rotary(config)
        width = parts(config).head_dim
        if width % 8:
            raise SmeltError(f"kvquant: the head size {width} is not a multiple of 8, so the codes of a token do not fill bytes")

    def exact(self, entries: int) -> int:
        """How many of the entries of a token are kept exactly."""
        return min(entries, 2 * math.ceil(self.outliers * entries / 2 - 1e-9))

    def layer(self, config: Any, index: int) -> KvquantLayer:
        self.fits(config)
        return KvquantLayer(self, self.state(config, index), Rotary(config))

    def bytes_held(self, config: Any, prompt: int, written: int = 0, itemsize: int = 4, batch: int = 1) -> int:
        sizes, tokens = parts(config), prompt + written
        entries, full = sizes.kv_heads * sizes.head_dim, min(tokens, self.first)
        row = 2 * entries * self.bits // 8 + 2 * self.exact(entries) * (itemsize + 2) + 4
        tables = 2 * 4 * entries + 2 * 4 * (2 * 2**self.bits - 1) + 4 * len(Rotary(config).frequency)
        return sizes.layers * (batch * (capacity(tokens - full) * row + 2 * capacity(full) * entries * itemsize) + tables)

    def measure(self, model: Any, batches: Iterable[Tensor]) -> dict[str, Tensor]:
        batches = list(batches)
        config = model.config.get_text_config(decoder=True)
        self.fits(config)
        rotary = Rotary(config)
        kept: list[list[list[Tensor]]] = [[] for _ in range(config.num_hidden_layers)]
        with still(model):
            for ids in batches:
                at, pick = torch.arange(ids.shape[1]), sampled(ids.shape[0], ids.shape[1], self.first, len(batches))
                for rows, (key, value, key_slope, value_slope) in zip(kept, slopes(model, ids.to(model.device)), strict=True):
                    key, key_slope = (rotary.turn(part, at.to(part.device), back=True) for part in (key, key_slope))
                    four = (key, value, key_slope.square(), value_slope.square())
                    rows.append([part.transpose(1, 2).flatten(0, 1)[pick.to(part.device)].flatten(1).float() for part in four])
        tables: dict[str, Tensor] = {}
        for index, rows in enumerate(kept):
            key, value, key_force, value_force = (torch.cat(part) for part in zip(*rows, strict=True))  # [tokens, H d]
            low, high = quantiles(key, self.outliers)
            middle, half = (high + low) / 2, ((high - low) / 2).clamp(min=1e-6)
            tables[f"{index}.middle"], tables[f"{index}.half"] = middle, half
            ranked, m = value.sort(-1).values, self.exact(value.shape[1])
            low, high = ranked[:, m // 2, None], ranked[:, value.shape[1] - 1 - m // 2, None]
            center, reach = (high + low) / 2, ((high - low) / 2).abs().clamp(min=1e-6)
            for name, x, force in (("key", (key - middle) / half, key_force), ("value", (value - center) / reach, value_force)):
                inside = x.abs() <= 1 + 1e-6
                table = fitted(x[inside], force[inside], self.bits)
                tables[f"{index}.{name}_cuts"] = ((table[1:] + table[:-1]) / 2).float()
                tables[f"{index}.{name}_table"] = (normed(x[inside], table) if self.bits == 2 else table).float()
        return tables


class KvquantLayer(Held):
    """`key_rows` and `value_rows` are the first tokens; the others are codes [b,H,n,d bits/8] and exact entries [b,1,n,m]."""

    is_croppable = True

    def __init__(self, method: Kvquant, tables: dict[str, Tensor], rotary: Rotary) -> None:
        super().__init__()
        self.method, self.tables, self.rotary = method, tables, rotary
        self.key_codes, self.value_codes, self.reach = Grown(), Grown(), Grown()  # reach: z and r of values, fp16 [b,1,n,2]
        self.key_exact, self.key_at, self.value_exact, self.value_at = Grown(), Grown(), Grown(), Grown()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.tables = {name: table.to(key_states.device) for name, table in self.tables.items()}
        start, room = self.seen, max(0, self.method.first - self.seen)
        self.append(key_states[:, :, :room], value_states[:, :, :room])
        old_key, old_value = self._read(key_states.dtype) if len(self.key_codes) else (key_states[:, :, :0], value_states[:, :, :0])
        full = max(0, min(start, self.method.first))
        key = torch.cat([self.key_rows.rows[:, :, :full], old_key, key_states], 2)
        value = torch.cat([self.value_rows.rows[:, :, :full], old_value, value_states], 2)
        if key_states.shape[2] > room:
            self._write(key_states[:, :, room:].detach(), value_states[:, :, room:].detach(), start + room)
        self.seen = start + key_states.shape[2]
        self.show()
        return key, value

    def _write(self, key: Tensor, value: Tensor, start: int) -> None:
        m, tables = self.method.exact(key.shape[1] * key.shape[3]), self.tables
        key = self.rotary.turn(key, torch.arange(start, start + key.shape[2], device=key.device), back=True)
        rows = key.transpose(1, 2).flatten(2)  # [b, t, H d]
        scaled = (rows.float() - tables["middle"]) / tables["half"]
        self._keep(self.key_codes, self.key_exact, self.key_at, rows, scaled.abs().topk(m, -1).indices, scaled, tables["key_cuts"])
        rows = value.transpose(1, 2).flatten(2)
        ranked, order = rows.float().sort(-1)
        small, large = m // 2, rows.shape[2] - m // 2
        low, high = ranked[..., min(small, large - 1), None], ranked[..., max(small, large - 1), None]
        reach = torch.stack([(high + low) / 2, (high - low) / 2], -1).clamp(-LARGEST, LARGEST).half().squeeze(2)
        center, half = reach[..., :1].float(), reach[..., 1:].float()
        scaled = (rows.float() - center) / torch.where(half > 0, half, 1.0)
        at = torch.cat([order[..., :small], order[..., large:]], -1)
        self.reach.append(reach[:, None])
        self._keep(self.value_codes, self.value_exact, self.value_at, rows, at, scaled, tables["value_cuts"])

    def _keep(self, codes: Grown, exact: Grown, places: Grown, rows: Tensor, at: Tensor, scaled: Tensor, cuts: Tensor) -> None:
        exact.append(rows.gather(-1, at)[:, None])
        places.append(at.to(torch.int16)[:, None])
        heads = self.key_rows.rows.shape[1]
        split = torch.bucketize(scaled, cuts).to(torch.uint8).unflatten(2, (heads, -1)).transpose(1, 2)
        codes.append(pack(split, 3, self.method.bits))

    def _read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tables, center = self.tables, self.reach.rows[:, 0].float()
        key = self._decoded(self.key_codes, self.key_exact, self.key_at, tables["key_table"], tables["half"], tables["middle"])
        start = len(self.key_rows)
        key = self.rotary.turn(key, torch.arange(start, start + key.shape[2], device=key.device))
        value = self._decoded(self.value_codes, self.value_exact, self.value_at, tables["value_table"], center[..., 1:], center[..., :1])
        return key.to(dtype), value.to(dtype)

    def _decoded(self, codes: Grown, exact: Grown, places: Grown, table: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        split = unpack(codes.rows, 3, self.method.bits).transpose(1, 2)  # [b, n, H, d]
        rows = table.index_select(0, split.flatten().int()).view(*split.shape[:2], -1) * scale + shift
        rows.scatter_(-1, places.rows[:, 0].long(), exact.rows[:, 0].float())
        return rows.view(split.shape).transpose(1, 2)

    def crop(self, tokens_to_remove: int) -> None:
        left = self.seen - abs(tokens_to_remove)
        if left < 0:
            raise SmeltError(f"kvquant: {-tokens_to_remove} of {self.seen} tokens cannot be taken back")
        for name, held in vars(self).items():
            if isinstance(held, Grown) and held.store is not None:
                full = name in ("key_rows", "value_rows")
                held.slice(0, min(left, self.method.first) if full else max(0, left - self.method.first))
        self.seen = left
        self.show()
