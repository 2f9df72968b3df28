"""The helper smelt/rank/_vectors.py."""

from __future__ import annotations

import math

import pytest
import torch

from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Asked
from smelt.rank._vectors import Dense, Row, around, depth, exits, hidden, in_batch, pad, pooled, relevant, shortened, until
from smelt.spec import SmeltError


class Letters(Dense):
    """Counts of a, b and c; remembers what it read."""

    def __init__(self):
        self.read = []

    def embed(self, texts, model, query=False):
        self.read.append(list(texts))
        return torch.tensor([[float(t.count(c)) for c in "abc"] for t in texts]).view(-1, 3)


def test_scores_are_products_and_every_text_is_read_once():
    judge = Letters()
    asked = [Asked("ab", ["a", "bb", "a", "c"]), Asked("c", ["c", "a"]), Asked("ab", ["abab"])]
    assert [s.tolist() for s in judge.scores(asked, None)] == [[1, 2, 1, 0], [1, 0], [4]]
    assert judge.read == [["ab", "c"], ["a", "bb", "c", "abab"]]
    assert [a.order for a in judge.answers(asked, None)] == [[1, 0, 2, 3], [0, 1], [0]]
    assert judge.scores([], None) == []


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
def test_a_search_is_a_stable_sort_in_any_chunks(chunk, monkeypatch):
    monkeypatch.setattr("smelt.rank._vectors.CHUNK", chunk)
    judge, corpus = Letters(), ["a", "b", "ab", "a", "", "ab", "abc", "c"]
    index = judge.index(corpus, None)
    for k in (0, 1, 3, 8, 20):
        found = judge.search(index, ["a", "b", "ab", "a"], k, None)
        for query, best in zip(["a", "b", "ab", "a"], found, strict=True):
            score = [sum(query.count(c) * p.count(c) for c in "abc") for p in corpus]
            wanted = sorted(range(8), key=lambda i: (-score[i], i))[:k]
            assert best == [(i, float(score[i])) for i in wanted]
    assert [s.tolist() for s in judge.scores([Asked("ab", corpus)], None)] == [[1, 1, 2, 1, 0, 2, 2, 0]]


def test_vectors_that_are_not_finite_are_refused():
    class Broken(Letters):
        def embed(self, texts, model, query=False):
            return torch.full((len(texts), 3), math.nan)

    with pytest.raises(SmeltError, match="not finite"):
        Broken().scores([Asked("a", ["b"])], None)


def test_pad_marks_what_is_read_and_what_is_pooled():
    ids, mask = pad([Row([5, 6, 7], 1, 2), Row([8], 0, 1), Row([9, 4], 2, 2)])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 4, 0]]
    assert mask.tolist() == [[1, 2, 1], [2, 0, 0], [1, 1, 0]]
    assert pad([])[0].shape == (0, 1)


def test_pooled_is_a_loop_over_tokens():
    states, mask = torch.randn(5, 7, 3), torch.randint(0, 3, (5, 7))
    mask[torch.arange(5), torch.randint(0, 7, (5,))] = 2
    for row in range(5):
        inside = [states[row, t] for t in range(7) if mask[row, t] == 2]
        for pool, wanted in (("mean", sum(inside) / len(inside)), ("first", inside[0]), ("last", inside[-1])):
            torch.testing.assert_close(pooled(states, mask, pool)[row], wanted)


def test_around_finds_special_tokens():
    tokenizer = tiny_tokenizer()
    assert around(tokenizer) == ([], [])

    def bert_like(text, add_special_tokens=True):
        ids = tokenizer(text)["input_ids"]
        return {"input_ids": [1, *ids, 0] if add_special_tokens else ids}

    assert around(bert_like) == ([1], [0])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bert"])
def test_states_of_a_layer_are_those_of_the_truncated_model(architecture):
    """Together in one forward, each alone, and in a model that was built without the layers behind; the model is as before."""
    model = tiny(architecture, layers=3)
    ids, mask = torch.randint(2, 300, (3, 9)), torch.full((3, 9), 2)
    mask[1, 4:] = 0
    with torch.no_grad():
        every = hidden(model, ids, mask, (1, 2, 3))
        for layer in (1, 2, 3):
            short = tiny(architecture, layers=layer)
            short.load_state_dict({k: v for k, v in model.state_dict().items() if k in short.state_dict()})
            wanted = short.base_model(input_ids=ids, attention_mask=(mask > 0).long()).last_hidden_state
            for found in (every[layer - 1], hidden(model, ids, mask, (layer,))[0]):
                torch.testing.assert_close(found[mask > 0], wanted[mask > 0], atol=1e-5, rtol=1e-4)
    assert depth(model) == 3
    with pytest.raises(SmeltError, match="layer 4 of a model of 3 layers"):
        hidden(model, ids, mask, (4,))


def test_until_gives_the_layers_back_after_an_error():
    model = tiny("llama", layers=3)
    with pytest.raises(KeyError), until(model, 1):
        assert depth(model) == 1
        raise KeyError
    assert depth(model) == 3


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_both_directions_see_the_whole_text_and_no_padding(architecture):
    model = tiny(architecture)
    ids, mask = torch.randint(2, 300, (2, 8)), torch.full((2, 8), 2)
    mask[1, 5:] = 0
    changed = ids.clone()
    changed[0, 7], changed[1, 4], changed[1, 6] = 1, 1, 1
    with torch.no_grad():
        (causal,), (after,) = hidden(model, ids, mask), hidden(model, changed, mask)
        assert torch.equal(causal[0, :7], after[0, :7]) and torch.equal(causal[1, :4], after[1, :4])
        (both,), (after,) = hidden(model, ids, mask, both=True), hidden(model, changed, mask, both=True)
        assert ((both[0] - after[0]).abs().amax(-1) > 1e-4).all() and ((both[1, :5] - after[1, :5]).abs().amax(-1) > 1e-4).all()
        padding = ids.clone()
        padding[1, 6] = 1
        assert torch.equal(hidden(model, padding, mask, both=True)[0][1, :5], both[1, :5])
        (alone,) = hidden(model, ids[1:, :5], mask[1:, :5], both=True)
        torch.testing.assert_close(alone[0], both[1, :5], atol=1e-5, rtol=1e-4)


def test_in_batch_is_a_loop():
    b, n, temperature = 4, 3, 0.3
    queries, passages = torch.randn(b, 5, requires_grad=True), torch.randn(b * n, 5)
    grades = torch.tensor([[1.0, 0, 1], [2, 1, 0], [0.5, 0.4, 0.9], [1, 0, 0]])
    keep = torch.tensor([[True, True, True], [True, True, True], [True, True, True], [True, False, False]])
    text = torch.tensor([0, 1, 2, 3, 4, 0, 6, 7, 8, 0, 10, 10])  # the first passage of list 0 comes again in lists 1 and 3
    batch = {"grades": grades, "keep": keep, "text": text}
    found = in_batch(queries, passages, batch, temperature)
    wanted, asks = [], queries.detach()
    for i in range(b):
        good, total = math.exp(float(asks[i] @ passages[i * n]) / temperature), 0.0
        for j in range(b):
            for k in range(n):
                other = j * n + k
                if other == i * n or not keep[j, k] or text[other] == text[i * n]:
                    continue
                if not (j == i and grades[i, k] >= grades[i, 0]):
                    total += math.exp(float(asks[i] @ passages[other]) / temperature)
        wanted.append(-math.log(good / (good + total)))
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=1e-4)
    found.sum().backward()
    assert torch.isfinite(queries.grad).all()


def test_small_parts():
    assert relevant(torch.tensor([[1.0, 2, 0, 3]]), torch.tensor([[True, True, True, False]])).tolist() == [[True, True, False, False]]
    assert shortened(256, 90, 9) == 10 and shortened(8, 90, 9) == 8 and shortened(8, 3, 9) == 1
    assert exits(8) == (2, 4, 6, 8) and exits(2) == (1, 2) and exits(36) == (9, 18, 27, 36) and exits(1) == (1,)
    assert depth(Loaded(tiny("llama"), None, None).model) == 2
