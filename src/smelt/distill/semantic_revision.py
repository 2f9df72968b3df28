"""The student writes, the teacher corrects the worst token, the student goes on from there: corrected rows to learn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from smelt.distill import Procedure
from smelt.distill._sampling import finish, holds, sampling, spoken
from smelt.distill._teacher import agree
from smelt.distill.dac_kl import DacKL
from smelt.distill.forward_kl import ForwardKL
from smelt.model._walk import multiplied
from smelt.spec import Paper

__all__ = ["SemanticRevision"]


@dataclass(frozen=True)
class SemanticRevision(Procedure):
    """j = argmax_{i: y_i != argmax p_i} KL(p_i || q_i); y' = y_<j, argmax p_j, then q again: what the objective is trained on.

    y ~ q a sample of the student after the first `prompt` tokens of a row, p teacher, q student, both given y_<i. The token
    where they part most, among those where the teacher's first choice is another, becomes that choice, and the student writes
    the rest anew, to the same length; `corrections` times. No such token: y stays. All rows of a micro-batch at once.
    Rows are replaced with probability `share`, as in gkd; the others are the data. Only tokens after the prompt count.

    Cost beside the objective, per replaced row: its sample, and for each correction one pass of teacher and student over
    it and at most `new` calls of the student for the rest (one for all rows of the micro-batch). Logits of both: 8 b t v
    bytes. The rest is written through `cache`; `decode` serves the first sample only. Errors: those of gkd.

    Differs from the paper (a reconstruction, its code is not public): the share of corrected rows is not established; rows of
    text stand for instructions; the loss on the labels (its third term) is left to the objective, which is dac_kl by default.
    """

    paper: ClassVar = Paper(
        "Multi-Granularity Semantic Revision for Large Language Model Distillation",
        "arXiv:2407.10068",
        "sequence correction and re-generation",
    )
    objective: Any = field(default_factory=DacKL)
    share: Annotated[float, Interval(ge=0, le=1)] = 0.5  # probability that a row is the student's
    corrections: Annotated[int, Ge(0)] = 1
    prompt: Annotated[int, Ge(1)] = 32  # tokens kept of a row
    new: Annotated[int, Ge(0)] = 0  # tokens sampled; 0: as many as the row has
    temperature: Annotated[float, Gt(0)] = 1.0  # of sampling
    cache: Any = None  # a method of the family cache
    decode: Any = None  # a method of the family decode

    def __post_init__(self) -> None:
        holds(self, self.objective)

    def teach(self, course: Any) -> dict[str, Any]:
        width = agree(course.student, course.teacher, ("teacher",))
        student, teacher, eos = course.student.model, course.teacher.model, course.student.tokenizer.eos_token_id

        def revise(tokens: Tensor, seed: int) -> Tensor:
            for time in range(self.corrections):
                mine, theirs = answers(tokens)
                tokens, known = corrected(tokens, mine, theirs, self.prompt, eos)
                tokens = finish(student, tokens, known, self.temperature, seed + time + 1, eos)
            return tokens

        @torch.no_grad()
        def answers(tokens: Tensor) -> tuple[Tensor, Tensor]:
            training = student.training
            student.eval()
            mine = student(input_ids=tokens[:, :-1], use_cache=False).logits
            student.train(training)
            return mine, teacher.eval()(input_ids=tokens[:, :-1], use_cache=False).logits[..., :width]

        each = 2 + multiplied(teacher) / multiplied(student)  # passes of the size of the student's that a correction takes at most
        with sampling(course, self, self.share, revise, 1 + self.corrections * each) as (change, flops):
            log = course.fit(self.objective, change=change)
        return log | {"flops": log["flops"] + flops}

    @classmethod
    def example(cls) -> Self:
        return cls(prompt=6, new=12, share=0.7)


def corrected(tokens: Tensor, student: Tensor, teacher: Tensor, prompt: int, eos: int) -> tuple[Tensor, Tensor]:
    """(tokens [n, s] with the worst one corrected, known [n]: how many tokens of each row stand, s where none is corrected).

    student, teacher [n, s - 1, v]: logits of tokens[:, 1:].
    """
    choice = teacher.argmax(-1)
    open_to = spoken(tokens, prompt, eos)[:, 1:] & (choice != tokens[:, 1:])
    apart = ForwardKL()(student, teacher).masked_fill(~open_to, -torch.inf)
    at, some = apart.argmax(-1, keepdim=True), open_to.any(-1)
    right = torch.where(some[:, None], choice.gather(1, at), tokens.gather(1, at + 1))
    return tokens.scatter(1, at + 1, right), torch.where(some, at[:, 0] + 2, tokens.shape[1])
