"""What a method of this family may hold: the names an objective reads, and what a token divergence is."""

from __future__ import annotations

import inspect
from typing import Any

from smelt.distill import Composed
from smelt.spec import SmeltError

__all__ = ["reading", "token_divergence"]


def reading(objective: Any) -> tuple[str, ...]:
    """The names an objective reads: the parameters of its call, or what a `Composed` one says. () for what is not an objective."""
    if isinstance(objective, Composed):
        return tuple(objective.reads)
    if isinstance(objective, type) or not callable(objective):
        return ()
    return tuple(inspect.signature(objective).parameters)


def token_divergence(objective: Any, where: str) -> None:
    """Raises SmeltError unless `objective` reads exactly student and teacher: `objective(student=z_q, teacher=z_p)` [..., v] -> [...].

    `where` opens the message, as in "taid: objective". Such an objective has no state and no parameters. Hand both over by
    name: the call of a composed one takes nothing else.
    """
    if sorted(reading(objective)) == ["student", "teacher"]:
        return
    if isinstance(objective, str):
        what = f"is the text '{objective[:40]}'"
    elif isinstance(objective, type):
        what = f"is the class {objective.__name__}, not a method made of it"
    elif names := reading(objective):
        what = f"is {type(objective).__name__}, which reads {', '.join(names)}"
    else:
        what = f"is {type(objective).__name__}, which is no objective"
    raise SmeltError(f"{where} {what}; a divergence of student and teacher alone is expected, such as forward_kl()")
