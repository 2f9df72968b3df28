"""Probes: each measures one variant once and says in which direction better lies.

A variant is a model with its runtime methods already bound: `model(...)` and `model.generate(...)` are measured as
they stand. A probe returns `Metric`s; `samples` (with `weights` where the value is a ratio of sums) lets the
report pair two variants part by part. A `paired` probe (anything timed) measures one short round; the driver
calls it for the variants in turns, A B A B, drops the warm-up rounds and collects the rounds as samples.

`setting(tokenizer)`-like preparation is cached inside the probe object's `prepare`, which sees no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

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
    data: Any = None  # corpus whose test split is measured on


class Probe(ABC):
    paired: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, variant: Variant) -> list[Metric]: ...
