"""Growing storage against plain concatenation."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from smelt.cache._layers import GrowingLayer, Grown, capacity
from smelt.spec import SmeltError


def test_capacity_is_at_most_an_eighth_more_and_never_falls():
    for rows in range(5000):
        assert rows <= capacity(rows) <= rows * 9 / 8
        assert capacity(rows) <= capacity(rows + 1)
        assert capacity(capacity(rows)) == capacity(rows)
    assert all(capacity(1 << power) == 1 << power for power in range(30))


def test_appending_one_by_one_moves_the_storage_a_few_times_only():
    grown, places = Grown(), set()
    for _ in range(2000):
        grown.append(torch.zeros(1, 1, 1, 4))
        assert grown.store is not None
        places.add((grown.store.data_ptr(), grown.store.shape[2]))
    assert len({size for _, size in places}) <= 16 + 8 * math.log2(2000 / 16) + 1


def test_grown_does_what_lists_of_rows_do():
    chance = random.Random(0)
    for _ in range(20):
        grown, plain = Grown(), torch.zeros(2, 3, 0, 4)
        for _ in range(40):
            action = chance.choice(["append", "append", "append", "slice", "gather", "batch"])
            n = plain.shape[2]
            if action == "append" or n == 0:
                new = torch.randn(plain.shape[0], 3, chance.choice([1, 1, 1, 5, 30]), 4)
                grown.append(new)
                plain = torch.cat([plain, new], 2)
            elif action == "slice":
                start = chance.randrange(n)
                stop = chance.randrange(start, n + 1)
                grown.slice(start, stop)
                plain = plain[:, :, start:stop]
            elif action == "gather":
                index = torch.stack([torch.stack([torch.randperm(n)[: n // 2 + 1].sort().values for _ in range(3)]) for _ in plain])
                grown.gather(index)
                plain = torch.stack([torch.stack([row[h][index[b, h]] for h in range(3)]) for b, row in enumerate(plain)])
            else:
                order = torch.randperm(plain.shape[0])
                grown.batch(lambda rows, order=order: rows[order])
                plain = plain[order]
            assert torch.equal(grown.rows, plain) and len(grown) == plain.shape[2]
            assert grown.store.shape[2] == capacity(plain.shape[2])


def test_views_handed_out_stay_as_they_were():
    grown = Grown()
    grown.append(torch.randn(1, 1, 100, 2))
    view = grown.rows
    copy = view.clone()
    grown.append(torch.randn(1, 1, 1, 2))
    grown.slice(50, 101)
    grown.gather(torch.arange(1, 51).view(1, 1, -1))
    grown.append(torch.randn(1, 1, 60, 2))
    assert torch.equal(view, copy)


def test_rows_made_under_inference_mode_grow_outside_it():
    grown = Grown()
    with torch.inference_mode():
        grown.append(torch.ones(1, 1, 17, 2))
    grown.append(torch.ones(1, 1, 1, 2))
    assert grown.rows.sum() == 36


def test_gradients_reach_every_piece():
    layer = GrowingLayer()
    pieces = [torch.randn(1, 1, n, 3, requires_grad=True) for n in (4, 1, 2)]
    loss = torch.zeros(())
    for piece in pieces:
        key, value = layer.update(piece, 2 * piece)
        loss = loss + (key * value).sum()  # 2 x^2, of every row so far
    loss.backward()
    for times, piece in zip((3, 2, 1), pieces):
        torch.testing.assert_close(piece.grad, 4 * times * piece.detach())


def test_growing_layer_does_what_dynamic_layer_does():
    chance = random.Random(1)
    mine, theirs = GrowingLayer(), DynamicLayer()
    batch = 2
    for _ in range(200):
        action = chance.choice(["update", "update", "update", "crop", "reorder", "repeat", "select", "reset"])
        if action == "update" or theirs.get_seq_length() == 0:
            new = torch.randn(batch, 2, chance.choice([1, 1, 9]), 4), torch.randn(batch, 2, 1, 4)
            new = new[0], torch.randn_like(new[0])
            assert all(torch.equal(a, b) for a, b in zip(mine.update(*new), theirs.update(*new)))
        elif action == "crop":
            n = chance.randrange(theirs.get_seq_length())
            mine.crop(-n), theirs.crop(-n)
        elif action == "reorder":
            order = torch.randint(0, batch, (batch,))
            mine.reorder_cache(order), theirs.reorder_cache(order)
        elif action == "repeat" and batch < 8:
            mine.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
            batch *= 2
        elif action == "select":
            mine.batch_select_indices(torch.arange(2)), theirs.batch_select_indices(torch.arange(2))
            batch = 2
        elif action == "reset":
            mine.reset(), theirs.reset()
            batch = 2
            continue
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert mine.get_mask_sizes(3) == theirs.get_mask_sizes(3)


def test_a_layer_that_dropped_tokens_cannot_go_back():
    layer = GrowingLayer(lambda key, value: torch.arange(1, key.shape[2]).expand(*key.shape[:2], -1))
    layer.update(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    layer.crop(0)
    with pytest.raises(SmeltError, match="dropped tokens"):
        layer.crop(-1)
