"""ThinK against sums over channels, one by one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from smelt.cache._narrow import NarrowLayer
from smelt.cache.think import Channels, Think
from smelt.model._tiny import tiny
from smelt.runtime import bind

D, HEADS, GROUP = 16, 2, 2


@pytest.fixture(scope="module")
def decoder():
    return tiny("llama", hidden=64, heads=4, kv_heads=2, context=512, eos_token_id=None, bos_token_id=None, pad_token_id=None)


def run(query, key, value, mask):
    key, value = key.repeat_interleave(GROUP, 1), value.repeat_interleave(GROUP, 1)
    causal = mask is None and query.shape[2] > 1
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal).transpose(1, 2)


run.scaling = D**-0.5


def draw(tokens, batch=2):
    uneven = torch.rand(batch, HEADS, 1, D) + 0.1  # channels that do not matter alike
    query = torch.randn(batch, HEADS * GROUP, tokens, D) * uneven.repeat_interleave(GROUP, 1).flip(-1)
    return query, torch.randn(batch, HEADS, tokens, D) * uneven, torch.randn(batch, HEADS, tokens, D)


def reference(query, key, method):
    """The channels of each row and head, by loops."""
    kept = D - math.floor(method.drop * D)
    chosen = []
    for b in range(len(key)):
        for h in range(HEADS):
            score = []
            for j in range(D):
                asked = sum(query[b, h * GROUP + g, -method.observed :, j].double().square().sum() for g in range(GROUP))
                score.append(float(asked / GROUP * key[b, h, :, j].double().square().sum()))
            chosen.append(sorted(sorted(range(D), key=lambda j: -score[j])[:kept]))
    return torch.tensor(chosen).view(len(key), HEADS, kept)


@pytest.mark.parametrize("tokens", [20, 60])
def test_a_token_after_the_prompt_sees_old_keys_through_the_chosen_channels_only(decoder, tokens):
    method = Think(drop=0.4, window=10, observed=7)
    query, key, value = draw(tokens + 3)
    layer = method.layer(decoder.config, 0)
    assert isinstance(layer, NarrowLayer)
    layer.update(key[:, :, :tokens], value[:, :, :tokens])
    prompt = layer.attend(query[:, :, :tokens], None, run)
    assert torch.equal(prompt, run(*(x[:, :, :tokens] for x in (query, key, value)), None))  # attended in full
    chosen = reference(query[:, :, :tokens], key[:, :, :tokens], method)
    assert torch.equal(layer.chosen.rows[:, :, 0].long(), chosen)
    assert layer.old_keys.rows.shape == (2, HEADS, tokens - 10, D - 6)
    for at in range(tokens, tokens + 3):
        layer.update(key[:, :, at : at + 1], value[:, :, at : at + 1])
        old = at - 10  # keys that are narrow while this token is attended
        for b, h in itertools.product(range(2), range(HEADS * GROUP)):
            q, k = query[b, h, at].double(), key[b, h // GROUP, : at + 1].double().clone()
            dropped = [j for j in range(D) if j not in chosen[b, h // GROUP].tolist()]
            whole = k @ q
            k[:old, dropped] = 0
            left_out = torch.stack([sum(q[j] * key[b, h // GROUP, i, j].double() for j in dropped) for i in range(old)])
            torch.testing.assert_close((whole - k @ q)[:old], left_out, atol=1e-9, rtol=1e-9)
            expected = (k @ q / math.sqrt(D)).softmax(0) @ value[b, h // GROUP, : at + 1].double()
            if h == b == 0:
                out = layer.attend(query[:, :, at : at + 1], None, run)
            torch.testing.assert_close(out[b, 0, h].double(), expected, atol=1e-5, rtol=1e-5)


def test_the_greedy_choice_is_near_the_best_of_all_subsets():
    width, kept, worst = 8, 5, 1.0
    for _ in range(100):
        query, key = torch.randn(1, 1, 32, width).double(), torch.randn(1, 1, 64, width).double()
        chosen = Channels(kept, width, 32).choose(query.square(), key)[0, 0, 0].tolist()

        def error(channels, query=query[0, 0], key=key[0, 0]):
            left = [j for j in range(width) if j not in channels]
            return float((query[:, left] @ key[:, left].T).square().sum())

        best = min(error(subset) for subset in itertools.combinations(range(width), kept))
        worst = max(worst, error(chosen) / best)
    assert worst <= 1.1


def test_chosen_channels_lose_less_than_random_ones():
    """On queries and keys whose channels matter unequally; a fresh choice for every row and head."""
    query, key, _ = draw(80, batch=20)
    asked = query.unflatten(1, (HEADS, GROUP)).square().mean(2)
    channels = Channels(D // 2, D, 80)
    chosen = channels.choose(asked, key)
    random = torch.rand(20, HEADS, 1, D).argsort(-1)[..., : D // 2].sort(-1).values.to(torch.int16)

    def error(choice):
        rows, grouped = channels.keys(key, 0, choice), query.unflatten(1, (HEADS, GROUP)).flatten(2, 3)
        return (grouped @ key.transpose(2, 3) - channels.scores(grouped, rows, choice)).square().sum()

    assert 2 * error(chosen) < error(random)


def test_a_short_prompt_is_asked_when_the_window_is_left(decoder):
    method = Think(drop=0.5, window=30, observed=8)
    query, key, value = draw(40)
    layer = method.layer(decoder.config, 0)
    for start, stop in [(0, 12), *((i, i + 1) for i in range(12, 40))]:
        layer.update(key[:, :, start:stop], value[:, :, start:stop])
        layer.attend(query[:, :, start:stop], None, run)
        assert len(layer.asked) == (8 if stop <= 30 else 0) and len(layer.chosen) == (stop > 30)
    expected = torch.stack([reference(query[:, :, :12], key[:, :, :31], method)], 2)
    assert torch.equal(layer.chosen.rows.long(), expected)


def test_dropping_nothing_writes_the_same_tokens(decoder):
    prompt = torch.randint(2, 320, (2, 40))
    settings = {"max_new_tokens": 30, "do_sample": False}
    plain = decoder.generate(prompt, **settings)
    with bind(decoder, cache=Think(drop=0.0, window=8)):
        assert torch.equal(decoder.generate(prompt, **settings), plain)
        one = decoder.generate(prompt[:1], prompt_lookup_num_tokens=4, **settings)
    assert torch.equal(one, plain[:1])
    with bind(decoder, cache=Think(drop=0.8, window=8)):
        assert not torch.equal(decoder.generate(prompt, **settings), plain)
