"""SnapKV against a choice made with loops in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from helpers.cache import positions, random_rows, see
from smelt.cache.snapkv import SnapKV
from smelt.model._tiny import tiny
from smelt.runtime import bind, cache_bytes
from smelt.spec import SmeltError

HEADS, GROUP, WIDTH = 2, 2, 8
CONFIG = tiny("llama", hidden=HEADS * GROUP * WIDTH, heads=HEADS * GROUP, kv_heads=HEADS).config
draw = partial(random_rows, HEADS, GROUP, WIDTH)


def chosen(method, query, key, b, h, held, seen):
    """Of the positions `held` (the newest last), those that stay after the token seen - 1, and the score of each."""
    votes = torch.zeros(len(held), dtype=torch.double)
    for i in range(seen - method.window, seen):
        for g in range(GROUP):
            visible = [j for j, p in enumerate(held) if p <= i]
            scores = torch.stack([query[b, h * GROUP + g, i].double() @ key[b, h, held[j]].double() for j in visible]) * WIDTH**-0.5
            votes[visible] += scores.softmax(0) / (method.window * GROUP)
    prefix, reach = len(held) - method.window, method.kernel // 2
    pooled = []
    for j in range(prefix):
        around = votes[max(0, j - reach) : min(prefix, j + reach + 1)]
        pooled.append(float(around.max()) if method.pool == "max" else float(around.sum()) / method.kernel)
    best = sorted(range(prefix), key=lambda j: -pooled[j])[: method.budget]
    return [held[j] for j in sorted(best)] + held[prefix:], dict(zip(held[:prefix], pooled, strict=True))


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("kernel", [1, 5])
def test_what_stays_is_what_loops_choose_after_the_prompt_and_while_writing(pool, kernel):
    method = SnapKV(budget=7, window=4, kernel=kernel, pool=pool, slack=3)
    prompt, total = 33, 33 + 10
    query, key, value = draw(total)
    layer = method.layer(CONFIG, 0)
    held = {(b, h): list(range(prompt)) for b in range(2) for h in range(HEADS)}
    see(layer, query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt])
    cuts = 0
    for seen in range(prompt, total + 1):
        if seen > prompt:
            for rows in held.values():
                rows.append(seen - 1)
            see(layer, query[:, :, seen - 1 : seen], key[:, :, seen - 1 : seen], value[:, :, seen - 1 : seen])
        cut = seen == prompt or len(held[0, 0]) > 11 + 3
        cuts += cut
        found = positions(layer, key).tolist()
        for (b, h), rows in held.items():
            if cut:
                expected, score = chosen(method, query, key, b, h, rows, seen)
                stayed = found[b][h]
                assert stayed[-4:] == expected[-4:] and len(stayed) == len(set(stayed)) == 11
                if pool == "mean" or kernel == 1:
                    assert stayed == expected
                else:  # a maximum over neighbours makes ties, and any of the equals may stay
                    assert sorted(score[p] for p in stayed[:-4]) == sorted(score[p] for p in expected[:-4])
                rows[:] = stayed
            assert found[b][h] == rows, (seen, b, h)
    assert cuts == 3


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_a_planted_key_stays_with_its_neighbours(pool):
    query, key, value = draw(80, batch=1)
    wanted = torch.zeros(WIDTH)
    wanted[0] = 6.0
    query[:, :, -8:] = query[:, :, -8:] * 0.1 + wanted  # what the window asks for
    for h, place in enumerate((30, 51)):
        key[0, h, place] = wanted
    layer = SnapKV(budget=5, window=8, kernel=5, pool=pool).layer(CONFIG, 0)
    see(layer, query, key, value)
    for h, place in enumerate((30, 51)):
        assert positions(layer, key)[0, h].tolist() == [*range(place - 2, place + 3), *range(72, 80)]


def test_the_query_heads_of_a_group_share_the_rows():
    """Each of the two query heads asks for another key; both stay."""
    query, key, value = torch.zeros(1, 4, 40, WIDTH), torch.zeros(1, 2, 40, WIDTH), torch.randn(1, 2, 40, WIDTH)
    for head in range(4):
        query[0, head, :, head] = 9.0
        key[0, head // GROUP, 10 + head, head] = 9.0
    layer = SnapKV(budget=2, window=3, kernel=1).layer(CONFIG, 0)
    see(layer, query, key, value)
    for h in range(HEADS):
        places = [10 + 2 * h, 11 + 2 * h]
        assert torch.equal(layer.value_rows.rows[0, h, :2], value[0, h, places])


def test_it_holds_its_budget_while_it_writes():
    decoder = tiny("llama", eos_token_id=None, bos_token_id=None, pad_token_id=None)
    method = SnapKV(budget=20, window=4, slack=8)
    with bind(decoder, cache=method):
        for prompt in (10, 24, 25, 150):
            out = decoder.generate(torch.randint(2, 320, (2, prompt)), max_new_tokens=40, return_dict_in_generate=True)
            rows = method.plan.rows(prompt, 39)
            assert {len(layer.key_rows) for layer in out.past_key_values.layers} == {rows} and 24 <= rows <= 32
            assert cache_bytes(out.past_key_values) == method.bytes_held(decoder.config, prompt, 39, batch=2)


def test_an_even_kernel_is_refused():
    with pytest.raises(SmeltError, match=r"kernel=4 is even.*5 has one"):
        SnapKV(kernel=4)
