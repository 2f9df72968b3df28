from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from helpers.rank import LISTS, loaded, taught
from smelt.rank import Asked
from smelt.rank._training import read, write
from smelt.rank._vectors import hidden, pad
from smelt.rank.embedding import Embedding
from smelt.rank.mistral_splade import MistralSplade, Postings, Seen, dense, weighed
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

TEXTS = ["return x + 1", "", "import os\nfor name in os.listdir('.'): print(name)", "class A: pass", "return x + 1"]


def by_hand(judge, words, model):
    """{term: weight} of one text read alone, by loops."""
    (row,) = judge.judge.rows([words], model)
    with torch.no_grad():
        (states,) = hidden(model.model, *pad([row]), (None,), judge.judge.bidirectional)
    table, found = model.model.get_input_embeddings().weight.detach().double(), {}
    for term in range(len(table)):
        if term in model.tokenizer.all_special_ids:
            continue
        each = [math.log1p(max(0.0, float(table[term] @ states[0, t].double()))) for t in range(row.first, row.stop)]
        weight = max(each) if judge.pool == "max" else sum(each)
        if weight > 0:
            found[term] = weight
    return found


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("pool", ["max", "sum"])
@pytest.mark.parametrize("echo", [True, False])
def test_terms_are_those_of_a_loop_in_company_too(architecture, pool, echo):
    model, judge = loaded(architecture), MistralSplade(Embedding(echo=echo), pool=pool)
    for words, (terms, weights) in zip(TEXTS, judge._read(TEXTS, model, False), strict=True):
        expected = by_hand(judge, words, model)
        assert terms.tolist() == sorted(expected)
        np.testing.assert_allclose(weights, [expected[t] for t in terms.tolist()], rtol=1e-4, atol=1e-5)


def test_the_maximum_is_at_most_the_sum_and_padding_weighs_nothing():
    logits, real = torch.randn(3, 5, 7) * 3, torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    most, total = weighed(logits, real, "max"), weighed(logits, real, "sum")
    assert (most <= total + 1e-6).all() and torch.allclose(most[1], total[1], atol=1e-6)
    for b in range(3):
        for j in range(7):
            each = [math.log1p(max(0.0, float(logits[b, t, j]))) for t in range(5) if real[b, t]]
            assert float(most[b, j]) == pytest.approx(max(each), abs=1e-5) and float(total[b, j]) == pytest.approx(sum(each), abs=1e-5)


def test_the_regularisers_are_loops_and_repeated_rows_change_nothing():
    weights = torch.rand(4, 6) * (torch.rand(4, 6) > 0.5)
    flops = sum((sum(float(weights[b, j]) for b in range(4)) / 4) ** 2 for j in range(6))
    assert float(dense(weights, "flops")) == pytest.approx(flops, abs=1e-6)
    assert float(dense(weights, "l1")) == pytest.approx(float(weights.sum()) / 4, abs=1e-6)
    for kind in ("flops", "l1"):
        torch.testing.assert_close(dense(torch.cat([weights, weights]), kind), dense(weights, kind))


def test_the_ramp_is_quadratic_counts_lists_and_stands_still_in_eval(tmp_path):
    heads = Seen()
    assert [float(heads(2, 8)) for _ in range(6)] == [0.0, (2 / 8) ** 2, (4 / 8) ** 2, (6 / 8) ** 2, 1.0, 1.0]
    heads.eval()
    assert [float(heads(2, 24)) for _ in range(2)] == [0.25, 0.25]
    assert float(Seen()(5, 0)) == 1.0
    again = Seen()
    again.load_state_dict(heads.state_dict())
    assert float(again(1, 24)) == (12 / 24) ** 2 and not list(again.parameters())
    write(MistralSplade(), heads, tmp_path)
    assert float(read(MistralSplade(weights=str(tmp_path)), loaded())(1, 24)) == (12 / 24) ** 2


def test_postings_give_the_dense_product():
    generator = torch.Generator().manual_seed(1)
    matrix = (torch.rand(6, 9, generator=generator) * (torch.rand(6, 9, generator=generator) > 0.6)).double().numpy()
    matrix[3] = 0.0
    index = Postings.of([(row.nonzero()[0], row[row.nonzero()[0]]) for row in matrix])
    query = np.array([0.5, 0.0, 2.0, 0.0, 1.0, 3.0, 0.0, 0.25, 1.0, 7.0, 0.0])  # terms that no text has, beyond the last too
    found = index.scores(query.nonzero()[0], query[query.nonzero()[0]])
    np.testing.assert_allclose(found, matrix @ query[:9], atol=1e-12)
    assert index.scores(np.zeros(0, np.int64), np.zeros(0)).tolist() == [0.0] * 6 and len(index.places) == (matrix > 0).sum()


def test_scores_are_products_of_terms_and_a_search_lists_them():
    model, judge = loaded(), MistralSplade()
    query = by_hand(judge, "os.listdir", model)
    found = judge.scores([Asked("os.listdir", TEXTS)], model)[0]
    for words, score in zip(TEXTS, found.tolist(), strict=True):
        passage = by_hand(judge, words, model)
        assert score == pytest.approx(sum(query[t] * passage[t] for t in query if t in passage), rel=1e-4)
    best = judge.search(judge.index(TEXTS, model), ["os.listdir"], 9, model)[0]
    assert [i for i, _ in best] == torch.argsort(found, descending=True, stable=True).tolist() and found[0] == found[4]


def test_pruning_keeps_the_largest():
    model = loaded()
    whole, pruned = MistralSplade()._read(TEXTS, model, False), MistralSplade(passage_terms=5)._read(TEXTS, model, False)
    for (terms, weights), (some, kept) in zip(whole, pruned, strict=True):
        largest = sorted(range(len(terms)), key=lambda i: -weights[i])[:5]
        assert sorted(terms[largest].tolist()) == some.tolist() and sorted(kept) == sorted(weights[largest])
    assert len(MistralSplade(query_terms=3)._read(["import os"], model, True)[0][0]) == 3


@pytest.mark.parametrize("more", [{}, {"pool": "sum", "query_sparsity": "l1"}, {"objective": "margin", "scale": 5.0}])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_training_lowers_the_loss_and_orders_the_lists(architecture, more):
    model, judge = loaded(architecture), MistralSplade(**more, ramp=10_000)
    _, losses = taught(judge, model, length=300)
    assert losses[-1] < 0.5 * losses[0]
    answers = judge.answers([Asked(one.query, one.passages) for one in LISTS], model)
    assert [a.order[0] for a in answers] == [0, 0, 0]


def test_the_regulariser_makes_passages_sparser():
    counts = []
    for weight in (0.0, 0.03, 0.3):
        model, judge = loaded(), MistralSplade(query_weight=weight, passage_weight=weight, ramp=30)
        taught(judge, model, length=300)
        counts.append(len(judge.index(TEXTS, model).places))
    assert counts[0] > counts[1] > counts[2]


def test_the_loss_is_rank_plus_the_ramped_regularisers_over_real_passages():
    model, judge = loaded(), MistralSplade(query_weight=0.3, passage_weight=0.2, passage_sparsity="l1", ramp=4)
    batch, heads = judge.collate(LISTS, model, 300), Seen()
    with torch.no_grad():
        first, second = judge.loss(model.model, heads, batch), judge.loss(model.model, heads, batch)
        queries = judge.terms(model.model, batch["query_ids"], batch["query_mask"], batch["special"][0])
        passages = judge.terms(model.model, batch["passage_ids"], batch["passage_mask"], batch["special"][0])
    real = passages[batch["keep"].flatten()]
    assert len(real) == 7 < len(passages)
    torch.testing.assert_close(second - first, ((3 / 4) ** 2 * (0.3 * dense(queries, "flops") + 0.2 * dense(real, "l1"))).expand(3))


def test_what_is_said_to_be_wrong():
    with pytest.raises(SmeltError, match="is no embedding"):
        MistralSplade(judge=3)
    with pytest.raises(SmeltError, match="needs a model"):
        MistralSplade().index(["a"], None)
    model = loaded()
    with torch.no_grad():
        model.model.get_input_embeddings().weight[5] = torch.nan
    with pytest.raises(SmeltError, match="not finite"):
        MistralSplade().index(["a"], model)
    method = parse("mistral_splade(judge=embedding(echo=True), passage_terms=200)", "rank")
    check(method)
    assert method == MistralSplade(passage_terms=200) and parse(text(method), "rank") == method
