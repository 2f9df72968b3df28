"""Expected Attention against loops in float64, and its formula against sampled queries."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import GPTNeoXConfig

from helpers.cache import positions, random_rows, see
from smelt.cache.expected_attention import ExpectedAttention, ahead
from smelt.model._rotary import Rotary
from smelt.model._tiny import tiny
from smelt.runtime import bind, cache_bytes
from smelt.spec import SmeltError

HEADS, GROUP, WIDTH = 2, 2, 8
CONFIG = tiny("llama", hidden=HEADS * GROUP * WIDTH, heads=HEADS * GROUP, kv_heads=HEADS).config
draw = partial(random_rows, HEADS, GROUP, WIDTH)


def rotated(position):
    """The matrix of a rotation, float64, from its definition: pairs (j, j + half) turn by position * theta^(-2j/d)."""
    theta, half = CONFIG.rope_parameters["rope_theta"], WIDTH // 2
    turn = torch.zeros(WIDTH, WIDTH, dtype=torch.double)
    for j in range(half):
        angle = torch.tensor(position * theta ** (-2 * j / WIDTH), dtype=torch.double)
        turn[j, j] = turn[j + half, j + half] = angle.cos()
        turn[j, j + half], turn[j + half, j] = -angle.sin(), angle.sin()
    return turn


def slow(method, query, first, key, value, seen):
    """Scores [b, h, n] of the rows but the sinks; `first` is the position of the first query."""
    mean_turn = torch.stack([rotated(seen + p) for p in range(method.horizon)]).mean(0)
    out = torch.zeros(key.shape[:3], dtype=torch.double)
    for b in range(key.shape[0]):
        for h in range(HEADS):
            for g in range(GROUP):
                plain = [
                    rotated(first + i).T @ query[b, h * GROUP + g, i].double() for i in range(query.shape[2]) if first + i >= method.sinks
                ]
                mean = sum(plain) / len(plain)
                spread = sum(torch.outer(x - mean, x - mean) for x in plain) / len(plain)
                mean, spread = mean_turn @ mean, mean_turn @ spread @ mean_turn.T
                rows = key[b, h, method.sinks :].double()
                logits = torch.stack([mean @ k / WIDTH**0.5 + k @ spread @ k / (2 * WIDTH) for k in rows])
                out[b, h, method.sinks :] += logits.softmax(0) / GROUP
            out[b, h] = (out[b, h] + method.epsilon) * value[b, h].double().norm(dim=-1)
            out[b, h, : method.sinks] = 0
    return out


@pytest.mark.parametrize("epsilon", [0.0, 0.02])
@pytest.mark.parametrize("tokens", [12, 40])
def test_the_score_is_that_of_loops(epsilon, tokens):
    method = ExpectedAttention(budget=10, sinks=3, horizon=9, epsilon=epsilon)
    query, key, value = draw(40)
    first = 40 - tokens  # with fewer queries than rows none belongs to a sink
    fast = method.scorer(CONFIG)(query[:, :, first:], key, value, 40, WIDTH**-0.5)
    torch.testing.assert_close(fast.double(), slow(method, query[:, :, first:], first, key, value, 40), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_rotation_ahead_is_the_mean_of_rotations(share):
    config = tiny("llama", hidden=HEADS * GROUP * WIDTH, heads=HEADS * GROUP, kv_heads=HEADS).config
    config.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": share}
    rotary = Rotary(config)
    basis = torch.eye(WIDTH).view(1, WIDTH, 1, WIDTH).expand(1, WIDTH, 21, WIDTH)
    expected = rotary.turn(basis, torch.arange(100, 121)).mean(2)[0].T
    torch.testing.assert_close(ahead(rotary, WIDTH, 100, 21, torch.device("cpu")), expected, atol=1e-6, rtol=1e-5)


def test_it_expects_what_gaussian_queries_will_give():
    """horizon=1: the rotation is exact, and scores of two rows have the ratio of E[exp(s q . k)], here by sampling."""
    method = ExpectedAttention(budget=10, sinks=0, horizon=1)
    tokens = 4000
    plain = torch.randn(1, HEADS * GROUP, tokens, WIDTH) * torch.linspace(0.2, 1.2, WIDTH) + 0.5
    plain[:, 1::2] = plain[:, ::2]  # the heads of a group alike, so that the mean over them is no other quantity
    rotary = Rotary(CONFIG)
    query = rotary.turn(plain, torch.arange(tokens))
    key, value = torch.randn(1, HEADS, 6, WIDTH), torch.ones(1, HEADS, 6, WIDTH)
    score = method.scorer(CONFIG)(query, key, value, tokens, WIDTH**-0.5)
    coming = rotary.turn(plain, torch.full((tokens,), tokens))[:, ::2]
    sampled = (coming @ key.transpose(2, 3) / WIDTH**0.5).exp().mean(2)
    torch.testing.assert_close(score / score.sum(-1, keepdim=True), sampled / sampled.sum(-1, keepdim=True), atol=0, rtol=0.05)


def test_what_stays_are_the_sinks_the_recent_and_the_best_also_while_writing():
    method = ExpectedAttention(budget=14, sinks=2, recent=3, horizon=8, memory=6, slack=4)
    query, key, value = draw(60)
    layer = method.layer(CONFIG, 0)
    held = torch.arange(40).expand(2, HEADS, 40)
    cuts = 0
    for stop in range(40, 61):
        start = 0 if stop == 40 else stop - 1
        see(layer, query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop])
        if start:
            held = torch.cat([held, torch.full((2, HEADS, 1), start)], 2)
        if held.shape[2] > 14 + (4 if start else 0):
            cuts += 1
            asked = 0 if not start else stop - 7  # the call's own, or the last six and the new one
            at = held[..., None].expand(-1, -1, -1, WIDTH)
            score = slow(method, query[:, :, asked:stop], asked, key.gather(2, at), value.gather(2, at), stop)
            n = held.shape[2]
            middle = score[:, :, 2 : n - 3].topk(9).indices.sort().values + 2
            ends = [torch.arange(2).expand(2, HEADS, 2), torch.arange(n - 3, n).expand(2, HEADS, 3)]
            held = held.gather(2, torch.cat([ends[0], middle, ends[1]], 2))
        assert torch.equal(positions(layer, key), held), stop
    assert cuts == 5


def test_a_planted_key_stays_and_a_larger_value_wins():
    query, key, value = draw(80, batch=1)
    rotary = Rotary(CONFIG)
    wanted = torch.randn(WIDTH)
    query = rotary.turn(0.1 * query + 3 * wanted, torch.arange(80))
    asked = ahead(rotary, WIDTH, 80, 8, torch.device("cpu")) @ wanted
    key[0, 0, 33] = key[0, 1, 60] = 3 * asked
    key[0, 0, 40], key[0, 0, 50] = 2.01 * asked, 2 * asked
    value[0, 0, 40], value[0, 0, 50] = 0.01, 2.0
    layer = ExpectedAttention(budget=3, sinks=1, horizon=8).layer(CONFIG, 0)
    see(layer, query, key, value)
    assert positions(layer, key)[0, 0].tolist() == [0, 33, 50] and 60 in positions(layer, key)[0, 1]


def test_it_holds_its_budget_while_it_writes():
    decoder = tiny("llama", eos_token_id=None, bos_token_id=None, pad_token_id=None)
    method = ExpectedAttention(budget=24, memory=8, slack=8)
    with bind(decoder, cache=method):
        for prompt in (10, 24, 25, 150):
            out = decoder.generate(torch.randint(2, 320, (2, prompt)), max_new_tokens=40, return_dict_in_generate=True)
            rows = method.plan.rows(prompt, 39)
            assert {len(layer.key_rows) for layer in out.past_key_values.layers} == {rows} and 24 <= rows <= 32
            assert cache_bytes(out.past_key_values) == method.bytes_held(decoder.config, prompt, 39, batch=2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(SmeltError, match="budget=8 leaves nothing to choose"):
        ExpectedAttention(budget=8, sinks=4, recent=4)
    with pytest.raises(SmeltError, match="gpt_neox"):
        ExpectedAttention().layer(GPTNeoXConfig(), 0)
