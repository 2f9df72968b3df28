"""KVQuant against a slow reference, number by number."""

from __future__ import annotations

import pytest
import torch

from smelt.cache._layers import Grown
from smelt.cache.kvquant import Kvquant
from smelt.model._rotary import Rotary
from smelt.model._tiny import tiny
from smelt.runtime import bind, new_cache
from smelt.spec import SmeltError

HEADS, D = 2, 32
E = HEADS * D


@pytest.fixture(scope="module")
def decoder():
    return tiny("llama", hidden=128, heads=4, kv_heads=2, context=512, eos_token_id=None, bos_token_id=None, pad_token_id=None)


def text():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 320, (4, 60), generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def measured(decoder, tmp_path_factory):
    made = {}

    def of(**settings):
        key = tuple(sorted(settings.items()))
        if key not in made:
            made[key] = Kvquant(**settings).calibrated(decoder, text(), tmp_path_factory.mktemp("kvquant"))
        return made[key]

    return of


def draw(tokens, batch=2):
    return 2 * torch.randn(batch, HEADS, tokens, D), torch.randn(batch, HEADS, tokens, D)


def coded(x, table, cuts):
    return [table[sum(v > c for c in cuts)] for v in x]


def reference(key, value, method, tables, rotary):
    """What is held of rows [b, h, n, d]: loops over rows and tokens."""
    n, m = key.shape[2], method.exact(E)
    tables = {name: part.tolist() for name, part in tables.items()}
    keys, values = rotary.turn(key, torch.arange(n), back=True), value.clone()
    for b in range(len(key)):
        for t in range(method.first, n):
            row = keys[b, :, t].flatten().tolist()
            scaled = [(x - z) / r for x, z, r in zip(row, tables["middle"], tables["half"])]
            exact = sorted(range(E), key=lambda i: -abs(scaled[i]))[:m]
            back = [c * r + z for c, z, r in zip(coded(scaled, tables["key_table"], tables["key_cuts"]), tables["middle"], tables["half"])]
            keys[b, :, t] = torch.tensor([row[i] if i in exact else back[i] for i in range(E)]).view(HEADS, D)
            row = value[b, :, t].flatten().tolist()
            order = sorted(range(E), key=lambda i: row[i])
            exact = order[: m // 2] + order[E - m // 2 :]
            left = [row[i] for i in range(E) if i not in exact]
            if not left:
                continue
            center, half = ((max(left) + s * min(left)) / 2 for s in (1, -1))
            center, half = torch.tensor([center, half]).half().tolist()
            back = [c * half + center for c in coded([(x - center) / half for x in row], tables["value_table"], tables["value_cuts"])]
            values[b, :, t] = torch.tensor([row[i] if i in exact else back[i] for i in range(E)]).view(HEADS, D)
    keys = rotary.turn(keys, torch.arange(n))
    keys[:, :, : method.first] = key[:, :, : method.first]
    return keys, values


@pytest.mark.parametrize("settings", [{"bits": 2, "outliers": 0.1}, {"bits": 3, "first": 0}, {"bits": 4, "outliers": 0.0, "first": 5}])
def test_what_is_shown_is_what_the_reference_holds_and_the_new_token(decoder, measured, settings):
    method, (key, value) = measured(**settings), draw(23)
    layer = method.layer(decoder.config, 1)
    for start, stop in ((0, 3), (3, 4), (4, 22)):
        layer.update(key[:, :, start:stop], value[:, :, start:stop])
    shown = layer.update(key[:, :, 22:], value[:, :, 22:])
    expected = reference(key[:, :, :22], value[:, :, :22], method, method.state(decoder.config, 1), Rotary(decoder.config))
    for mine, old, new in zip(shown, expected, (key, value)):
        torch.testing.assert_close(mine[:, :, :22], old, atol=1e-4, rtol=1e-5)
        assert torch.equal(mine[:, :, 22:], new[:, :, 22:])


def test_outliers_are_exact_and_there_are_as_many_as_the_share(decoder, measured):
    method = measured(bits=2, outliers=0.125, first=0)
    assert method.exact(E) == 8 and Kvquant(outliers=0.01).exact(1024) == 12 and Kvquant(outliers=0).exact(E) == 0
    value = torch.randn(2, HEADS, 30, D)
    value[:, 0, :, 3], value[:, 1, :, 7] = 50.0, -80.0
    layer = method.layer(decoder.config, 0)
    layer.update(torch.randn(2, HEADS, 30, D), value)
    shown = layer.update(*draw(1))[1][:, :, :30]
    same = shown == value
    assert same[:, 0, :, 3].all() and same[:, 1, :, 7].all()
    assert (same.transpose(1, 2).flatten(2).sum(-1) >= 8).all()
    assert (shown - value)[~same].abs().max() < 3  # 80 does not stretch the range of the others


def test_key_thresholds_leave_the_share_out_on_the_text_they_come_from(decoder, measured):
    method = measured(bits=2, outliers=0.05, first=1)
    state = method.state(decoder.config, 1)
    with torch.no_grad():
        keys = [decoder(ids, use_cache=True).past_key_values.layers[1].keys for ids in text()]
    at = torch.arange(60)
    rows = torch.cat([Rotary(decoder.config).turn(k, at, back=True)[:, :, 1:].transpose(1, 2).flatten(0, 1).flatten(1) for k in keys])
    share = ((rows - state["middle"]).abs() > state["half"] * (1 + 1e-5)).float().mean()
    assert abs(share - 0.05) <= 0.001 + 1 / len(rows)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_bits_and_outliers_err_less(decoder, measured, bits):
    with torch.no_grad():
        rows = decoder(torch.randint(2, 320, (2, 60)), use_cache=True).past_key_values.layers[1]

    def error(**settings):
        layer = measured(**settings).layer(decoder.config, 1)
        layer.update(rows.keys, rows.values)
        shown = layer.update(*draw(1))
        return [float((s[:, :, :60] - x).norm() / x.norm()) for s, x in zip(shown, (rows.keys, rows.values))]

    here = error(bits=bits, outliers=0.05)
    if bits > 2:
        assert all(a < b for a, b in zip(here, error(bits=bits - 1, outliers=0.05)))
    assert all(a < b for a, b in zip(here, error(bits=bits, outliers=0.0)))
    assert all(a < 2.0 ** (1 - bits) for a in here)


def test_the_state_does_not_depend_on_how_the_tokens_came(decoder, measured):
    method, (key, value) = measured(bits=3, first=4), draw(20)
    states = []
    for sizes in ([20], [1] * 20, [3, 3, 14]):
        layer, start = method.layer(decoder.config, 0), 0
        for size in sizes:
            layer.update(key[:, :, start : start + size], value[:, :, start : start + size])
            start += size
        states.append({name: held.rows for name, held in vars(layer).items() if isinstance(held, Grown)})
    for state in states[1:]:
        assert len(state) == 9 and all(torch.equal(state[name], states[0][name]) for name in states[0])


def test_all_entries_exact_gives_the_logits_of_the_full_cache(decoder, measured):
    method, ids = measured(outliers=1.0), torch.randint(2, 320, (2, 90))
    with torch.no_grad():
        plain, cache = decoder(ids).logits, new_cache(decoder, method)
        with bind(decoder, cache=method):
            parts = [decoder(piece, past_key_values=cache).logits for piece in ids.split([40, 1, 1, 30, 18], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), plain, atol=1e-4, rtol=1e-4)


def test_measuring_leaves_the_model_alone_and_repeats(decoder):
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    decoder.train()
    one, two = (Kvquant(bits=2).measure(decoder, iter(text())) for _ in range(2))
    assert decoder.training and decoder.eval()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in decoder.named_parameters())
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_what_cannot_be_done_is_said(decoder, measured):
    with pytest.raises(SmeltError, match="kvquant has to be measured on text first"):
        new_cache(decoder, Kvquant())
    with pytest.raises(SmeltError, match="head size 12 is not a multiple of 8"):
        Kvquant().fits(tiny("llama", hidden=48, heads=4, kv_heads=2).config)
    layer = measured(bits=2, outliers=0.1).layer(decoder.config, 0)
    layer.update(*draw(5))
    with pytest.raises(SmeltError, match="6 of 5 tokens"):
        layer.crop(-6)
