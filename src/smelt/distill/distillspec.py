"""A draft for speculative decoding is taught where it will be used: on its own text, to be accepted by its target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge, Gt

from smelt.distill import Procedure
from smelt.distill._sampling import holds
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.gkd import GKD
from smelt.spec import Paper

__all__ = ["DistillSpec"]


@dataclass(frozen=True)
class DistillSpec(Procedure):
    """loss = E_{y ~ q} D(p, q)(y), nats per token; p target, q draft: gkd(share=1), judged by E sum_v min(p, q) = 1 - TVD(p, q).

    The student is the draft, the teacher the target it will be accepted by; every row goes on from its first `prompt` tokens
    as the draft would. The paper takes D from forward_kl, reverse_kl, generalized_jsd(beta=0.5) and total_variation
    and finds none best everywhere: hold any of them. total_variation is the one that descends the rejection rate itself.
    `evaluate: acceptance` measures what came of it: acceptance per token, and tokens per call of the target.

    `temperature` is that of sampling here; text is accepted at the temperature it is decoded at, so take the same.
    Cost, errors and what follows from what: those of gkd, which does the work.

    Differs from the paper: its drafts are first fine-tuned on the task; here the student is whatever the stage before left,
    and prompts are beginnings of rows of text.
    """

    paper: ClassVar = Paper("DistillSpec: Improving Speculative Decoding via Knowledge Distillation", "arXiv:2310.08461", "algorithm 1")
    divergence: Any = field(default_factory=ForwardKL)
    prompt: Annotated[int, Ge(1)] = 32  # tokens kept of a row
    new: Annotated[int, Ge(0)] = 0  # tokens sampled; 0: as many as the row has
    temperature: Annotated[float, Gt(0)] = 1.0
    cache: Any = None  # a method of the family cache
    decode: Any = None  # a method of the family decode

    def __post_init__(self) -> None:
        holds(self, self.divergence)

    def teach(self, course: Any) -> dict[str, Any]:
        how = {"prompt": self.prompt, "new": self.new, "temperature": self.temperature, "cache": self.cache, "decode": self.decode}
        return GKD(objective=self.divergence, share=1.0, **how).teach(course)

    @classmethod
    def example(cls) -> Self:
        return cls(prompt=6, new=12)
