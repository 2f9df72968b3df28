"""KIVI against a slow reference that quantizes number by number."""

from __future__ import annotations

import pytest
import torch

from smelt.cache._layers import Grown
from smelt.cache.kivi import Kivi, dequantize, quantize
from smelt.model._tiny import tiny
from smelt.runtime import bind
from smelt.spec import SmeltError

HALF = 2.0**-11  # relative error of rounding to fp16
SMALL = {"group": 8, "window": 16}


@pytest.fixture(scope="module")
def decoder():
    return tiny("llama", hidden=128, heads=4, kv_heads=2, context=512, eos_token_id=None, bos_token_id=None, pad_token_id=None)


def half(number: float) -> float:
    return torch.tensor(number).half().item()


def rounded(numbers: list[float], bits: int) -> list[float]:
    """One group, as the paper says it."""
    top = 2**bits - 1
    low, high = min(numbers), max(numbers)
    scale, low = half(((torch.tensor(high) - torch.tensor(low)) / top).item()), half(low)
    return [low + scale * min(top, max(0, round((x - low) / scale))) if scale else low for x in numbers]


def reference(key, value, method: Kivi) -> tuple[torch.Tensor, torch.Tensor]:
    """What is held after these rows [h, n, d]: loops over heads, channels, tokens."""
    heads, n, d = key.shape
    g = method.group
    nk, nv = n - n % method.window, max(0, n - method.window)
    key, value = key.clone(), value.clone()
    for h in range(heads):
        for first in range(0, nk, g):
            for c in range(d):
                key[h, first : first + g, c] = torch.tensor(rounded(key[h, first : first + g, c].tolist(), method.bits))
        for t in range(nv):
            for first in range(0, d, g):
                value[h, t, first : first + g] = torch.tensor(rounded(value[h, t, first : first + g].tolist(), method.bits))
    return key, value


def draw(tokens: int, heads: int = 2, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, heads, tokens, width), torch.randn(1, heads, tokens, width)


def fill(layer, key, value, sizes):
    start, shown = 0, None
    for size in sizes:
        shown = layer.update(key[:, :, start : start + size], value[:, :, start : start + size])
        start += size
    assert start == key.shape[2]
    return shown


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40, 48])
def test_what_is_shown_is_what_the_reference_holds_and_the_new_tokens(decoder, bits, tokens):
    method = Kivi(bits=bits, **SMALL)
    key, value = draw(tokens + 1)
    layer = method.layer(decoder.config, 0)
    fill(layer, key[:, :, :-1], value[:, :, :-1], [tokens])
    shown = layer.update(key[:, :, -1:], value[:, :, -1:])
    expected = reference(key[0, :, :-1], value[0, :, :-1], method)
    for mine, old, new in zip(shown, expected, (key, value)):
        torch.testing.assert_close(mine[0, :, :-1], old, atol=2e-6, rtol=1e-6)
        assert torch.equal(mine[:, :, -1:], new[:, :, -1:])


@pytest.mark.parametrize("tokens", [1, 7, 8, 15, 16, 17, 31, 32, 33, 50, 95, 96, 97])
def test_the_state_does_not_depend_on_how_the_tokens_came(decoder, tokens):
    method = Kivi(**SMALL)
    key, value = draw(tokens)
    cuts = [[tokens], [1] * tokens, [tokens // 3, tokens - tokens // 3] if tokens > 2 else [tokens]]
    states = []
    for sizes in cuts:
        layer = method.layer(decoder.config, 0)
        fill(layer, key, value, sizes)
        states.append({name: held.rows for name, held in vars(layer).items() if isinstance(held, Grown) and len(held)})
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    nk, nv = tokens - tokens % 16, max(0, tokens - 16)
    assert layer.keys.shape[2] == tokens - nk and layer.values.shape[2] == tokens - nv


def test_a_prompt_is_attended_exactly_and_a_token_in_full_before_the_window_is_emptied(decoder):
    method = Kivi(**SMALL)
    key, value = draw(16)
    layer = method.layer(decoder.config, 0)
    shown = fill(layer, key, value, [15, 1])  # the 16th token fills the window
    assert torch.equal(shown[0], key) and torch.equal(shown[1], value)
    assert len(layer.key_rows) == 0
    layer.reset()
    shown = fill(layer, *draw(333), [333])
    assert shown[0].shape[2] == 333


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_one_rounding_only(decoder, dtype):
    key, value = (x.to(dtype) for x in draw(40))
    method = Kivi(bits=8, **SMALL)
    layer = method.layer(decoder.config, 0)
    fill(layer, key[:, :, :39], value[:, :, :39], [39])
    shown = layer.update(key[:, :, 39:], value[:, :, 39:])
    expected = reference(key[0, :, :39].float(), value[0, :, :39].float(), method)
    for mine, old in zip(shown, expected):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine[0, :, :39].float(), old, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_per_channel_keys_beat_per_token_where_channels_differ(decoder):
    """The reason for the paper's axes: a few channels of the keys lie far off in every token."""
    key = torch.randn(1, 2, 64, 32)
    key[..., [3, 17]] += 20
    value = torch.randn(1, 2, 64, 32) + 20 * (torch.rand(1, 2, 64, 1) > 0.9)  # of the values, a few tokens do
    layer = Kivi(bits=2, group=16, window=16).layer(decoder.config, 0)

    def error(k, v):
        layer.reset()
        layer.update(k, v)
        shown = layer.update(torch.zeros(1, 2, 1, 32), torch.zeros(1, 2, 1, 32))
        return [(s[:, :, :48] - x[:, :, :48]).norm() for s, x in zip(shown, (k, v))]

    right, swapped = error(key, value), error(value, key)
    assert right[0] < 0.5 * swapped[1]  # the keys, per channel against per token
    assert right[1] < 0.5 * swapped[0]  # the values


def test_bytes_come_down_to_three_bits_per_element(decoder):
    config = tiny("llama", hidden=256, heads=4, kv_heads=2).config
    tokens = 1 << 15
    elements = 2 * 2 * 2 * tokens * 64
    assert 3.0 <= 8 * Kivi(window=32).bytes_held(config, tokens) / elements < 3.1
    assert 9.0 <= 8 * Kivi(bits=8, window=32).bytes_held(config, tokens) / elements < 9.1


def test_window_at_least_the_length_writes_the_same_tokens(decoder):
    prompt = torch.randint(2, 320, (1, 40)).repeat(1, 3)
    settings = {"max_new_tokens": 40, "do_sample": False}
    plain = decoder.generate(prompt, **settings)
    with bind(decoder, cache=Kivi(window=160)):
        assert torch.equal(decoder.generate(prompt, **settings), plain)
        assert torch.equal(decoder.generate(prompt, prompt_lookup_num_tokens=4, **settings), plain)
    with bind(decoder, cache=Kivi(**SMALL)):
        assert not torch.equal(decoder.generate(prompt, **settings), plain)  # this model is random: two bits change it


def test_assisted_decoding_leaves_the_state_of_plain_feeding(decoder):
    prompt = torch.randint(2, 320, (1, 20)).repeat(1, 3)
    method = Kivi(bits=8, **SMALL)
    with bind(decoder, cache=method):
        out = decoder.generate(prompt, prompt_lookup_num_tokens=4, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
        past = out.past_key_values
        assert past.get_seq_length() == out.sequences.shape[1] - 1
        assert [len(layer.key_codes) // 8 * 8 for layer in past.layers] == [past.get_seq_length() // 16 * 16] * 2
        assert not any(layer.record_past for layer in past.layers)


def test_crop_raises_behind_the_window_unless_the_tokens_were_recorded(decoder):
    layer = Kivi(**SMALL).layer(decoder.config, 0)
    layer.update(*draw(16))  # keys quantized, values just not
    with pytest.raises(SmeltError, match="activate_past_recording"):
        layer.crop(-1)
    layer.reset()
    layer.update(*draw(15))
    layer.crop(-15)
    assert layer.get_seq_length() == 0
    layer.update(*draw(20))
    with pytest.raises(SmeltError, match="last 1 of 20"):  # one more value was quantized than 19 tokens would have
        layer.crop(-1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"window": 40}, "window=40 is not a multiple of group=32"), ({"group": 6, "window": 12}, "multiple of 4")],
)
def test_settings_that_break_groups_are_refused(settings, said):
    with pytest.raises(SmeltError, match=said):
        Kivi(**settings)


def test_a_group_that_does_not_divide_the_head_is_refused_with_one_that_does():
    config = tiny("llama", hidden=96, heads=4, kv_heads=2).config
    with pytest.raises(SmeltError, match="group=32 does not divide the head size 24; group=24 fits"):
        Kivi().layer(config, 0)
