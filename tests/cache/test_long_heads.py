"""LongHeads against loops over heads, tokens and chunks in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from helpers.cache import feed, random_rows
from smelt.cache import _blocks
from smelt.cache.long_heads import LongHeads
from smelt.model._rotary import Rotary
from smelt.model._tiny import tiny
from smelt.runtime import bind
from smelt.spec import SmeltError

HEADS, GROUP, WIDTH = 2, 2, 16
CONFIG = tiny("llama").config
SMALL = LongHeads(size=4, chunks=5)
draw = partial(random_rows, HEADS, GROUP, WIDTH, batch=1)


def turned(x, positions, back=False):
    """x [n, d] in float64, pair by pair: the formula of rotary angles."""
    half, out = WIDTH // 2, x.clone()
    sign = -1 if back else 1
    for j in range(half):
        angle = sign * torch.as_tensor(positions).double() * CONFIG.rope_parameters["rope_theta"] ** (-2 * j / WIDTH)
        out[:, j] = x[:, j] * angle.cos() - x[:, j + half] * angle.sin()
        out[:, j + half] = x[:, j + half] * angle.cos() + x[:, j] * angle.sin()
    return out


def attention(query, key, value):
    return (query @ key.T / WIDTH**0.5).softmax(-1) @ value


def reference(rows, w: int, k: int):
    """Token by token: outputs [1, n, hq, d] and the chunks of every token and head."""
    query, key, value = (part[0].double() for part in rows)
    n, at = key.shape[1], torch.arange(key.shape[1])
    output, chosen = torch.zeros(n, HEADS * GROUP, WIDTH, dtype=torch.double), {}
    for head in range(HEADS * GROUP):
        q, bare, v = turned(query[head], at, True), turned(key[head // GROUP], at, True), value[head // GROUP]
        vectors = []
        for first in range(0, n - w + 1, w):
            rows_ = slice(first, first + w)
            inside = attention(turned(q[rows_], range(w)), turned(bare[rows_], range(w)), v[rows_])
            vectors.append(attention(inside.mean(0, keepdim=True), bare[rows_], bare[rows_])[0])
        for t in range(n):
            c = t // w
            picks = list(range(c + 1))
            if t >= k * w:
                others = sorted(range(1, c - 1), key=lambda i: -float(q[t] @ vectors[i]))
                picks = sorted([0, *others[: k - 3], c - 1, c])
            columns = [i for p in picks for i in range(p * w, p * w + w) if i <= t]
            place = columns.index(t)  # positions are 0, 1, 2, ... without a gap
            assert place <= k * w - 1 and place == (t if t < k * w else (k - 1) * w + t % w)
            keys = turned(bare[columns], range(len(columns)))
            output[t, head] = attention(turned(q[t][None], [place]), keys, v[columns])[0]
            chosen[t, head] = picks
    return output[None], chosen


@pytest.mark.parametrize("method", [SMALL, LongHeads(size=5, chunks=3), LongHeads(size=1, chunks=4)])
@pytest.mark.parametrize("sizes", [[61], [1] * 45, [7, 1, 1, 30, 1, 22], [20, 20]])
def test_equals_the_reference(sizes, method):
    rows = draw(sum(sizes))
    expected, _ = reference(rows, method.size, method.chunks)
    torch.testing.assert_close(feed(method.layer(CONFIG, 0), rows, sizes), expected.float(), atol=2e-5, rtol=1e-4)


def test_the_first_and_the_two_newest_chunks_are_read_and_the_rest_are_the_best_in_order():
    rows = draw(80)
    layer = SMALL.layer(CONFIG, 0)
    feed(layer, rows, [80])
    _, chosen = reference(rows, 4, 5)
    for t in range(20, 80):
        bare = Rotary(CONFIG).turn(rows[0][:, :, t : t + 1], torch.tensor([t]), back=True)
        found = layer.select(bare, t // 4)[0, :, 0].tolist()
        for head, picks in enumerate(found):
            assert chosen[t, head] == [0, *picks, t // 4 - 1, t // 4]


def test_up_to_the_length_of_all_chunks_it_is_plain_attention():
    model = tiny("llama")
    ids = torch.randint(2, 320, (2, 60))
    with torch.no_grad():
        plain = model(ids).logits
        for method, same in ((LongHeads(size=4, chunks=15), True), (LongHeads(size=4, chunks=14), False)):
            with bind(model, cache=method):
                logits = model(ids).logits
            near = torch.allclose(logits, plain, atol=1e-4)
            assert near == same and torch.allclose(logits[:, :56], plain[:, :56], atol=1e-4)


def test_a_planted_chunk_is_chosen_by_the_head_it_was_planted_in():
    """Chunk 6 holds keys that equal the last query of head 2, which reads them; the other head of its group has another query."""
    query, key, value = draw(100)
    turn, at = Rotary(CONFIG).turn, torch.arange(100)
    wanted = torch.randn(WIDTH) * 3
    bare = turn(key, at, back=True)
    bare[:, 1, 24:28] = wanted
    key = turn(bare, at)
    asked = turn(query, at, back=True)
    asked[:, 2, 99], asked[:, 3, 99] = wanted, -wanted
    layer = SMALL.layer(CONFIG, 0)
    feed(layer, (turn(asked, at), key, value), [100])
    found = layer.select(asked[:, :, 99:], 24)[0, :, 0]
    assert 6 in found[2].tolist() and 6 not in found[3].tolist()


def test_decoding_reads_a_fixed_number_of_rows_however_long_the_text(monkeypatch):
    read = []
    plain = _blocks.picked
    monkeypatch.setattr(_blocks, "picked", lambda *a: read.append(plain(*a)) or read[-1])
    layer = SMALL.layer(CONFIG, 0)
    rows = draw(300)
    feed(layer, rows, [100])

    def whole(*rows):
        pytest.fail("the whole cache was read")

    whole.scaling = WIDTH**-0.5
    for stop in (101, 300):
        read.clear()
        for t in range(layer.seen, stop):
            layer.update(*(part[:, :, t : t + 1] for part in rows[1:]))
            layer.attend(rows[0][:, :, t : t + 1], None, whole)
        assert {tuple(part.shape) for part in read} == {(1, HEADS * GROUP, 2 * 4, WIDTH)}


def test_without_recording_only_the_open_chunk_can_be_taken_back():
    layer = SMALL.layer(CONFIG, 0)
    rows = draw(43)
    feed(layer, rows, [43])
    layer.crop(-3)
    assert layer.get_seq_length() == 40
    with pytest.raises(SmeltError, match="activate_past_recording"):
        layer.crop(-1)


def test_models_whose_keys_cannot_be_turned_back_are_refused():
    config = tiny("llama").config
    config.model_type = "gpt2"
    with pytest.raises(SmeltError, match="gpt2"):
        SMALL.layer(config, 0)
