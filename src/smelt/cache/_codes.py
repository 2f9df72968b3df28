"""Codes of a few bits: packing into bytes, and groups that share a scale and a minimum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smelt.cache._layers import Grown, capacity

__all__ = ["Codes", "dequantize", "pack", "quantize", "unpack"]

LARGEST = torch.finfo(torch.float16).max


def pack(codes: Tensor, dim: int, bits: int) -> Tensor:
    """uint8 codes below 2^bits -> bytes, bits / 8 as many along `dim`. Three bits are a plane of two and a plane of one.

    A byte holds codes that are a fraction bits/8 of the length apart, so that unpacking is one shift per part.
    """
    if bits == 3:
        return torch.cat([pack(codes & 3, dim, 2), pack(codes >> 2, dim, 1)], dim)
    parts = codes.chunk(8 // bits, dim)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        packed |= part << (bits * i)
    return packed


def unpack(packed: Tensor, dim: int, bits: int) -> Tensor:
    """The inverse of `pack`."""
    if bits == 3:
        two = packed.shape[dim] // 3 * 2
        low, high = packed.split([two, packed.shape[dim] - two], dim)
        return unpack(low, dim, 2) | (unpack(high, dim, 1) << 2)
    return torch.cat([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], dim)


def quantize(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(packed codes, scale, low) of groups that lie along `dim`; scale and low fp16 with that dimension 1 long."""
    top = 2**bits - 1
    x = x.detach().float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / top).clamp(max=LARGEST).half()
    low = low.clamp(-LARGEST, LARGEST).half()
    step = scale.float()
    step = torch.where(step > 0, step, 1.0)  # a constant group: every code is 0
    codes = ((x - low.float()) / step).round_().clamp_(0, top).to(torch.uint8)
    return pack(codes, dim, bits), scale, low


def dequantize(out: Tensor, packed: Tensor, scale: Tensor, low: Tensor, dim: int, bits: int) -> None:
    """Write scale * code + low into `out`, a view whose groups lie along `dim`."""
    exact = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    for i, part in enumerate(exact.chunk(8 // bits, dim)):
        part.copy_((packed >> (bits * i)) & (2**bits - 1))
    exact.mul_(scale.float()).add_(low.float())
    if exact is not out:
        out.copy_(exact)


class Codes(NamedTuple):
    """Rows [b, h, n, w] held as codes in three tensors of a layer. `dim` 2: groups of tokens, 3: groups of channels."""

    packed: Grown
    scale: Grown
    low: Grown
    dim: int
    group: int
    bits: int

    def append(self, rows: Tensor) -> None:
        codes, scale, low = quantize(rows.unflatten(self.dim, (-1, self.group)), self.dim + 1, self.bits)
        self.packed.append(codes.flatten(self.dim, self.dim + 1))
        self.scale.append(scale.squeeze(self.dim + 1))
        self.low.append(low.squeeze(self.dim + 1))

    def read(self, out: Tensor) -> None:
        """All rows into `out` [b, h, n, w], which may be a view."""
        packed = self.packed.rows.unflatten(self.dim, (-1, self.group * self.bits // 8))
        scale, low = (part.rows.unsqueeze(self.dim + 1) for part in (self.scale, self.low))
        dequantize(out.unflatten(self.dim, (-1, self.group)), packed, scale, low, self.dim + 1, self.bits)

    def cut(self, rows: int) -> None:
        """Keep the first `rows`, whole groups of them where groups are of tokens."""
        tokens = self.dim == 2
        self.packed.slice(0, rows * self.bits // 8 if tokens else rows)
        for part in (self.scale, self.low):
            part.slice(0, rows // self.group if tokens else rows)

    @staticmethod
    def bytes_of(rows: int, width: int, dim: int, group: int, bits: int) -> int:
        """Of one head, with the room to grow."""
        if dim == 2:
            return capacity(rows * bits // 8) * width + 2 * 2 * capacity(rows // group) * width
        return capacity(rows) * (width * bits // 8 + 2 * 2 * (width // group))
