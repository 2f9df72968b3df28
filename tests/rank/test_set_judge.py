from __future__ import annotations

import itertools
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Asked
from smelt.rank._blocks import mask, stack
from smelt.rank._order import by_digest
from smelt.rank.first_token import FirstToken
from smelt.rank.set_judge import DECIMALS, SetJudge
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

PASSAGES = [f"def function_{i}(x):\n    return x * {i * i}\n" for i in range(10)]


def loaded(architecture="llama", **more):
    return Loaded(tiny(architecture, **{"context": 512} | more), tiny_tokenizer(), None)


def by_text(judge, passages, model, query="times three"):
    """[(passage, score)] best first."""
    answer = judge.answers([Asked(query, passages)], model)[0]
    return [(passages[i], answer.scores[i].item()) for i in answer.order]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma"])
def test_every_order_of_four_gives_the_same_answer(architecture):
    model, judge, four = loaded(architecture), SetJudge(), PASSAGES[:4]
    orders = list(itertools.permutations(four))
    answers = judge.answers([Asked("times three", list(order)) for order in orders], model)
    found = {tuple((order[i], a.scores[i].item()) for i in a.order) for order, a in zip(orders, answers, strict=True)}
    assert len(found) == 1
    assert {tuple(by_text(judge, list(order), model)) for order in orders} == found  # alone as in a batch
    plain = {tuple(p for p, _ in by_text(FirstToken(), list(order), model)) for order in orders}
    assert len(plain) > 1  # the judge it is read off as does depend on it


def test_twenty_shuffles_of_ten_with_equal_passages_among_them():
    model, judge, ten = loaded(), SetJudge(), [*PASSAGES[:7], PASSAGES[0], PASSAGES[3], PASSAGES[0]]
    shuffle, found = random.Random(0), set()
    for _ in range(20):
        shuffle.shuffle(ten)
        found.add(tuple(by_text(judge, ten, model)))
        order = judge.answers([Asked("times three", ten)], model)[0].order
        same = [i for i in order if ten[i] == PASSAGES[0]]
        assert same == sorted(same)
    assert len(found) == 1
    (answer,) = found
    assert len(set(answer)) == 7  # equal passages have one score


def test_scores_are_the_logits_under_the_dense_mask():
    model, judge, query = loaded("qwen3"), SetJudge(), "times three"
    members = [PASSAGES[i] for i in by_digest(query, PASSAGES)]
    batch = stack([judge.lay(query, members, model)])
    with torch.no_grad():
        row = model.model(batch.ids, attention_mask=mask(batch.segment), position_ids=batch.positions).logits[0, -1]
    letters = {p: row[model.tokenizer("ABCDEFGHIJ"[at])["input_ids"][0]] for at, p in enumerate(members)}
    found = judge.scores([Asked(query, PASSAGES)], model)[0]
    torch.testing.assert_close(found, torch.stack([letters[p] for p in PASSAGES]), atol=1e-5, rtol=1e-5)


def test_only_the_letter_of_a_passage_depends_on_its_place_in_the_set():
    """The members shuffled together with their letters: the theorem itself, to the last float sums."""
    model, judge, query = loaded(), SetJudge(), "times three"
    laid = judge.lay(query, PASSAGES[:5], model)
    sizes = torch.unique_consecutive(laid.segment, return_counts=True)[1].tolist()
    found = []
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 1, 3)):
        pieces = [list(zip(*(t.split(sizes) for t in laid), strict=True))[i] for i in (0, *(1 + i for i in order), 6)]
        batch = type(laid)(*(torch.cat(column)[None] for column in zip(*pieces, strict=True)))
        with torch.no_grad():
            found.append(model.model(batch.ids, attention_mask=mask(batch.segment), position_ids=batch.positions).logits[0, -1])
    assert float((found[0] - found[1]).abs().max()) < 3e-6


def test_ties_are_broken_by_the_digest_of_the_text():
    model = loaded()
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.zero_()
    texts = PASSAGES[:6]
    wanted = [texts[i] for i in by_digest("q", texts)]
    assert [p for p, _ in by_text(SetJudge(), texts, model, "q")] == wanted
    assert [p for p, _ in by_text(SetJudge(), texts[::-1], model, "q")] == wanted


def test_answers_are_sorted_by_rounded_scores():
    model, judge = loaded(), SetJudge()
    answer, score = judge.answers([Asked("q", PASSAGES)], model)[0], judge.scores([Asked("q", PASSAGES)], model)[0]
    assert torch.equal(answer.scores, torch.round(score, decimals=DECIMALS))
    held = [answer.scores[i].item() for i in answer.order]
    assert held == sorted(held, reverse=True)


def test_settings():
    assert text(parse("set_judge(length=40)", "rank")) == "set_judge(length=40)"
    check(SetJudge())
    for bad in ("length=0", "identifiers='brackets'"):
        with pytest.raises(SmeltError):
            parse(f"set_judge({bad})", "rank")
    with pytest.raises(SmeltError, match="needs a decoder"):
        SetJudge().scores([Asked("q", ["a", "b"])], None)
    words = Tokenizer(models.WordLevel({"?": 0, "A": 1, "[": 2, "Order": 3, ":": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Punctuation()
    with pytest.raises(SmeltError, match=r"^set_judge: 'B' after .* try set_judge\(identifiers='space'\)"):
        SetJudge().scores(
            [Asked("q", ["a", "b"])], loaded()._replace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"))
        )
    model = loaded()
    with torch.no_grad():
        model.model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(SmeltError, match="not finite"):
        SetJudge().scores([Asked("q", ["a", "b"])], model)
