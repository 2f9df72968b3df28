"""LoLCATs against loops over every pair of tokens in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

from smelt.attention._heads import attended, heads
from smelt.attention._mixer import convert, place
from smelt.attention.lolcats import WORTH, Lolcats
from smelt.model._tiny import tiny
from smelt.model._walk import parts
from smelt.spec import SmeltError


def made(method, layer=0, spread=1.0, architecture="llama"):
    """(attention, mixer) of one layer, the maps far from uniform."""
    was, mixer = convert(tiny(architecture), method)[layer]
    with torch.no_grad():
        for p in method.learned(mixer)[:2]:
            p.normal_(0, spread)
        mixer.factor.normal_()
    return was, mixer


def phi(x, weight):
    up = [math.exp(float(x @ weight[:, m])) for m in range(weight.shape[1])]
    down = [1 / u for u in up]
    return torch.tensor([u / sum(up) for u in up] + [u / sum(down) for u in down], dtype=torch.float64)


def reference(mixer, query, key, value, real):
    """Every query by itself, over the tokens before it one by one."""
    query, key, value = query.double(), key.double(), value.double()
    b, h, t, _ = query.shape
    share = h // key.shape[1]
    out = torch.zeros_like(query)
    for row in range(b):
        for head in range(h):
            g, s = divmod(head, share)
            maps = mixer.query_map[g, s].double(), mixer.key_map[g, s].double()
            gamma = 1 / (1 + math.exp(-float(mixer.factor[g, s])))
            for i in range(t):
                near = [j for j in range(i + 1) if j > i - mixer.window and real[row, j]]
                far = [j for j in range(i + 1) if j <= i - mixer.window and real[row, j]]
                score = {j: float(query[row, head, i] @ key[row, g, j]) * mixer.scaling for j in near}
                weight = {j: gamma * math.exp(score[j] - max(score.values())) for j in near}
                weight |= {j: float(phi(query[row, head, i], maps[0]) @ phi(key[row, g, j], maps[1])) for j in far}
                if weight:
                    out[row, head, i] = sum(w * value[row, g, j] for j, w in weight.items()) / sum(weight.values())
    return out


@pytest.mark.parametrize("window", [1, 4, 7, 30])
def test_it_equals_the_loops_in_one_call_and_through_its_state(window, monkeypatch):
    monkeypatch.setattr("smelt.attention.lolcats.CHUNK", 5)
    _, mixer = made(Lolcats(window=window, features=3))
    query, key, value = torch.randn(2, 4, 18, 16), torch.randn(2, 2, 18, 16), torch.randn(2, 2, 18, 16)
    real = torch.ones(2, 18, dtype=torch.bool)
    real[1, :6] = False
    with torch.no_grad():
        wanted = reference(mixer, query, key, value, real).float()
        whole, _ = mixer.hybrid(query, key, value, {}, real)
        torch.testing.assert_close(whole, wanted, atol=1e-5, rtol=1e-4)
        for cuts in ([0, 3, 4, 11, 18], list(range(19))):
            held, pieces = {}, []
            for start, stop in pairwise(cuts):
                out, held = mixer.hybrid(*(x[:, :, start:stop] for x in (query, key, value)), held, real[:, start:stop])
                pieces.append(out)
            torch.testing.assert_close(torch.cat(pieces, 2), wanted, atol=1e-5, rtol=1e-4)
        left = (real[:, : max(0, 18 - window)]).sum(1)  # each entered once: with constant features the last column counts them
        mixer.key_map.zero_()
        held = {}
        for i in range(18):
            _, held = mixer.hybrid(*(x[:, :, i : i + 1] for x in (query, key, value)), held, real[:, i : i + 1])
        torch.testing.assert_close(held["far"][..., -1] * 3, left[:, None, None, None].expand_as(held["far"][..., -1]).float())


@pytest.mark.parametrize("factor", [-9.0, -2.2, 4.0])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"])
def test_a_window_of_the_whole_length_is_softmax_attention(architecture, factor):
    torch.manual_seed(0)
    model, tokens = tiny(architecture), torch.randint(2, 300, (2, 70))
    with torch.no_grad():
        plain = model(tokens).logits
        pairs = convert(model, Lolcats(window=70))
        for _, mixer in pairs.values():
            mixer.factor.fill_(factor)
        place(model, pairs)
        torch.testing.assert_close(model(tokens).logits, plain, atol=2e-5, rtol=1e-4)
        past = DynamicCache()
        pieces = [model(tokens[:, i : i + 10], past_key_values=past).logits for i in range(0, 70, 10)]
        torch.testing.assert_close(torch.cat(pieces, 1), plain, atol=2e-5, rtol=1e-4)


def test_a_window_below_the_length_is_not():
    model, tokens = tiny(), torch.randint(2, 300, (2, 70))
    with torch.no_grad():
        plain = model(tokens).logits
        place(model, convert(model, Lolcats(window=30)))
        changed = model(tokens).logits
    torch.testing.assert_close(changed[:, :30], plain[:, :30], atol=2e-5, rtol=1e-4)
    assert (changed[:, 30:] - plain[:, 30:]).abs().mean() > 1e-3


def test_queries_and_keys_get_the_gradient_of_the_unshifted_sum():
    """The largest score of a window moves the softmax part against the other one."""
    _, mixer = made(Lolcats(window=3, features=2))
    query, key, value = (torch.randn(1, n, 7, 16, requires_grad=True) for n in (4, 2, 2))
    about = (query, key, value, mixer.query_map, mixer.key_map, mixer.factor)
    out, _ = mixer.hybrid(query, key, value, {}, None)
    found = torch.autograd.grad(out.sin().sum(), about)

    def row(head, i):
        g, s = divmod(head, 2)
        q, k, v = query[0, head, i].double(), key[0, g].double(), value[0, g].double()
        maps = mixer.query_map[g, s].double(), mixer.key_map[g, s].double()
        split = max(0, i - 2)
        score = k[split : i + 1] @ q * mixer.scaling
        near = mixer.factor[g, s].double().sigmoid() * (score - score.max()).exp()
        asked, kept = (torch.cat([(x @ w).softmax(-1), (-x @ w).softmax(-1)], -1) for x, w in zip((q, k[:split]), maps, strict=True))
        weight = torch.cat([kept @ asked, near])
        return weight @ v[: i + 1] / weight.sum()

    slow = torch.stack([row(head, i) for head in range(4) for i in range(7)])
    for one, other in zip(found, torch.autograd.grad(slow.sin().sum(), about), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_the_loss_is_a_thousand_times_the_squared_difference_before_o_proj():
    method = Lolcats(window=4, features=3)
    was, mixer = made(method)
    hidden = torch.randn(2, 12, 64)
    angle = torch.randn(1, 12, 16)
    angles = angle.cos(), angle.sin()
    query, key, value = heads(was, hidden, angles)
    wanted = attended(query, key, value, was.scaling)
    real = torch.ones(2, 12, dtype=torch.bool)
    with torch.no_grad():
        gap = reference(mixer, query, key, value, real).float() - wanted
        loss = method.lost(mixer, was, hidden, angles, 0.0)
    torch.testing.assert_close(loss, 1000 * gap.pow(2).sum((1, 3)) / (4 * 16), atol=1e-3, rtol=1e-4)
    assert WORTH == 1000 and float(loss[:, :4].max()) < 1e-6 < float(loss[:, 4:].min())


def test_the_transfer_brings_every_layer_nearer_and_leaves_the_rest_alone():
    torch.manual_seed(0)
    model, method = tiny("llama", layers=2), Lolcats(window=8, features=16)
    pairs = convert(model, method)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.requires_grad_(False)
    tokens = torch.randint(2, 300, (8, 96))
    read = {}
    hooks = [
        was.register_forward_pre_hook(
            lambda m, a, k, i=i: read.update({i: (k["hidden_states"], k["position_embeddings"])}), with_kwargs=True
        )
        for i, (was, _) in pairs.items()
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    learned = [p for _, mixer in pairs.values() for p in method.learned(mixer)]
    optimizer = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.0)
    course = []
    for _ in range(60):
        losses = [method.lost(mixer, was, *read[i], 0.0).mean() for i, (was, mixer) in pairs.items()]
        course.append([loss.item() for loss in losses])
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    assert all(last < first / 2 for first, last in zip(course[0], course[-1])), (course[0], course[-1])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len({id(p) for p in learned}) == 6 and sum(p.numel() for p in learned) == 2 * 4 * (2 * 16 * 16 + 1)


def test_the_state_stops_growing_with_the_window():
    method, config = Lolcats(window=64, features=64, layers=(0,)), tiny().config
    sizes = parts(config)
    far = 4 * sizes.heads * 128 * 17
    assert method.state_bytes(config, 10) == far + 10 + 2 * 2 * 10 * 16 * 4
    assert method.state_bytes(config, 64, batch=2, itemsize=2) == 2 * (far + 64 + 2 * 2 * 64 * 16 * 2)
    assert method.state_bytes(config, 64) == method.state_bytes(config, 1 << 20)


def test_a_model_of_half_precision_keeps_its_dtype():
    model = tiny("llama").to(torch.bfloat16)
    place(model, convert(model, Lolcats(window=8, features=4)))
    past = DynamicCache()
    with torch.no_grad():
        assert model(torch.randint(2, 300, (1, 20)), past_key_values=past).logits.dtype == torch.bfloat16
    held = past.layers[0].held
    assert held["key"].dtype == torch.bfloat16 and held["far"].dtype == torch.float32


def test_the_factor_starts_at_gamma_and_other_attention_is_refused():
    mixer = convert(tiny(), Lolcats(gamma=0.3))[0][1]
    torch.testing.assert_close(mixer.factor.sigmoid(), torch.full((2, 2), 0.3))
    assert mixer.query_map.abs().max() <= math.sqrt(6 / (16 * 64)) and not torch.equal(mixer.query_map, mixer.key_map)
    with pytest.raises(SmeltError, match="lolcats learns from full attention"):
        convert(tiny("mistral", sliding_window=8), Lolcats())


def test_a_long_row_goes_in_passes(monkeypatch):
    _, mixer = made(Lolcats(window=6, features=3))
    hidden, angle = torch.randn(2, 50, 64), torch.randn(1, 50, 16)
    angles = angle.cos(), angle.sin()
    real = torch.ones(2, 50, dtype=torch.bool)
    real[0, :23] = False
    with torch.no_grad():
        whole = mixer.mix(hidden, angles, None, real)
        monkeypatch.setattr("smelt.attention.lolcats.SPAN", 7)
        torch.testing.assert_close(mixer.mix(hidden, angles, None, real), whole, atol=1e-5, rtol=1e-4)
