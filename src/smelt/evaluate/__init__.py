"""Probes: each measures one variant once and says in which direction better lies.

A variant is a model with its runtime methods already bound: `model(...)` and `model.generate(...)` are measured as
they stand. Where a `cache` is bound, quality is read through it: tokens are fed in calls, and later tokens see what
the cache kept. A probe returns `Metric`s. `samples` are parts in a fixed order: with `weights`, parts of a ratio of
sums (documents, queries); without, timed rounds. They let the report pair two variants part by part.

A `paired` probe (anything timed) measures one short round; the driver `_measure.measure` calls it for the variants
in turns, A B A B, drops the warm-up rounds and collects the rounds as samples. A probe leaves the model as it was.
What is prepared once for all variants (text, the retrieval task, the teacher's answers) is kept per process in the
helpers, never in the probe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from smelt.spec import Metric

__all__ = ["Metric", "Probe", "Variant"]


@dataclass
class Variant:
    """What is measured. `cache`, `attention`, `decode` are the methods bound to the model, for reports and caches."""

    name: str
    model: Any
    tokenizer: Any
    cache: Any = None
    attention: Any = None
    decode: Any = None
    teacher: Any = None  # Loaded, for agreement; None when there is none
    data: Any = None  # corpus whose test split is measured on; None: stdlib
    rank: Any = None  # judge or strategy; None: the model ranks by query likelihood
    folder: Any = None  # of the checkpoint


class Probe(ABC):
    paired: ClassVar[bool] = False  # timed: the driver takes rounds in turns

    @classmethod
    @abstractmethod
    def example(cls) -> Self | None:
        """Small settings for the family's laws: a second on a tiny model. None when it needs what is not installed."""

    @abstractmethod
    def __call__(self, variant: Variant) -> list[Metric]: ...
