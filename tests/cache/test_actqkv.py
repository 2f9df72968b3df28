"""ActQKV against loops over windows, heads and tokens in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from helpers.cache import feed, random_rows, run
from smelt.cache import actqkv
from smelt.cache.actqkv import ActQKV, density, probe
from smelt.model._rotary import Rotary
from smelt.model._tiny import tiny
from smelt.runtime import bind, new_cache
from smelt.spec import SmeltError

HEADS, GROUP, WIDTH = 2, 2, 16
CONFIG = tiny("llama").config
SMALL = ActQKV(budget=3, block=4, local=6, window=16, least=2, coverage=1.0)
draw = partial(random_rows, HEADS, GROUP, WIDTH, batch=1)


def biases(queries: list[list[float]]) -> list[float]:
    """phi of each query, as the formula says it."""
    count, width = len(queries), len(queries[0])
    mean = [sum(q[c] for q in queries) / count for c in range(width)]
    variance = [sum((q[c] - mean[c]) ** 2 for q in queries) / count for c in range(width)]
    return [sum((q[c] - mean[c]) ** 2 / variance[c] for c in range(width) if variance[c] > 0) for q in queries]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(numbers):
    top = max(numbers)
    parts = [math.exp(x - top) for x in numbers]
    return [x / sum(parts) for x in parts]


def reference(rows, sizes, method: ActQKV):
    """Dense attention in float64 under a mask that loops make, one window after another."""
    query, key, value = (part[0].double() for part in rows)
    n, turn = key.shape[1], Rotary(CONFIG).turn
    bare = turn(rows[0], torch.arange(n), back=True)[0].double()
    seen = torch.zeros(HEADS * GROUP, n, n, dtype=torch.bool)
    start = 0
    for size in sizes:
        low, end = start, start + size
        while low < end:
            high = min(end, (low // method.window + 1) * method.window)
            past = max(0, low - method.local) // method.block
            near = past * method.block if past > method.budget else 0
            for h in range(HEADS):
                chosen: list[int] = []
                if near:
                    pi = [0.0] * past
                    for g in range(h * GROUP, (h + 1) * GROUP):
                        phi = biases(bare[g, low:high].tolist())
                        weight = [x / sum(phi) for x in phi] if sum(phi) else [1 / len(phi)] * len(phi)
                        asked = sum(w * q for w, q in zip(weight, bare[g, low:high], strict=True))
                        asked = turn(asked[None, None, None], torch.tensor([(low + high - 1) / 2]))[0, 0, 0]
                        means = [key[h, b * method.block : (b + 1) * method.block].mean(0) for b in range(past)]
                        scores = softmax([dot(asked.tolist(), m.tolist()) / WIDTH**0.5 for m in means])
                        pi = [p + s / GROUP for p, s in zip(pi, scores, strict=True)]
                    chosen = [0, *sorted(range(1, past), key=lambda b: -pi[b])]
                    if size > 1:
                        chosen = chosen[: method.budget]
                    else:
                        total, kept = 0.0, []
                        for b in chosen[: method.budget]:
                            if total < method.coverage or method.coverage == 1:
                                kept.append(b)
                            total += pi[b]
                        chosen = kept
                for t in range(low, high):
                    columns = [*range(near, t + 1), *(i for b in chosen for i in range(b * method.block, (b + 1) * method.block))]
                    for g in range(h * GROUP, (h + 1) * GROUP):
                        seen[g, t, columns] = True
            low = high
        start = end
    return run(query[None], key[None], value[None], seen[None])


@pytest.mark.parametrize("method", [SMALL, ActQKV(budget=4, block=4, local=5, window=8, least=1, coverage=0.3)])
@pytest.mark.parametrize("sizes", [[75], [20, 1, 1, 30, *[1] * 20], [1] * 40])
def test_equals_the_reference(sizes, method):
    rows = draw(sum(sizes))
    found = feed(method.layer(CONFIG, 0), rows, sizes)
    torch.testing.assert_close(found, reference(rows, sizes, method).float(), atol=1e-5, rtol=1e-4)


def test_windows_may_come_one_by_one():
    rows = draw(100, batch=2)
    whole = feed(SMALL.layer(CONFIG, 0), rows, [100])
    for sizes in ([16] * 6 + [4], [32, 16, 48, 4]):
        torch.testing.assert_close(feed(SMALL.layer(CONFIG, 0), rows, sizes), whole, atol=1e-6, rtol=1e-5)


def test_a_piece_of_one_token_at_the_end_of_a_call_is_no_step_of_decoding():
    rows = draw(81)
    for layer in (layers := new_cache(tiny("llama"), SMALL).layers):
        layer.peers = layers
    for layer in layers:
        feed(layer, rows, [81])
        assert layer.spent is None


def test_the_probe_is_the_mean_weighted_by_the_bias():
    query = torch.randn(1, 1, 7, 5)
    phi = biases(query[0, 0].double().tolist())
    expected = sum(w / sum(phi) * q for w, q in zip(phi, query[0, 0].double(), strict=True))
    torch.testing.assert_close(probe(query)[0, 0, 0], expected.float())
    assert sum(phi) == pytest.approx(7 * 5)  # every channel gives each window as much as it has tokens


@pytest.mark.parametrize("tokens", [1, 6])
def test_equal_queries_weigh_alike(tokens):
    query = torch.randn(2, 3, 1, 8).expand(-1, -1, tokens, -1)
    torch.testing.assert_close(probe(query), query[:, :, :1])
    query = query + 1e-7 * torch.randn(2, 3, tokens, 8)  # what rotary angles leave of them
    torch.testing.assert_close(probe(query), query[:, :, :1])


def test_a_channel_that_does_not_vary_counts_nothing():
    query = torch.randn(1, 1, 9, 4)
    still = torch.cat([query, torch.full((1, 1, 9, 2), 3.0)], 3)
    torch.testing.assert_close(probe(still)[..., :4], probe(query))


def test_a_planted_block_is_found_by_the_probe_and_not_by_the_mean(monkeypatch):
    """15 tokens ask for what is in blocks 2 and 3, one for block 5; its queries are not the mean's."""
    method = ActQKV(budget=2, block=4, local=4, window=16, least=1)
    turn = Rotary(CONFIG).turn
    usual, odd = torch.zeros(WIDTH), torch.zeros(WIDTH)
    slow = WIDTH // 2 - 1  # a channel whose angle hardly moves within the text
    usual[slow], odd[slow - 1] = 4.0, 4.0
    bare = usual.repeat(HEADS * GROUP, 16, 1)
    bare[:, 5] = odd
    query = turn(bare[None], torch.arange(48, 64))
    key, value = 0.01 * torch.randn(1, HEADS, 64, WIDTH), torch.randn(1, HEADS, 64, WIDTH)
    key[:, :, 8:16] += usual
    key[:, :, 20:24] += odd
    key = turn(key, torch.arange(64))
    layer = method.layer(CONFIG, 0)
    layer.update(key[:, :, :48], value[:, :, :48])
    layer.attend(torch.randn(1, HEADS * GROUP, 48, WIDTH), None, run)
    found, open_ = layer.retrieve(query, 48, 11, False)
    assert found.tolist() == [[[0, 5]] * HEADS] and open_.all()
    monkeypatch.setattr(actqkv, "probe", lambda q: q.mean(2, keepdim=True))
    assert not (layer.retrieve(query, 48, 11, False)[0] == 5).any()


def test_density_is_one_for_equal_shares_and_one_in_n_for_one_alone():
    torch.testing.assert_close(density(torch.full((3, 8), 1 / 8)), torch.ones(3))
    torch.testing.assert_close(density(torch.eye(8)[:2]), torch.full((2,), 1 / 8))


@pytest.mark.parametrize("layers", [1, 3, 6])
def test_the_layers_of_a_step_share_the_budget_exactly(layers):
    method = ActQKV(budget=7, block=4, local=4, window=16, least=2)
    made = [method.layer(CONFIG, i) for i in range(layers)]
    for layer in made:
        layer.peers, layer.seen = made, 1000
    rho = torch.rand(layers, 5) ** 3 + 0.01  # five rows of a batch
    counts = torch.stack([layer._share(rho[i], 1000) for i, layer in enumerate(made)])
    assert counts.sum(0).tolist() == [7 * layers] * 5
    assert counts.min() >= 2 and (layers == 1 or len(set(counts.flatten().tolist())) > 2)
    assert all(layer.spent is None for layer in made)
    equal = torch.stack([layer._share(torch.full((5,), 0.3), 1000) for layer in made])
    assert (equal == 7).all()
    capped = torch.stack([layer._share(rho[i], 8) for i, layer in enumerate(made)])
    assert capped.max() <= 8


def test_layers_out_of_turn_are_refused():
    made = [SMALL.layer(CONFIG, i) for i in range(2)]
    for layer in made:
        layer.peers, layer.seen = made, 50
    with pytest.raises(SmeltError, match="out of turn"):
        made[1]._share(torch.ones(1), 20)


def test_reads_are_bounded_and_the_block_at_the_front_and_the_new_tokens_are_among_them():
    method = ActQKV(budget=4, block=8, local=20, window=32, least=1)
    rows, widest = draw(400), {True: 0, False: 0}

    def counted(query, key, value, mask):
        widest[query.shape[2] == 1] = max(widest[query.shape[2] == 1], key.shape[2])
        return run(query, key, value, mask)

    feed(method.layer(CONFIG, 0), rows, [300, *[1] * 100], counted)
    assert widest[False] <= 4 * 8 + 20 + 7 + 32 and widest[True] <= 4 * 8 + 20 + 7 + 1


def test_a_cache_whose_layers_know_each_other_writes_and_starts_again():
    model = tiny("llama", eos_token_id=None, bos_token_id=None, pad_token_id=None)
    prompt = torch.randint(2, 320, (2, 70))
    with bind(model, cache=SMALL):
        cache = new_cache(model, SMALL)
        for layer in cache.layers:
            layer.peers = cache.layers
        first = model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False)
        cache.reset()
        assert torch.equal(model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False), first)


def test_what_does_not_fit_is_refused():
    with pytest.raises(SmeltError, match="least=9"):
        ActQKV(budget=8, least=9)
    with pytest.raises(SmeltError, match="cannot be taken back"):
        SMALL.layer(CONFIG, 0).crop(-1)
