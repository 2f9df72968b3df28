from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from helpers.rank import loaded
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Asked
from smelt.rank._fm_index import FMIndex, Key, beam_search, intersective, largest, odds
from smelt.rank._training import Labelled
from smelt.rank.seal import SEAL, overlap
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

TEXTS = ["def f(x): return x + 1", "", "import os; os.listdir('.')", "class A: pass", "for name in names: print(name)", "import os"]


@torch.no_grad()
def chances(model, ids):
    return model.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def by_hand(model, texts, prompt, beams, length):
    """Beam search without a cache or an index: n-grams are looked for in the texts, the model reads every row alone."""
    best, found = [((), 0.0)], {}
    for _ in range(length):
        after = []
        for ngram, said in best:
            chance, n = chances(model, [*prompt, *ngram]), len(ngram)
            follows = {t[i + n] for t in texts for i in range(len(t) - n) if tuple(t[i : i + n]) == ngram}
            after += [((*ngram, token), said + float(chance[token])) for token in sorted(follows)]
        best = sorted(after, key=lambda one: -one[1])[:beams]
        found |= dict(best)
    return found


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2", "phi3"])
def test_the_beam_search_is_that_of_a_loop_and_of_each_query_alone(architecture):
    model = loaded(architecture)
    texts = [model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
    other = texts[:3]
    indexes, prompts = [FMIndex(texts), FMIndex(other), FMIndex(texts)], [[5, 9, 7, 22], [30], [8] * 17]
    found = beam_search(indexes, prompts, model.model, 4, 5)
    for (written, first), corpus, prompt in zip(found, (texts, other, texts), prompts, strict=True):
        expected = by_hand(model, corpus, prompt, 4, 5)
        assert set(written) == set(expected) and len(written) > 8
        for ngram, value in expected.items():
            assert written[ngram] == pytest.approx(value, abs=1e-3)
        np.testing.assert_allclose(first, chances(model, prompt).numpy(), atol=1e-3)


def test_everything_written_occurs_with_the_models_own_probability():
    """Random queries; n-grams of the beams and phrases of the query alike. A wider mask only adds."""
    model, rng, judge = loaded(), random.Random(0), SEAL(beams=3, length=4)
    words = ["import", "os", "def", "return", "x", "+", "1", "name", "Print", "class", "zebra"]
    queries = [" ".join(rng.choices(words, k=rng.randrange(6))) for _ in range(100)]
    index = judge.index(TEXTS, model)
    prompts = judge.prompts(queries, model, 200)
    for (written, _), prompt in zip(judge.written([index] * 100, queries, model), prompts, strict=True):
        assert written and all(lo < hi for lo, hi in map(index.range, written))
        for ngram in rng.sample(sorted(written), 2):
            said = sum(float(chances(model, [*prompt, *ngram[:i]])[token]) for i, token in enumerate(ngram))
            assert written[ngram] == pytest.approx(said, abs=1e-3)
    (phrased, _), (without, _) = (SEAL(beams=3, length=4, phrases=p).written([index], ["import os"], model)[0] for p in (3, 0))
    whole = tuple(model.tokenizer("import os", add_special_tokens=False)["input_ids"])
    assert whole in phrased and set(without) < set(phrased)


def test_odds_are_log_odds_and_stay_finite():
    for said, count, tokens in ((-1.0, 3, 400), (-0.01, 1, 50), (-7.0, 90, 100), (-30.0, 1, 10_000)):
        p, often = math.exp(said), (count + 5) / (tokens + 5)
        assert odds(said, count, tokens) == pytest.approx(max(0.0, math.log(p * (1 - often) / (often * (1 - p)))), rel=1e-9)
    assert 0 < odds(0.0, 1, 1000) < 50 and odds(0.0, 7, 7) >= 0


def test_scores_are_those_of_the_keys():
    model = loaded()
    for judge in (SEAL(beams=3, length=4), SEAL(beams=3, length=4, score="lm"), SEAL(beams=3, length=4, unigrams=0, alpha=1.0, beta=0.5)):
        index = judge.index(TEXTS, model)
        ((written, first),) = judge.written([index], ["import os"], model)
        keys = [Key(n, w, *index.range(n)) for n, p in written.items() if (w := odds(p, np.diff(index.range(n))[0], index.tokens)) > 0]
        found = judge.scores([Asked("import os", TEXTS)], model)[0]
        if judge.score == "lm":
            expected = largest(index, keys)
        else:
            single = np.zeros(len(first))
            for token in {t for t in index.text.tolist() if t >= 0} if judge.unigrams else ():
                single[token] = odds(first[token], int((index.text == token).sum()), index.tokens)
            expected = intersective(index, keys, single, judge.alpha, judge.beta)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
        best = judge.search(index, ["import os"], 9, model)[0]
        assert [i for i, _ in best] == torch.argsort(found, descending=True, stable=True).tolist() and float(found[1]) == 0.0


def test_a_corpus_without_tokens_asks_nothing():
    model, judge = loaded(), SEAL()
    assert judge.search(judge.index([], model), ["q"], 3, model) == [[]]
    assert judge.search(judge.index(["", ""], model), ["q"], 3, model) == [[(0, 0.0), (1, 0.0)]]
    assert judge.search(judge.index(TEXTS, model), [], 3, model) == []


LISTS = [
    Labelled("one", ["return x + 1", "import os; print(name)"], [1.0, 0.0]),
    Labelled("two", ["import os; print(name)", "class A: pass"], [1.0, 0.0]),
    Labelled("three", ["class A: pass", "return x + 1", "zebra"], [1.0, 0.0, 0.0]),
]


def test_learned_are_spans_of_the_first_passage_after_the_query():
    model, judge = loaded(), SEAL(length=3)
    batch = judge.collate(LISTS, model, 200)
    assert batch["ids"].shape[0] == batch["mask"].shape[0] == 12
    prompts = judge.prompts([one.query for one in LISTS], model, 200)
    each, expected = [], []
    with torch.no_grad():
        found = judge.loss(model.model, None, batch)
    for at, one in enumerate(LISTS):
        passage = model.tokenizer(one.passages[0], add_special_tokens=False)["input_ids"]
        for row in range(4 * at, 4 * at + 4):
            ids, mask = batch["ids"][row], batch["mask"][row]
            prompt, span = ids[mask == 1].tolist(), ids[mask == 2].tolist()
            assert prompt == prompts[at] and any(passage[i : i + 3] == span for i in range(len(passage)))
            for i, token in enumerate(span):
                chance = chances(model, [*prompt, *span[:i]])
                each.append(-float(0.9 * chance[token] + 0.1 * chance.mean()))
        expected.append(sum(each) / len(each))
        each = []
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=1e-4)


def test_spans_like_the_query_come_more_often():
    assert overlap("import os", "IMPORT OS") == 1.0 and overlap("ab", "abc") == 0.0 and overlap("abcd", "bcde") == pytest.approx(2 / 4)
    model, passage = loaded(), "zebra " * 30 + "listdir"
    judge, shares = SEAL(spans=200, length=4), []
    for query in ("listdir", "monkey"):
        batch = judge.collate([Labelled(query, [passage], [1.0])], model, 10_000)
        rows = [model.tokenizer.decode(ids[mask == 2]) for ids, mask in zip(batch["ids"], batch["mask"], strict=True)]
        shares.append(sum("listdir" in row for row in rows))
    assert shares[0] > 1.5 * shares[1] > 0


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_training_lowers_the_loss_and_orders_the_lists(architecture):
    model, judge = loaded(architecture), SEAL(length=4, beams=4, phrases=0)
    batch, losses = judge.collate(LISTS, model, 300), []
    model.model.train()
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=3e-3)
    for _ in range(30):
        loss = judge.loss(model.model, None, batch)
        assert loss.shape == (3,) and loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(float(loss.detach().mean()))
    model.model.eval()
    assert losses[-1] < 0.6 * losses[0]
    every = sorted({p for one in LISTS for p in one.passages})  # a corpus, so that n-grams are rare enough to say something
    found = judge.search(judge.index(every * 3, model), [one.query for one in LISTS], 3, model)
    assert [[(every * 3)[i] for i, _ in best] for best in found] == [[one.passages[0]] * 3 for one in LISTS]


def test_what_is_said_to_be_wrong():
    with pytest.raises(SmeltError, match="needs a decoder"):
        SEAL().index(["a"], Loaded(tiny("bert"), tiny_tokenizer(), None))
    with pytest.raises(SmeltError, match="needs a decoder"):
        SEAL().scores([Asked("q", ["a"])], None)
    with pytest.raises(SmeltError, match="the model reads 8 tokens"):
        SEAL().scores([Asked("q", ["a"])], loaded(context=8))
    model = loaded()
    with torch.no_grad():
        model.model.lm_head.weight[5] = torch.nan
    with pytest.raises(SmeltError, match="not finite"):
        SEAL().scores([Asked("q", ["a"])], model)
    method = parse("seal(beams=5, score='lm')", "rank")
    check(method)
    assert method == SEAL(beams=5, score="lm") and parse(text(method), "rank") == method
