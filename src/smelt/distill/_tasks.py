"""Tiny tasks with known answers, made by a program: what procedures learn from when no file of examples is given."""

from __future__ import annotations

import random

from smelt.spec import SmeltError

__all__ = ["LABELS", "arithmetic", "keywords", "written"]

# Of each label the words that mean it, the likeliest first: rare ones are what a student gets wrong.
LABELS = {
    "animal": ("dog", "cat", "horse", "otter", "heron", "lynx"),
    "colour": ("red", "blue", "green", "amber", "teal", "ochre"),
    "drink": ("water", "tea", "milk", "cider", "cocoa", "broth"),
    "fruit": ("apple", "pear", "plum", "quince", "guava", "medlar"),
    "metal": ("iron", "gold", "tin", "zinc", "cobalt", "nickel"),
    "place": ("city", "farm", "port", "abbey", "quarry", "marsh"),
    "tool": ("hammer", "saw", "file", "chisel", "awl", "adze"),
    "weather": ("rain", "snow", "wind", "sleet", "thunder", "haze"),
}
FILLERS = ("the", "one", "that", "was", "seen", "near", "my", "old", "and", "new", "thing", "again", "with", "some", "more", "here")


def arithmetic(count: int, seed: int, terms: int = 3) -> list[dict[str, str]]:
    """Sums of digits, no two alike: {"input": "3 + 5 - 2", "label": "6", "rationale": "3 + 5 = 8. 8 - 2 = 6."}."""
    most = 10**terms * 2 ** (terms - 1)
    if count > most // 2:
        raise SmeltError(f"there are {most} sums of {terms} digits; ask for at most {most // 2}")
    made = random.Random(seed)
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        digits = [made.randrange(10) for _ in range(terms)]
        signs = [made.choice("+-") for _ in range(terms - 1)]
        text, total, steps = str(digits[0]), digits[0], []
        for sign, digit in zip(signs, digits[1:], strict=True):
            after = total + digit if sign == "+" else total - digit
            steps.append(f"{total} {sign} {digit} = {after}.")
            text, total = f"{text} {sign} {digit}", after
        found[text] = {"input": text, "label": str(total), "rationale": " ".join(steps)}
    return list(found.values())


def keywords(count: int, seed: int) -> list[dict[str, str]]:
    """Texts of six words, one of which decides: {"text": "the old heron was seen here", "label": "animal"}. Labels in turn.

    The k-th of a label's words comes with weight 2^-k, so that some are hardly ever seen.
    """
    made, labels = random.Random(seed), list(LABELS)
    return [_sample(made, labels[i % len(labels)], rare=False) for i in range(count)]


def written(wanted: dict[str, int], seed: int) -> list[dict[str, str]]:
    """The program as a teacher: so many texts of each label, all of its words alike."""
    made = random.Random(seed)
    return [_sample(made, label, rare=True) for label, count in wanted.items() for _ in range(count)]


def _sample(made: random.Random, label: str, rare: bool) -> dict[str, str]:
    words = LABELS[label]
    word = made.choice(words) if rare else made.choices(words, [2.0**-k for k in range(len(words))])[0]
    text = made.choices(FILLERS, k=5)
    text.insert(made.randrange(6), word)
    return {"text": " ".join(text), "label": label}
