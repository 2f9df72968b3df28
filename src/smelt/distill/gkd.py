"""The student is corrected on its own text: a share of the rows are its samples, and the teacher judges every token of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge, Gt, Interval

from smelt.distill import Procedure
from smelt.distill._sampling import holds, sampling
from smelt.distill.generalized_jsd import GeneralizedJSD
from smelt.spec import Paper

__all__ = ["GKD"]


@dataclass(frozen=True)
class GKD(Procedure):
    """loss = (1 - share) E_{y ~ data} D(p, q)(y) + share E_{y ~ q} D(p, q)(y), nats per token; nothing flows through y ~ q.

    p teacher, q student; D is any objective. Row r of the training keeps its first `prompt` tokens and goes on with `new`
    tokens of the student (0: to its end) with probability `share`, decided by (seed, r): share=0 is plain distillation,
    share=1 purely on-policy. Only sampled tokens count, up to an end-of-text token. The gradient is that of the objective on
    the sampled ids taken as constants. The samples of a micro-batch follow from (seed, its rows, the weights): a killed run
    makes the same ones again; another size of micro-batch makes others.

    Samples go through `cache` and `decode`, methods of these families, as any generation of smelt does; a decoding method
    that takes tokens back (`speculative`, `prompt_lookup`) works on one row at a time.
    Cost beside the objective: new calls of the student per micro-batch, 2 N FLOPs per token; memory of its KV cache.
    Raises SmeltError for a cached teacher, sharded weights, boundaries=mask, or a prompt that fills the row.

    Differs from the paper: prompts are beginnings of rows of the text, not questions; a row is drawn from data or student,
    where the paper draws a whole batch. Any objective can be held, so one that reads labels learns its own samples.
    """

    paper: ClassVar = Paper(
        "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", "arXiv:2306.13649", "algorithm 1"
    )
    objective: Any = field(default_factory=GeneralizedJSD)  # beta = 0.5
    share: Annotated[float, Interval(ge=0, le=1)] = 0.5  # lambda: probability that a row is the student's
    prompt: Annotated[int, Ge(1)] = 32  # tokens kept of a row
    new: Annotated[int, Ge(0)] = 0  # tokens sampled; 0: as many as the row has
    temperature: Annotated[float, Gt(0)] = 1.0  # of sampling
    cache: Any = None  # a method of the family cache
    decode: Any = None  # a method of the family decode

    def __post_init__(self) -> None:
        holds(self, self.objective)

    def teach(self, course: Any) -> dict[str, Any]:
        with sampling(course, self, self.share) as (change, flops):
            log = course.fit(self.objective, change=change)
        return log | {"flops": log["flops"] + flops}

    @classmethod
    def example(cls) -> Self:
        return cls(prompt=6, new=12)
