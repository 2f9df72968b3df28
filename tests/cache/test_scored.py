"""The plan of rows against a simulation, attention weights against loops, the layer against dense attention over what it kept."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from helpers.cache import positions, random_rows, run, see
from smelt.cache import _scored
from smelt.cache._scored import Plan, ScoredLayer, best, mass, weights
from smelt.cache.expected_attention import ExpectedAttention
from smelt.cache.h2o import H2O
from smelt.cache.snapkv import SnapKV
from smelt.model._tiny import tiny
from smelt.runtime import bind, new_cache
from smelt.spec import SmeltError

HEADS, GROUP, WIDTH = 2, 3, 8
CONFIG = tiny("llama", hidden=HEADS * GROUP * WIDTH, heads=HEADS * GROUP, kv_heads=HEADS).config
draw = partial(random_rows, HEADS, GROUP, WIDTH)


@pytest.mark.parametrize("slack", [0, 1, 6])
@pytest.mark.parametrize("prompt", [1, 7, 11, 12, 40])
def test_the_number_of_rows_is_the_rule_step_by_step(prompt, slack):
    plan = Plan(first=2, last=3, best=6, slack=slack, remember=4)
    rows = min(prompt, 11)
    for written in range(60):
        assert plan.rows(prompt, written) == rows
        rows += 1
        if rows > 11 + slack:
            rows = 11


@pytest.mark.parametrize("t", [1, 5, 9])
def test_weights_are_the_softmax_of_every_query_over_what_it_sees(t):
    n, scale = 9, 0.3
    query, key, _ = draw(n)
    found = weights(query[:, :, n - t :], key, scale)
    assert found.shape == (2, HEADS, GROUP, t, n)
    for b in range(2):
        for head in range(HEADS * GROUP):
            for i in range(t):
                own = n - t + i
                scores = [float(query[b, head, own].double() @ key[b, head // GROUP, j].double()) * scale for j in range(own + 1)]
                expected = torch.tensor(scores, dtype=torch.double).softmax(0).float()
                row = found[b, head // GROUP, head % GROUP, i]
                torch.testing.assert_close(row[: own + 1], expected, atol=1e-6, rtol=1e-5)
                assert not row[own + 1 :].any()


def test_mass_is_the_sum_of_the_weights_whatever_the_pieces(monkeypatch):
    query, key, _ = draw(50)
    whole = weights(query[:, :, 20:], key, 0.5).sum(3).mean(2)
    sizes = []

    def watched(*given):
        found = weights(*given)
        sizes.append(found.numel())
        return found

    for most in (1 << 22, 5000, 1):
        sizes.clear()
        monkeypatch.setattr(_scored, "AT_ONCE", most)
        monkeypatch.setattr(_scored, "weights", watched)
        torch.testing.assert_close(mass(query[:, :, 20:], key, 0.5), whole, atol=1e-5, rtol=1e-5)
        assert max(sizes) <= max(most, 2 * HEADS * GROUP * 50)  # one query at least
    torch.testing.assert_close(whole.sum(-1), torch.full((2, HEADS), 30.0))  # each query gives one


def test_the_best_stay_between_the_first_and_the_last():
    score = torch.randn(3, 2, 30)
    for first, last, count in [(0, 1, 5), (4, 0, 5), (2, 3, 1), (3, 6, 20)]:
        index = best(score, Plan(first, last, count, 0, None))
        for b in range(3):
            for h in range(2):
                middle = sorted(range(first, 30 - last), key=lambda j: -float(score[b, h, j]))[:count]
                assert index[b, h].tolist() == sorted([*range(first), *middle, *range(30 - last, 30)])


@pytest.mark.parametrize(
    "method",
    [
        SnapKV(budget=9, window=4, kernel=3, slack=0),
        SnapKV.example(),
        H2O(heavy=6, recent=5, slack=0),
        H2O.example(),
        ExpectedAttention(budget=12, sinks=1, recent=3, slack=0),
        ExpectedAttention.example(),
    ],
    ids=repr,
)
def test_every_call_is_dense_attention_under_the_mask_of_what_was_kept(method):
    """Also with chunks; the number of rows is the plan's, the rows are those of the keys and values that came in."""
    sizes = [40, *[1] * 25, 30, *[1] * 9, 2]
    query, key, value = draw(sum(sizes))
    layer, start, dropped = method.layer(CONFIG, 0), 0, 0
    assert isinstance(layer, ScoredLayer)
    mask = torch.zeros(2, HEADS, sum(sizes), sum(sizes), dtype=torch.bool)
    outputs = []
    for size in sizes:
        stop = start + size
        if start:
            held = torch.zeros(2, HEADS, sum(sizes), dtype=torch.bool).scatter(2, positions(layer, key), True)
            mask[:, :, start:stop] = held[:, :, None]
            dropped += int((~held[:, :, :start]).sum())
        mask[:, :, start:stop, start:stop] = torch.ones(size, size, dtype=torch.bool).tril()
        outputs.append(see(layer, query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]))
        start = stop
        rows = layer.plan.limit + (layer.plan.slack if size == 1 else 0)
        assert len(layer.key_rows) <= rows and (size == 1 or len(layer.key_rows) == layer.plan.limit)
        at = positions(layer, key)
        assert torch.equal(layer.value_rows.rows, value.gather(2, at[..., None].expand(-1, -1, -1, WIDTH)))
        assert (at.diff() > 0).all()  # in order
    dense = run(query, key, value, mask.repeat_interleave(GROUP, 1))
    torch.testing.assert_close(torch.cat(outputs, 1), dense, atol=1e-6, rtol=1e-5)
    assert dropped and len({tuple(row) for row in positions(layer, key).flatten(0, 1).tolist()}) > 1  # rows differ by head


def test_tokens_are_not_taken_back():
    layer = H2O.example().layer(CONFIG, 0)
    see(layer, *draw(5))
    layer.crop(0)
    with pytest.raises(SmeltError, match="cannot go back"):
        layer.crop(-1)


def test_the_scale_is_the_models(monkeypatch):
    """What transformers hands to its attention function, not a guess from the configuration."""
    model, found = tiny("llama"), []
    for number, block in enumerate(model.model.layers):
        block.self_attn.scaling = 0.3 + number
    plain = ScoredLayer._take
    monkeypatch.setattr(ScoredLayer, "_take", lambda self, query, scale: found.append(scale) or plain(self, query, scale))
    with bind(model, cache=H2O.example()):
        model(torch.arange(3, 9)[None], past_key_values=new_cache(model, H2O.example()))
    assert found == [0.3, 1.3]
