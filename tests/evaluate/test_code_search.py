from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from smelt.data import _code_search as task
from smelt.evaluate.code_search import CodeSearch
from smelt.rank import Answer, Judge
from smelt.spec import SmeltError

SMALL = CodeSearch(queries=4, passages=3, length=24)


def slow(variant, query, first):
    """Orders one query's candidates with one call for each passage, summing token by token."""
    tokenizer, every, scores = variant.tokenizer, task.functions(), []
    for i in first:
        passage = [tokenizer.bos_token_id, *tokenizer(every[i].passage)["input_ids"]][: SMALL.length]
        asked = tokenizer('\n    """' + every[query].query)["input_ids"]
        with torch.no_grad():
            found = variant.model(input_ids=torch.tensor([passage + asked])).logits[0].double().log_softmax(-1)
        scores.append(sum(float(found[len(passage) + at - 1, token]) for at, token in enumerate(asked)))
    return [first[i] for i in np.argsort(-np.array(scores), kind="stable")]


def test_ranks_by_the_likelihood_of_the_query_after_the_passage(variant):
    found = {m.name: m for m in SMALL(variant)}
    first = {q: task.candidates(q, SMALL.passages) for q in task.held_out(SMALL.queries)}
    assert list(found["code_search_ndcg10"].samples) == task.ndcg({q: slow(variant, q, c) for q, c in first.items()})
    assert list(found["code_search_bm25"].samples) == task.ndcg(first)
    assert SMALL._by_likelihood(variant, first) == {q: slow(variant, q, c) for q, c in first.items()}
    inside = [float(q in c) for q, c in first.items()]
    assert list(found["code_search_oracle"].samples) == inside
    assert list(found["code_search_random"].samples) == pytest.approx([x * task.by_chance(SMALL.passages) for x in inside])
    for metric in found.values():
        assert metric.value == pytest.approx(np.mean(metric.samples)) and set(metric.weights) == {1.0}


def test_a_rank_method_is_used_and_checked(variant):
    every = task.functions()
    texts = {f.query: f.passage for f in every}
    seen = []

    class Perfect(Judge):
        def answers(self, asked, loaded):
            seen.extend((loaded.model, loaded.tokenizer, loaded.folder) for _ in asked)
            return [Answer(sorted(range(len(a.passages)), key=lambda i: a.passages[i] != texts[a.query]), None) for a in asked]

    class Lies(Judge):
        def answers(self, asked, loaded):
            return [Answer([0] * len(a.passages), None) for a in asked]

    variant.rank, variant.folder = Perfect(), Path("x")
    found = {m.name: m for m in CodeSearch(queries=30, passages=10)(variant)}
    assert found["code_search_ndcg10"].samples == found["code_search_oracle"].samples
    assert found["code_search_ndcg10"].value > found["code_search_bm25"].value
    assert seen[0] == (variant.model, variant.tokenizer, Path("x")) and len(seen) == 30
    variant.rank = Lies()
    with pytest.raises(SmeltError, match="is not an order of"):
        SMALL(variant)
