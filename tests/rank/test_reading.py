"""The helper smelt/rank/_reading.py."""

from __future__ import annotations

import pytest
import torch

from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank._reading import batches, last_logits, needs_decoder, room
from smelt.spec import SmeltError


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma"])
def test_the_last_logits_of_a_batch_are_those_of_each_row_alone(architecture):
    model = Loaded(tiny(architecture, context=256), tiny_tokenizer(), None)
    rows = [torch.randint(2, 300, (n,)).tolist() for n in (1, 40, 7, 40, 23)]
    for budget in (1, 90, 10_000):
        found = last_logits(model, rows, budget)
        for row, logits in zip(rows, found, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(logits, model.model(torch.tensor([row])).logits[0, -1], atol=1e-5, rtol=1e-4)


def test_batches_hold_every_row_once_and_no_more_than_the_budget():
    lengths = [5, 1, 9, 9, 2, 30, 7]
    found = list(batches(lengths, 20))
    assert sorted(r for batch in found for r in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[r] for r in batch) <= 20 for batch in found)
    assert found[0] == [5] and list(batches([])) == []


def test_what_is_no_decoder_is_refused_by_name():
    with pytest.raises(SmeltError, match="x needs a decoder as its model and was given BertModel"):
        needs_decoder(Loaded(tiny("bert"), tiny_tokenizer(), None), "x")
    with pytest.raises(SmeltError, match="was given none"):
        needs_decoder(None, "x")
    assert room(Loaded(tiny("llama", context=77), None, None)) == 77
