from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from smelt.data import _code_search as task
from smelt.evaluate import reader
from smelt.evaluate.reader import Question, Reader, best
from smelt.rank.bm25 import BM25
from smelt.spec import SmeltError

SMALL = Reader.example()


def slow(lines, query, length):
    """Bits of the first `length` tokens of a function after its lines, one forward."""
    loaded, every = reader._read("embedded"), task.functions()
    ids = [i for i in (loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id) if i is not None][:1]
    for text in (*[line + "\n" for line in lines], f"# {every[query].query}\n"):
        ids += loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    after = loaded.tokenizer(every[query].passage, add_special_tokens=False)["input_ids"][:length]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([ids + after])).logits[0].double().log_softmax(-1)
    return -sum(float(logits[len(ids) + at - 1, token]) for at, token in enumerate(after)) / math.log(2), loaded.tokenizer.decode(after)


def test_gains_are_those_of_one_forward_after_the_other(variant):
    variant.rank = BM25()
    found = {m.name: m for m in replace(SMALL, share=0.3)(variant)}
    for at, query in enumerate(task.held_out(SMALL.queries)):
        some = [i for i in task.candidates(query, SMALL.passages + 1) if i != query][: SMALL.passages]
        lines = reader._prepared("embedded", SMALL.queries, SMALL.passages, SMALL.length, 0.3, 8)[0][at].lines
        assert lines == [line for i in some for line in task.functions()[i].passage.split("\n") if line in lines]
        none, text = slow([], query, SMALL.length)
        full, _ = slow(lines, query, SMALL.length)
        assert found["reader_gain_all"].samples[at] == pytest.approx(none - full, abs=1e-3)
        assert found["reader_gain"].weights[at] == len(text.encode())
    assert found["reader_gain"].samples not in (found["reader_gain_all"].samples, found["reader_gain_random"].samples)
    assert 0 < found["reader_share"].value <= 0.3


def test_a_judge_that_may_keep_all_gains_what_all_gains(variant):
    for rank in (None, BM25()):
        variant.rank = rank
        found = {m.name: m for m in replace(SMALL, share=1.0)(variant)}
        assert found["reader_gain"].samples == found["reader_gain_all"].samples == found["reader_gain_random"].samples
        assert found["reader_share"].value == 1.0


def test_the_best_lines_that_fit_stand_in_their_order():
    one = Question("q", ["a", "b", "c", "d"], [[1], [2, 2, 2], [3], [4, 4]], [0], [0], 1)
    assert best(one, [1, 2, 3, 0], 3 / 7) == [[2, 2, 2]]
    assert best(one, [3, 1, 0, 2], 3 / 7) == [[1], [4, 4]]  # the second has no room, the third has
    assert best(one, [0, 1, 2, 3], 0.1) == [] and best(one, [2, 0, 3, 1], 1.0) == one.ids


def test_the_function_itself_is_not_retrieved():
    for one, query in zip(reader._prepared("embedded", 30, 3, 16, 0.1, 8)[0], task.held_out(30), strict=True):
        assert task.functions()[query].passage.split("\n") != one.lines
        assert np.sum([len(row) for row in one.ids]) <= 3 * reader.CUT


def test_texts_that_do_not_fit_the_reader_are_said(variant):
    with pytest.raises(SmeltError, match="of the 2048 positions the reader has; take fewer passages"):
        replace(SMALL, passages=30)(variant)
