"""KIVI against a slow reference that quantizes number by number."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from smelt import registry
from smelt.cache._codes import quantize
from smelt.cache._layers import Attending, Grown
from smelt.cache.eigen import Eigen
from smelt.cache.kivi import Kivi
from smelt.cache.think import Think
from smelt.model._tiny import tiny
from smelt.runtime import bind, cache_bytes, new_cache
from smelt.spec import SmeltError

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


def run(query, key, value, mask):
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    causal = mask is None and query.shape[2] > 1
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal).transpose(1, 2)


run.scaling = 32**-0.5


def see(layer, rows, start, stop):
    query, key, value = (part[:, :, start:stop] for part in rows)
    mask = (torch.arange(stop) <= torch.arange(start, stop)[:, None])[None, None] if start and stop - start > 1 else None
    shown, values = layer.update(key, value)
    return shown.attend(query, mask, run) if isinstance(shown, Attending) else run(query, shown, values, mask)


@pytest.fixture(scope="module")
def inner(decoder, tmp_path_factory):
    text = [torch.randint(2, 320, (4, 48), generator=torch.Generator().manual_seed(1))]
    whole, half = (Eigen(rank=r).calibrated(decoder, text, tmp_path_factory.mktemp("eigen")) for r in (1.0, 0.5))
    return {"eigen": half, "whole eigen": whole, "think": Think(drop=0.5, observed=8), "whole think": Think(drop=0.0)}


def three(tokens, batch=2):
    return torch.randn(batch, 4, tokens, 32), torch.randn(batch, 2, tokens, 32), torch.randn(batch, 2, tokens, 32)


def test_an_inner_method_that_drops_nothing_leaves_what_kivi_alone_does(decoder, inner):
    """ThinK with all channels hands the keys over as they are: the same codes."""
    rows, layers = three(90), [Kivi(**SMALL, inner=i).layer(decoder.config, 0) for i in (None, inner["whole think"])]
    for start, stop in [(0, 41), *((i, i + 1) for i in range(41, 70)), (70, 90)]:
        plain, held = (see(layer, rows, start, stop) for layer in layers)
        torch.testing.assert_close(held, plain, atol=1e-5, rtol=1e-4)
    assert torch.equal(layers[0].key_codes.rows, layers[1].old_keys.rows)
    assert torch.equal(layers[0].value_codes.rows, layers[1].old_values.rows)


@pytest.mark.parametrize("name", ["eigen", "think"])
def test_the_inner_rows_are_what_is_coded_and_the_bytes_are_those_of_the_formula(decoder, inner, name):
    method, rows = Kivi(bits=2, **SMALL, inner=inner[name]), three(150)
    cache = new_cache(decoder, method)
    for start, stop in [(0, 45), *((i, i + 1) for i in range(45, 120))]:
        for layer in cache.layers:
            see(layer, rows, start, stop)
        assert cache_bytes(cache) == method.bytes_held(decoder.config, 45, stop - 45, batch=2), stop
    layer = cache.layers[0]
    narrow, nk, nv = layer.narrow, 112, 104
    expected = narrow.keys(rows[1][:, :, :nk], 0, layer.chosen.rows if name == "think" else None)
    codes, scale, _ = quantize(expected.unflatten(2, (-1, 8)), 3, 2)
    assert torch.equal(layer.key_scale.rows, scale.squeeze(3)) and expected.shape[3] == 16
    assert (layer.old_keys.rows != codes.flatten(2, 3)).float().mean() < 1e-3  # a matrix product in pieces may round otherwise
    codes, _, _ = quantize(narrow.values(rows[2][:, :, :nv]).unflatten(3, (-1, 8)), 4, 2)
    assert (layer.old_values.rows != codes.flatten(3, 4)).float().mean() < 1e-3
    plain = Kivi(bits=2, **SMALL).bytes_held(decoder.config, 1 << 14)
    assert method.bytes_held(decoder.config, 1 << 14) < (0.8 if name == "think" else 0.55) * plain


@pytest.mark.parametrize("name", ["eigen", "think"])
def test_with_an_inner_method_batches_crop_and_reset_work(decoder, inner, name):
    method, rows = Kivi(bits=8, **SMALL, inner=inner[name]), three(120, batch=3)
    one, two = method.layer(decoder.config, 0), method.layer(decoder.config, 0)
    order = torch.tensor([2, 0, 0])
    see(one, rows, 0, 50)
    one.reorder_cache(order)
    moved = tuple(part[order] for part in rows)
    see(two, moved, 0, 50)
    one.activate_past_recording()
    see(one, tuple(torch.cat([m[:, :, :53], torch.randn_like(m[:, :, 53:])], 2) for m in moved), 50, 80)
    one.crop(-27)
    see(two, moved, 50, 53)
    one.record_past = False
    for at in range(53, 90):
        torch.testing.assert_close(see(one, moved, at, at + 1), see(two, moved, at, at + 1), atol=1e-3, rtol=1e-3)
    with pytest.raises(SmeltError, match="cannot be taken back"):
        one.crop(-30)
    one.reset()
    assert one.get_seq_length() == 0 and one.crop(0) is None
    first = see(one, rows, 0, 40)
    assert torch.equal(first, run(*(part[:, :, :40] for part in rows), None))


@pytest.mark.parametrize("name", ["whole eigen", "whole think"])
def test_with_an_inner_method_a_large_window_writes_the_same_tokens(decoder, inner, name):
    prompt = torch.randint(2, 320, (2, 40))
    settings = {"max_new_tokens": 30, "do_sample": False}
    plain = decoder.generate(prompt, **settings)
    for method in (Kivi(window=160, inner=inner[name]), Kivi(window=160, inner=inner[name.split()[1]])):
        with bind(decoder, cache=method):
            assert torch.equal(decoder.generate(prompt, **settings), plain)
            assert torch.equal(decoder.generate(prompt, num_beams=2, **settings)[:, :40], prompt)


def test_two_bits_at_8k_tokens_are_a_fifth_of_fp16_and_a_seventh_with_an_inner_method(decoder, inner):
    config = tiny("llama", hidden=256, heads=4, kv_heads=2).config
    half = 2 * 2 * 2 * 8192 * 64 * 2
    assert 5 * Kivi().bytes_held(config, 8192, itemsize=2) <= half
    assert 7 * Kivi(group=64, window=64, inner=Think(drop=0.4)).bytes_held(config, 8192, itemsize=2) <= half


def test_what_is_no_narrowing_is_refused_as_inner():
    assert Kivi().attends is False and Kivi(inner=Think()).attends is True
    with pytest.raises(SmeltError, match="makes no rows narrower; think"):
        Kivi(inner=Kivi())
    assert registry.parse(registry.text(Kivi(inner=Think(drop=0.5))), "cache") == Kivi(inner=Think(drop=0.5))


@pytest.mark.slow
def test_the_benchmark_beside_peers_runs(tmp_path):
    """smelt's side; the peers have environments of their own."""
    place = Path(__file__).parents[2] / "benchmarks" / "longcontext_vs_peers.py"
    spec = importlib.util.spec_from_file_location("longcontext_vs_peers", place)
    benchmark = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert benchmark.main(["--quick", "--peers", "--home", str(tmp_path), "--json", str(tmp_path / "found.json")]) == 0
    groups = json.loads((tmp_path / "found.json").read_text())["results"]
    held = {line["case"]: line["held"] for group in groups.values() for line in group["cases"]}
    assert held["full"] == 2 * 8 * 2 * 64 * 384 * 4
    assert all(value < held["full"] for name, value in held.items() if name != "full") and len(held) == 7
