"""Next-token training in which a near miss costs less: mass is moved to the label, and the way is as long as tokens differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor
from torch.nn.functional import normalize

from smelt.distill._divergence import wide
from smelt.spec import Paper

__all__ = ["EMO"]


@dataclass(frozen=True)
class EMO:
    """loss = (NLL + sg(NLL / D) D) / 2 (form 1) or sg(D / NLL) NLL + D (form 2); D = sum_v q_v (1 - cos(E_v, E_x)).

    q student, x the next token of the data, NLL = -log q_x in nats, E the teacher's output embedding with rows of length 1,
    frozen; sg stops the gradient. Shapes: student [b, t, v], labels [b, t], teacher_head [>= v, d] -> [b, t]. D, between 0
    and 2, is the exact earth mover's distance of q to the label under the cost 1 - cos. The value of form 1 is NLL wherever
    the ratio is below `cap`, that of form 2 is 2 D; the gradients are (grad NLL + (NLL / D) grad D) / 2 and
    grad D + (D / NLL) grad NLL. NLL / D has no bound (a confident miss, or near synonyms): `cap` bounds it, 3 in the
    authors' code for LLaMA; D / NLL is never above 2. No teacher opinion is read, so it is not zero at the teacher.

    D is summed over the tokens other than x, so that no digits are lost where q_x is near 1. Cost: [n, v] x [v, d], 2 v d
    operations a position and as many backward, the rows of E made of length 1 anew for each micro-batch, and about four
    buffers of the size of the logits. Masked positions are computed too. Since it reads `teacher_head`, the loop runs the
    teacher's forward as well (2 N operations a token), though its logits go unused. The teacher must have the student's
    vocabulary, ids and all; the loop refuses another with a SmeltError.

    Differs from the paper: q_x is left out of the product; the authors' newer code subtracts sg(q_x), which gives a value
    of D larger by q_x, and so another ratio. Start from a trained student: from nothing it is worse than cross-entropy.
    """

    paper: ClassVar = Paper("EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling", "arXiv:2310.04691", "section 3")
    zero_at_teacher: ClassVar = False
    form: Literal[1, 2] = 1
    cap: Annotated[float, Gt(0)] = math.inf

    def __call__(self, student: Tensor, labels: Tensor, teacher_head: Tensor) -> Tensor:
        log_q = wide(student).log_softmax(-1)
        at = labels[..., None]
        log_label = log_q.gather(-1, at)[..., 0]
        others = log_q.exp().scatter(-1, at, 0.0)
        places = normalize(teacher_head.detach()[: student.shape[-1]].to(log_q.dtype), dim=-1)
        nll, moved = -log_label, others.sum(-1)
        distance = moved - torch.linalg.vecdot(others @ places, places[labels])
        with torch.no_grad():  # below the rounding of `moved` a ratio says nothing; log q_x may round to 0 before D does
            about = torch.finfo(distance.dtype)
            if self.form == 1:
                ratio = (nll / distance.clamp(min=about.tiny).maximum(about.eps * moved)).clamp(max=self.cap)
            else:
                ratio = (distance / nll.clamp(min=about.tiny)).clamp(max=2)
        return (nll + ratio * distance) / 2 if self.form == 1 else ratio * nll + distance
