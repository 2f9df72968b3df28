"""The helper smelt/rank/_repair.py. The recorded answers of real models go through it in test_permutation_text.py."""

import random
import threading
from collections import Counter

import pytest

from smelt.rank._repair import OUTCOMES, count, counting, repair


@pytest.mark.parametrize(
    ("text", "order", "outcome"),
    [
        ("[2] > [1] > [3]", [1, 0, 2], "ok"),
        ("  [2] > [1] > [3]\n", [1, 0, 2], "ok"),
        ("[2] > [1]", [1, 0, 2], "missing"),
        ("[2] > [2] > [1]", [1, 0, 2], "repetition"),
        ("[2] > [1] > [3] > [2]", [1, 0, 2], "repetition"),
        ("[3] > [4] > [1]", [2, 0, 1], "repetition"),  # the right number, not the right ones
        ("[0] > [3] > [1]", [2, 0, 1], "repetition"),
        ("", [0, 1, 2], "wrong_format"),
        ("I cannot rank these.", [0, 1, 2], "wrong_format"),
        ("[2], [3], [1]", [1, 2, 0], "wrong_format"),
        ("3 > 1 > 2", [2, 0, 1], "wrong_format"),
        ("The best is 03, then 2.", [2, 1, 0], "wrong_format"),
        ("1 2 3 ... no: <think> 1 </think> is 3 </think>[3] > [2] > [1]", [2, 1, 0], "ok"),  # what follows the last one
        ("[3] > [2] > [1] </think>", [0, 1, 2], "wrong_format"),
        ("[²] > [₁] > [３]", [1, 0, 2], "wrong_format"),
        ("③②①", [2, 1, 0], "wrong_format"),  # each circled number is one identifier
        ("❷ then ❸", [1, 2, 0], "wrong_format"),
        ("[٢] > [١] > [٣]", [1, 0, 2], "wrong_format"),
        ("[1²]", [0, 1, 2], "wrong_format"),  # 12, a maximal run, is out of range; not 1 and 2
        ("½ 二 3", [2, 0, 1], "wrong_format"),  # neither a half nor a word is a digit
        ("9" * 5000 + " > 2", [1, 0, 2], "wrong_format"),  # more digits than int() takes
        ("-2 > 1.3", [1, 0, 2], "wrong_format"),
    ],
)
def test_the_chain(text, order, outcome):
    assert repair(text, 3) == (order, outcome)


def test_two_digits_are_one_number():
    assert repair("[12] > [1] > [2]", 12)[0] == [11, 0, 1, *range(2, 11)]
    assert repair("⑫ ⑳ ⑩", 12)[0][:2] == [11, 9]


@pytest.mark.parametrize(
    ("text", "order", "outcome"),
    [
        ("[B] > [A] > [C]", [1, 0, 2], "ok"),
        ("[C] > [A]", [2, 0, 1], "missing"),
        ("[A] > [A] > [C]", [0, 2, 1], "repetition"),
        ("[D] > [C] > [A]", [2, 0, 1], "repetition"),
        ("A refusal: [C] first", [2, 0, 1], "wrong_format"),  # in brackets before what stands alone
        ("C > A > B", [2, 0, 1], "wrong_format"),
        ("CAB", [0, 1, 2], "wrong_format"),  # a word, not 312
        ("[AB] > C", [2, 0, 1], "wrong_format"),
        ("[2] > [1]", [0, 1, 2], "wrong_format"),
    ],
)
def test_letters(text, order, outcome):
    assert repair(text, 3, letters=True) == (order, outcome)


def test_strict_leaves_the_order_unless_half_of_the_passages_are_named():
    """For every number named: kept when 2 * named >= n."""
    for n in range(1, 12):
        for named in range(n + 1):
            text = ", ".join(str(n - i) for i in range(named)) + ", 99, " + str(n)  # n again: named twice, counted once
            said = list(dict.fromkeys([n - 1 - i for i in range(named)] + [n - 1]))
            rest = [i for i in range(n) if i not in said]
            assert repair(text, n)[0] == said + rest
            assert repair(text, n, strict=True)[0] == (said + rest if 2 * len(said) >= n else list(range(n)))


@pytest.mark.parametrize("letters", [False, True])
def test_always_a_permutation(letters):
    draw = random.Random(0)
    signs = "0123456789ABCXYZ[]>, ²③１½٣é\n🙂" + "</think>"
    for _ in range(2000):
        n = draw.randrange(1, 27)
        order, outcome = repair("".join(draw.choices(signs, k=draw.randrange(80))), n, letters, draw.random() < 0.5)
        assert sorted(order) == list(range(n)) and outcome in OUTCOMES


def test_every_written_permutation_comes_back():
    draw = random.Random(1)
    for n in range(1, 27):
        order = draw.sample(range(n), n)
        assert repair(" > ".join(f"[{i + 1}]" for i in order), n) == (order, "ok")
        assert repair(" > ".join(f"[{chr(65 + i)}]" for i in order), n, letters=True) == (order, "ok")


def test_counts_are_of_the_block_and_its_thread():
    count("ok")  # outside, nothing happens
    with counting() as outer:
        count("ok")
        with counting() as inner:
            count("missing")
        count("ok")
        other = threading.Thread(target=count, args=("ok",))
        other.start()
        other.join()
    assert (outer, inner) == (Counter(ok=2), Counter(missing=1))
    count("ok")
    assert outer == Counter(ok=2)
