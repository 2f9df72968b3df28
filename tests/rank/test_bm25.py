from __future__ import annotations

import math
import random

import pytest
import torch

from smelt.rank import Asked
from smelt.rank.bm25 import BM25
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


def slow(judge, query, passages):
    """The formula of the docstring, word by word."""
    split = [judge.words(p) for p in passages]
    n, mean = len(passages), sum(map(len, split)) / len(passages)
    scores = []
    for words in split:
        score = 0.0
        for word in judge.words(query):
            having, count = sum(word in s for s in split), words.count(word)
            idf = math.log(1 + (n - having + 0.5) / (having + 0.5))
            if count:
                score += idf * count / (count + judge.k1 * (1 - judge.b + judge.b * len(words) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("k1, b", [(1.5, 0.75), (0.9, 0.4), (1.2, 0.0), (2.0, 1.0)])
def test_scores_are_the_formula(k1, b):
    shuffle, judge = random.Random(0), BM25(k1=k1, b=b, split="words")
    for _ in range(20):
        passages = [" ".join(shuffle.choices("abcdefgh", k=shuffle.randint(0, 9))) for _ in range(shuffle.randint(1, 12))]
        passages[0] += " a"
        query = " ".join(shuffle.choices("abcdefghz", k=4))
        (found,) = judge.scores([Asked(query, passages)], None)
        torch.testing.assert_close(found, torch.tensor(slow(judge, query, passages)), atol=1e-5, rtol=1e-5)
        assert found.dtype == torch.float32


def test_a_search_asks_the_whole_corpus_and_ties_keep_its_order():
    judge, corpus = BM25(), ["alpha beta", "beta", "gamma", "beta", "", "delta beta beta"]
    index = judge.index(corpus, None)
    found = judge.search(index, ["beta", "nothing here", "gamma beta"], 10, None)
    for query, best in zip(["beta", "nothing here", "gamma beta"], found, strict=True):
        score = slow(judge, query, corpus)
        assert [i for i, _ in best] == sorted(range(6), key=lambda i: (-round(score[i], 5), i))
        assert [v for _, v in best] == pytest.approx(sorted(score, reverse=True), abs=1e-5)
    assert [i for i, _ in found[1]] == list(range(6)) and found[0][0][1] == found[0][1][1]
    assert judge.search(index, ["beta"], 2, None)[0] == found[0][:2] and judge.search(index, ["beta"], 0, None) == [[]]
    assert judge.search(judge.index(["", " "], None), ["beta"], 5, None) == [[(0, 0.0), (1, 0.0)]]


def test_words():
    words, identifiers = BM25(split="words").words, BM25().words
    assert words("readHTTPHeader2(my_name) É9 9") == ["readhttpheader2", "my", "name", "é9", "9"]
    assert identifiers("readHTTPHeader2(my_name) É9 9") == ["read", "http", "header", "2", "my", "name", "é", "9", "9"]
    assert identifiers("") == [] and identifiers("_ - ?") == []


@pytest.mark.parametrize("split", ["words", "identifiers"])
def test_words_of_other_scripts(split):
    words = BM25(split=split).words
    assert words("e\u0301t\u00e9 \uff26\uff55\uff4c\uff4c") == ["\u00e9t\u00e9", "full"]  # composed, of full width
    assert words("हिन्दी में") == ["हिन्दी", "में"]  # vowels are marks and no ends of words
    assert words("数字を足す") == ["数字", "字を", "を足", "足す"] and words("足") == ["足"]
    assert words("สวัสดี") == ["สวั", "วัส", "สดี"]  # letters with their marks
    assert words("go数字2🎉👍🏽x") == ["go", "数字", "2", "🎉", "👍", "x"]


def test_a_query_without_spaces_finds_its_passage():
    corpus = ["def add(a, b): return a + b", "ファイルを読む", "数字を足して返す 🎉", "पहली पंक्ति"]
    judge = BM25()
    index = judge.index(corpus, None)
    for query, best in (("数字を足す", 2), ("ファイル", 1), ("🎉", 2), ("पंक्ति", 3), ("add", 0)):
        (found,) = judge.search(index, [query], 1, None)
        assert found[0][0] == best and found[0][1] > 0


def test_the_window_is_the_corpus_so_scores_do_not_compare():
    judge = BM25()
    whole = judge.scores([Asked("beta", ["beta", "alpha", "gamma beta beta"])], None)[0]
    part = judge.scores([Asked("beta", ["beta", "alpha"])], None)[0]
    assert not judge.comparable and not torch.allclose(whole[:2], part)
    assert judge.answers([Asked("beta", ["alpha", "beta", "x"])], None)[0].order == [1, 0, 2]


def test_settings():
    method = parse("bm25(k1=0.9, b=0.4, split='words')", "rank")
    assert text(method) == "bm25(k1=0.9, b=0.4, split='words')"
    check(method)
    for bad in ("bm25(b=1.1)", "bm25(k1=-1.0)", "bm25(split='letters')"):
        with pytest.raises(SmeltError):
            parse(bad, "rank")
