"""Several teachers become one: their distributions are averaged, and any objective learns from the average."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from smelt.distill import Composed, Equipped, Procedure, Stateful
from smelt.distill._divergence import wide
from smelt.distill._holding import reading
from smelt.distill.forward_kl import ForwardKL
from smelt.model._load import Loaded
from smelt.spec import Paper, SmeltError

__all__ = ["Ensemble"]


@dataclass(frozen=True)
class Ensemble(Composed, Stateful):
    """loss = objective(teacher = log sum_k w_k p_k), or with mean="geometric" log prod_k p_k^w_k - log Z; sum_k w_k = 1.

    p_k = softmax(teacher k). The weights are of each position: "uniform" 1/K; "inverse_entropy" w_k ~ exp(-H(p_k));
    "label_confidence" w_k ~ p_k(label); "majority": the members whose first choice most members share have equal weight,
    the others none (a tie keeps all that are tied); or fixed numbers, one for each teacher, in the order of the train
    block. `teacher: [a, b]` there names them; all share the student's tokenizer.

    Shapes: teachers K x [..., v], what `objective` reads -> [...], nats per token. Where all teachers agree exactly,
    `objective` gets the first one's logits as they are, so K equal teachers are that teacher, bit for bit. The loss at the
    label of either mean is at most sum_k w_k times that of the members (Jensen). Gradient and zero: those of `objective`
    at the average; none goes to a teacher.

    Cost: a forward of each teacher whose fixed weight is not 0, about 5 K v operations a position; memory: one more [..., v],
    the K teachers' logits beside it. A geometric mean of teachers that rule out all of each other's tokens is not a number.

    Raises SmeltError for an objective that reads no `teacher`, or that reads more of a teacher than its
    logits; for weights that are not K numbers. Parameters and state of `objective` are its own (made for the first teacher).

    Differs from the paper: there only the two means, with equal weights; the weighting by entropy, label and majority is a
    reconstruction from descriptions of multi-teacher distillation, not checked against an original.
    """

    paper: ClassVar = Paper("Distilling the Knowledge in a Neural Network", "arXiv:1503.02531", "section 1, means of an ensemble")
    zero_at_teacher: ClassVar = True  # as forward_kl, the default
    objective: Any = field(default_factory=ForwardKL)
    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    weights: Literal["uniform", "inverse_entropy", "label_confidence", "majority"] | tuple[float, ...] = "uniform"

    def __post_init__(self) -> None:
        name = type(self.objective).__name__
        if isinstance(self.objective, Procedure):
            raise SmeltError(f"ensemble: {name} decides what is trained on; hold the ensemble in it, not it in the ensemble")
        names = reading(self.objective)
        if not names:
            raise SmeltError(f"ensemble: objective={self.objective!r} is no objective; write one such as forward_kl()")
        if "teacher" not in names:
            raise SmeltError(f"ensemble: {name} reads no teacher's logits, so there is nothing to average; forward_kl() does")
        if more := [n for n in names if n.startswith("teacher_") or n == "teachers"]:
            raise SmeltError(f"ensemble: {name} reads '{more[0]}'; several teachers have their logits averaged and nothing else")
        fixed = () if isinstance(self.weights, str) else self.weights
        if not isinstance(self.weights, str) and (not fixed or min(fixed) < 0 or not 0 < sum(fixed) < float("inf")):
            raise SmeltError(f"ensemble: weights={self.weights}; numbers from 0 with a positive sum, one for each teacher, are expected")

    @property
    def reads(self) -> tuple[str, ...]:
        others = [name for name in reading(self.objective) if name != "teacher"]
        needed = ["labels"] if self.weights == "label_confidence" and "labels" not in others else []
        return ("teachers", *others, *needed)

    @property
    def silent(self) -> frozenset[int]:
        return frozenset() if isinstance(self.weights, str) else frozenset(k for k, weight in enumerate(self.weights) if weight == 0)

    def __call__(self, *, teachers: tuple[Tensor | None, ...], **tensors: Any) -> Tensor:
        if not isinstance(self.weights, str) and len(self.weights) != len(teachers):
            raise SmeltError(f"ensemble: {len(self.weights)} weights for {len(teachers)} teachers")
        teacher = self._average(teachers, tensors.get("labels"))
        names = [name for name in reading(self.objective) if name != "teacher"]
        return self.objective(teacher=teacher, **{name: tensors[name] for name in names})

    def equipment(self, student: Loaded, teacher: Loaded | None) -> nn.Module | None:
        return self.objective.equipment(student, teacher) if isinstance(self.objective, Equipped) else None

    def after(self, equipment: nn.Module, loss: float, progress: float) -> None:
        if isinstance(self.objective, Stateful):
            self.objective.after(equipment, loss, progress)

    @torch.no_grad()
    def _average(self, teachers: tuple[Tensor | None, ...], labels: Tensor | None) -> Tensor:
        """K x [..., v] -> log-probabilities [..., v], or the logits of the first that counts where all are equal."""
        heard = [z for k, z in enumerate(teachers) if z is not None and k not in self.silent]
        first = heard[0]
        flat = [z.reshape(-1, first.shape[-1]) for z in heard]
        answers = None if labels is None else labels.reshape(-1)
        made = torch.empty_like(flat[0], dtype=wide(first[..., :0]).dtype)
        # a slice of the positions at a time, as in `divergence`: K rows of float32 are never there for all of them
        step = max(1, (1 << 20 if first.device.type == "cpu" else 1 << 26) // (4 * first.shape[-1]))
        for at in range(0, len(made), step):
            part = slice(at, at + step)
            rows = torch.stack([wide(z[part]) for z in flat])  # [k, n, v]
            log_p = rows.log_softmax(-1)
            log_w = self._log_weights(log_p, None if answers is None else answers[part])[..., None]  # [k, n, 1]
            if self.mean == "arithmetic":
                mixed = (log_p + log_w).logsumexp(0)
            else:  # no weight, no veto: 0 * -inf is not a number
                mixed = (log_w.exp() * log_p).masked_fill_(log_w == -torch.inf, 0).sum(0).log_softmax(-1)
            same = (rows == rows[:1]).all(0).all(-1, keepdim=True)
            made[part] = torch.where(same, rows[0], mixed)
        return made.view(first.shape)

    def _log_weights(self, log_p: Tensor, labels: Tensor | None) -> Tensor:
        """log w [k, n] from log-probabilities [k, n, v] and labels [n], of the members that are not silent."""
        if not isinstance(self.weights, str):
            given = torch.tensor([weight for weight in self.weights if weight], dtype=log_p.dtype, device=log_p.device)
            return (given / given.sum()).log()[:, None].expand(log_p.shape[:-1])
        if self.weights == "inverse_entropy":
            score = torch.linalg.vecdot(log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0))  # -H
        elif self.weights == "label_confidence":
            assert labels is not None  # it is among `reads`
            score = log_p.gather(-1, labels.expand(len(log_p), -1)[..., None])[..., 0]
            score = score.masked_fill((score == -torch.inf).all(0), 0)  # ruled out by all of them
        elif self.weights == "majority":
            choice = log_p.argmax(-1)
            votes = (choice[:, None] == choice).sum(1)
            score = torch.zeros_like(log_p[..., 0]).masked_fill(votes < votes.amax(0), -torch.inf)
        else:
            score = torch.zeros_like(log_p[..., 0])
        return score.log_softmax(0)
