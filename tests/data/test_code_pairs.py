from __future__ import annotations

from dataclasses import dataclass

import pytest

from smelt.data import Document, Lists
from smelt.data.code_pairs import CodePairs

WORDS = ["alpha", "beta", "gamma", "delta", "omega"]


@dataclass(frozen=True)
class Small:
    """Thirty functions in train, some in test; those of one word share their vocabulary."""

    count: int = 30

    def documents(self, split):
        for i in range(self.count if split == "train" else 9):
            word = WORDS[i % 5]
            body = f'def {split}_{i}({word}):\n    """Yields the {word} of number {i} as it is. More."""\n    return {word} + {i}\n'
            yield Document(f"{split}{i}.py", body)

    def digest(self):
        return f"small {self.count}"


def test_every_list_starts_with_its_function_and_has_others_of_the_same_split():
    pairs = CodePairs(corpus=Small(), passages=5, hard=0.5)
    assert isinstance(pairs, Lists)
    lists = list(pairs.lists("train"))
    assert len(lists) == 30 and lists == list(pairs.lists("train"))
    bodies = {f.passage for f in pairs.functions("train")}
    for i, (query, passages, grades) in enumerate(lists):
        assert query == f"Yields the {WORDS[i % 5]} of number {i} as it is."
        assert passages[0] == f"def train_{i}({WORDS[i % 5]}):\n    return {WORDS[i % 5]} + {i}"
        assert grades == [1, 0, 0, 0, 0] and len(set(passages)) == 5 and set(passages) <= bodies


@pytest.mark.parametrize("hard", [0.0, 0.5, 1.0])
def test_the_share_of_hard_negatives_shares_the_word_of_the_query(hard):
    """Five other functions have the query's word; by chance 5/29 of four negatives do, as hard negatives all of them."""
    lists = list(CodePairs(corpus=Small(), passages=5, hard=hard).lists("train"))
    share = sum(WORDS[i % 5] in p for i, row in enumerate(lists) for p in row.passages[1:]) / (4 * 30)
    assert share == 1 if hard == 1 else abs(share - (hard + (1 - hard) * 5 / 29)) < 0.12


def test_every_sentence_asks_for_its_function_with_negatives_of_its_own():
    class Told(Small):
        def documents(self, split):
            for name, text, *_ in super().documents(split):
                yield Document(name, text.replace("More.", f"It has a second sentence about {name}."))

    first, every = (list(CodePairs(corpus=Told(), passages=5, sentences=which).lists("train")) for which in ("first", "all"))
    assert every[::2] == first and len(every) == 60
    for one, other in zip(every[::2], every[1::2], strict=True):
        assert other.passages[0] == one.passages[0] and other.query.startswith("It has a second sentence about train")
    assert any(one.passages != other.passages for one, other in zip(every[::2], every[1::2], strict=True))
    assert CodePairs(corpus=Small()).digest() != CodePairs(corpus=Small(), sentences="all").digest()


def test_settings_change_the_digest_and_few_functions_give_nothing():
    assert CodePairs(corpus=Small()).digest() != CodePairs(corpus=Small(), hard=0.1).digest() != CodePairs(corpus=Small(7)).digest()
    assert not list(CodePairs(corpus=Small(3), passages=5).lists("train"))
    assert list(CodePairs(corpus=Small()).documents("test")) == list(Small().documents("test"))
