"""Asking judges and strategies: many queries at once, and nothing that is no order passes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from smelt import registry
from smelt.rank import Answer, Asked, Judge, Rounds, Strategy
from smelt.spec import SmeltError

__all__ = ["ask", "by_digest", "checked", "fits", "order", "sort"]


def by_digest(query: str, passages: Sequence[str], turn: int = 0) -> list[int]:
    """An order of the places that follows from the texts alone, not from how they were given, and knows nothing of their grades;
    another one in each turn."""
    about = f"{turn}\x00{query}\x00" if turn else f"{query}\x00"
    return sorted(range(len(passages)), key=lambda i: hashlib.sha256(f"{about}{passages[i]}".encode(errors="surrogatepass")).digest())


def order(method: Judge | Strategy, asked: Sequence[Asked], model: Any) -> list[list[int]]:
    """Of each question its order. The windows that all strategies wait for at one moment go to the judge together."""
    if isinstance(method, Judge):
        found = iter(ask(method, [a for a in asked if a.passages], model))
        return [next(found).order if a.passages else [] for a in asked]
    done: list[list[int]] = [[] for _ in asked]
    running: dict[int, tuple[Rounds, list[list[int]]]] = {}

    def step(which: int, plan: Rounds, answers: list[Answer] | None) -> None:
        try:
            running[which] = plan, next(plan) if answers is None else plan.send(answers)
        except StopIteration as end:
            running.pop(which, None)
            done[which] = checked(method, end.value, len(asked[which].passages))

    for which, one in enumerate(asked):
        step(which, method.rounds(len(one.passages)), None)
    while running:
        waiting = list(running.items())
        windows = [Asked(asked[q].query, [asked[q].passages[i] for i in w]) for q, (_, ws) in waiting for w in ws]
        said = iter(ask(method.judge, windows, model))
        for which, (plan, ws) in waiting:
            step(which, plan, [next(said) for _ in ws])
    return done


def ask(judge: Judge, asked: Sequence[Asked], model: Any) -> list[Answer]:
    """The judge's answers; a passage alone is not judged unless its score is wanted. Raises SmeltError for one that is no permutation."""
    lone = [len(one.passages) == 1 and not judge.comparable for one in asked]
    if any(lone):
        said = iter(ask(judge, [one for one, skip in zip(asked, lone, strict=True) if not skip], model))
        return [Answer([0], None) if skip else next(said) for skip in lone]
    if not asked:
        return []
    for one in asked:
        if judge.limit is not None and len(one.passages) > judge.limit:
            text = registry.name_of(judge)[1]
            raise SmeltError(
                f"{text} reads at most {judge.limit} passages at once and was given {len(one.passages)}; "
                f"call it through sliding_window(judge={text}())"
            )
    given = judge.answers(asked, model)
    if not isinstance(given, Sequence) or len(given) != len(asked):
        raise SmeltError(f"{type(judge).__name__} was asked {len(asked)} questions and did not answer each of them")
    answers = []
    for answer, one in zip(given, asked, strict=True):
        if not isinstance(answer, Answer):
            raise SmeltError(f"{type(judge).__name__} returned {_shown(answer)}, which is not an order of {len(one.passages)} passages")
        answers.append(Answer(checked(judge, answer.order, len(one.passages)), answer.scores))
    return answers


def checked(method: Any, said: Any, n: int) -> list[int]:
    try:
        places = [index(i) for i in said] if isinstance(said, Sequence) else None
    except TypeError:
        places = None
    if places is None or sorted(places) != list(range(n)):
        raise SmeltError(f"{type(method).__name__} returned {_shown(said)}, which is not an order of {n} passages")
    return places


def sort(scores: Sequence[Tensor]) -> list[Answer]:
    """Falling scores; equal ones keep the order given."""
    return [Answer(torch.argsort(s, descending=True, stable=True).tolist(), s) for s in scores]


def fits(strategy: Strategy, window: int | None = None) -> None:
    """What every strategy checks of its judge when it is made. Raises SmeltError where the two cannot work together."""
    name, judge = registry.name_of(strategy)[1], strategy.judge
    if not isinstance(judge, Judge):
        raise SmeltError(f"{name}: judge={judge!r} is no judge; one is first_token()")
    if window is not None and judge.limit is not None and window > judge.limit:
        raise SmeltError(f"{name}: window={window}, but {type(judge).__name__} takes at most {judge.limit} passages")
    if strategy.compares and not judge.comparable:
        raise SmeltError(
            f"{name} compares scores of different calls, and those of {type(judge).__name__} mean something inside one call only; "
            "judges whose scores compare are self_calibrated, pointwise and embedding"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
