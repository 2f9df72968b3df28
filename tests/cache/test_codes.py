"""Codes, number by number."""

from __future__ import annotations

import pytest
import torch

from smelt.cache._codes import Codes, dequantize, pack, quantize, unpack
from smelt.cache._layers import Grown

HALF = 2.0**-11  # relative error of rounding to fp16


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_the_error_is_at_most_half_a_step(bits, spread):
    """And what rounding the ends of the range to fp16 may add."""
    x = spread * (torch.randn(2, 3, 5, 32, 16) + 3 * torch.randn(2, 3, 5, 1, 16))
    packed, scale, low = quantize(x, 3, bits)
    back = torch.empty_like(x)
    dequantize(back, packed, scale, low, 3, bits)
    step, low = scale.float(), low.float()
    tiny_step = 2.0**-25  # half the smallest fp16 above zero
    bound = step / 2 + HALF * (low.abs() + (2**bits - 1) * step) + 2**bits * tiny_step + 1e-6 * x.abs()
    assert ((x - back).abs() <= bound).all()
    assert ((x - back).abs() > 0.4 * step).any()  # and the bound is not a loose one


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [3, 4])
def test_every_code_in_every_place_of_a_byte_survives_packing(bits, dim):
    top, per = 2**bits - 1, 8 // bits
    bytes_ = torch.arange(256)
    parts = torch.stack([(bytes_ >> (bits * i)) & top for i in range(per)])  # [per, 256]: the codes that make each byte
    ends = torch.tensor([0, top]).repeat_interleave(per).view(2, per).T  # every group gets its smallest and largest number
    codes = torch.cat([parts, ends], 1).float()  # one group [per, 258] whose part i of each byte is row i
    x = codes.reshape(1, 1, 1, -1, 1) if dim == 3 else codes.reshape(1, 1, 1, 1, -1)
    packed, scale, low = quantize(x, dim, bits)
    assert scale.item() == 1 and low.item() == 0
    assert packed.flatten()[:256].tolist() == list(range(256)) and packed.numel() == 258
    back = torch.empty_like(x)
    dequantize(back, packed, scale, low, dim, bits)
    assert torch.equal(back, x)


def test_constant_groups_and_numbers_beyond_fp16_stay_numbers():
    constant = torch.full((1, 1, 2, 8, 4), 0.375)
    packed, scale, low = quantize(constant, 3, 2)
    back = torch.empty_like(constant)
    dequantize(back, packed, scale, low, 3, 2)
    assert torch.equal(back, constant) and not packed.any()
    large = torch.tensor([-1e9, 0.0, 1.0, 1e9] * 2).view(1, 1, 1, 8, 1)
    back = torch.empty_like(large)
    dequantize(back, *quantize(large, 3, 2), 3, 2)
    assert back.isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [2, 3])
def test_packing_is_undone_and_takes_bits_over_eight_bytes(bits, dim):
    codes = torch.randint(0, 2**bits, (2, 3, 16, 24), dtype=torch.uint8)
    packed = pack(codes, dim, bits)
    assert packed.dtype == torch.uint8 and 8 * packed.numel() == bits * codes.numel()
    assert torch.equal(unpack(packed, dim, bits), codes)


@pytest.mark.parametrize("dim", [2, 3])
def test_rows_in_pieces_read_as_each_piece_was_coded_and_bytes_are_those_of_the_storage(dim):
    rows = torch.randn(2, 3, 40, 16)
    held = Codes(Grown(), Grown(), Grown(), dim, 8, 2)
    for piece in rows.split([8, 24, 8], 2):
        held.append(piece)
    out = torch.empty_like(rows)
    held.read(out)
    for start in range(0, 40, 8):  # whole groups: one by one is the same
        piece = rows[:, :, start : start + 8].unflatten(dim, (-1, 8))
        back = torch.empty_like(piece)
        dequantize(back, *quantize(piece, dim + 1, 2), dim + 1, 2)
        assert torch.equal(out[:, :, start : start + 8], back.flatten(dim, dim + 1))
    stored = sum(part.store.numel() * part.store.itemsize for part in (held.packed, held.scale, held.low))
    assert stored == 2 * 3 * Codes.bytes_of(40, 16, dim, 8, 2)
    held.cut(16)
    half = torch.empty(2, 3, 16, 16)
    held.read(half)
    assert torch.equal(half, out[:, :, :16])
