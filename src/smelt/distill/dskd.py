"""Distil in both models' spaces: each hidden state goes through the other model's head, so that heads and vocabularies agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt, Interval
from torch import Tensor, nn

from smelt.distill import Composed, Equipped
from smelt.distill._alignment import pieces, shared, spans
from smelt.distill._divergence import wide
from smelt.distill._dual_space import attention, pooled, projection, scaled
from smelt.distill._holding import token_divergence
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.model._load import Loaded
from smelt.spec import Paper, SmeltError

__all__ = ["DSKD"]

READING = (
    "student",
    "teacher",
    "labels",
    "keep",
    "progress",
    "equipment",
    "student_hidden",
    "teacher_hidden",
    "student_head",
    "teacher_head",
)
FOREIGN = ("student_ids", "teacher_ids", "teacher_labels", "teacher_keep")


@dataclass(frozen=True)
class DSKD(Equipped, Composed):
    """loss = (1 - rate) CE(z_q, x) + rate [CE(u, y) + D(z_q, sg u) + D'(v, z_p)], u = P_ts(H) W_s^T, v = P_st(h) W_t^T, nats per token.

    h, H: what the heads read; W_s, W_t the heads, sg = without gradient (heads always, the teacher always). CE(u, y) trains
    P_ts alone, the second term the student alone, the third student and P_st. D(a, b) = `divergence` of a / T and b / T,
    without a factor T^2. Shapes: h [b, t, d], H [b, s, D], logits [b, t, v], [b, s, w] -> [b, t].

    version v1: linear projectors, y = x, D' = forward KL. v2: P_ts starts as W_t^T W_s (W_s^T W_s)^+ over the common
    tokens, P_st = W_s^T W_t (W_t^T W_t)^+ follows the student's head and is not learned, y = the teacher's choice, D' = D;
    while u chooses y at a share of positions up to `threshold`, D averages over those where it does.
    alignment: `position` needs one vocabulary. `cma` (v1): attention between index vectors [E(id); E(label)], detached,
    queries projected; D counts where u chooses x; D' of a row's teacher positions is spread over its own. `eta` (v2):
    positions where both start the same token at the same byte, and the teacher's choice is a token of both, are
    compared; the terms average over them. Averages are of a micro-batch.

    Cost: 2 b t d D a projector, three more softmaxes of v or w; cma 4 t s D a row. Start v2: one inverse, D^3 + d^3.
    `warmup`: until this share of the training only CE(z_q, x) and CE(u, y) count, so that u means something first.
    Raises SmeltError for other pairs of version and alignment, a divergence that reads more than two logits, no common token.

    Differs from the paper: projectors without bias, started at N(0, 1 / columns); std of cma over kept positions, not padding;
    tokens compared by their bytes; one learning rate for student and projectors; no sampling from the student.
    """

    paper: ClassVar = Paper(
        "Dual-Space Knowledge Distillation for Large Language Models", "arXiv:2406.17328", "section 3; v2: arXiv:2504.11426"
    )
    zero_at_teacher: ClassVar = False
    version: Literal["v1", "v2"] = "v1"
    alignment: Literal["position", "cma", "eta"] = "position"
    divergence: Any = field(default_factory=ForwardKL)
    rate: Annotated[float, Interval(gt=0, le=1)] = 0.5
    temperature: Annotated[float, Gt(0)] = 2.0
    threshold: Annotated[float, Interval(ge=0, le=1)] = 1.0
    warmup: Annotated[float, Interval(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        if (self.version, self.alignment) in (("v1", "eta"), ("v2", "cma")):
            raise SmeltError(f"dskd: version={self.version} has no alignment={self.alignment}; cma belongs to v1, eta to v2")
        token_divergence(self.divergence, "dskd: divergence")

    @property
    def reads(self) -> tuple[str, ...]:
        embeddings = ("student_embedding", "teacher_embedding") if self.alignment == "cma" else ()
        return (*READING, *(FOREIGN if self.alignment != "position" else ()), *embeddings)

    def equipment(self, student: Loaded, teacher: Loaded | None) -> nn.Module:
        assert teacher is not None  # the loop refuses a missing teacher first
        heads = [one.model.get_output_embeddings().weight.detach() for one in (student, teacher)]
        wide_of = [one.model.get_input_embeddings().weight.shape[1] for one in (student, teacher)]
        made = _Spaces(heads[0].shape[1], heads[1].shape[1], wide_of if self.alignment == "cma" else None, learned=self.version == "v1")
        made = made.to(torch.promote_types(heads[0].dtype, torch.float32))
        if self.version == "v2":
            mine, theirs = (pieces(one.tokenizer, len(head)) for one, head in zip((student, teacher), heads, strict=True))
            made.know(mine, theirs, heads[0], heads[1])
        return made

    def __call__(
        self, *, student: Tensor, teacher: Tensor, labels: Tensor, keep: Tensor, progress: float, equipment: Any, **have: Any
    ) -> Tensor:
        dtype = equipment.down.weight.dtype
        teacher = teacher.detach()
        head, their_head = (have[name].detach().to(dtype) for name in ("student_head", "teacher_head"))
        their_head = their_head[: teacher.shape[-1]]  # a wider teacher's logits are cut
        mine, theirs = have["student_hidden"][-1].to(dtype), have["teacher_hidden"][-1].detach().to(dtype)
        there, target, weights = keep, labels, None
        if self.alignment == "eta":
            at, target, there = _exact(equipment, teacher, labels, keep, have)
            row = torch.arange(len(at), device=at.device)[:, None]
            theirs, teacher = theirs[row, at], teacher[row, at]
        elif self.version == "v2":
            target = teacher.argmax(-1)
        if self.alignment == "cma":
            weights = self.attention(equipment, labels, keep, have)
            label = have["teacher_embedding"].detach().to(dtype)[have["teacher_labels"]]
            kept = have["teacher_keep"]
            projected = weights[0].to(dtype) @ equipment.down(scaled(theirs, kept) + scaled(label, kept))
        else:
            projected = equipment.down(theirs)
        u = projected @ head.mT
        loss = CrossEntropy()(u, target)
        shown = u.detach()
        said = (shown.argmax(-1) == target) & there
        near = self._apart(self.divergence, student, shown)
        if self.version == "v2" and said.sum() <= self.threshold * there.sum():
            near = near * said * _ratio(there, said, near)
        elif self.alignment == "cma":
            near = near * said
        hidden = mine @ equipment.back(head, their_head) if self.version == "v2" else equipment.up(mine)
        if weights is not None:
            hidden = weights[1].to(dtype) @ hidden
        far = self._apart(self.divergence if self.version == "v2" else ForwardKL(), hidden @ their_head.mT, teacher)
        far = far if weights is None else pooled(far, have["teacher_keep"], keep)
        loss = loss + (progress >= self.warmup) * (near + far)  # times zero: DDP wants a gradient of every projector
        if self.alignment == "eta":
            loss = torch.where(there, loss, 0.0) * _ratio(keep, there, loss)
        return (1 - self.rate) * CrossEntropy()(student, labels) + self.rate * loss

    def _apart(self, divergence: Any, student: Tensor, teacher: Tensor) -> Tensor:
        return divergence(student=wide(student) / self.temperature, teacher=wide(teacher) / self.temperature)

    def attention(self, equipment: Any, labels: Tensor, keep: Tensor, have: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What each position takes of the other side's: (of the teacher's [b, t, s], of the student's [b, s, t])."""
        dtype = equipment.down.weight.dtype
        mine, theirs = (have[name].detach().to(dtype) for name in ("student_embedding", "teacher_embedding"))
        query = torch.cat([mine[have["student_ids"]], mine[labels]], -1)
        key = torch.cat([theirs[have["teacher_ids"]], theirs[have["teacher_labels"]]], -1)
        return attention(equipment.query(query), scaled(key, have["teacher_keep"]), keep, have["teacher_keep"])


def _ratio(all_: Tensor, some: Tensor, like: Tensor) -> Tensor:
    return all_.sum().to(like.dtype) / some.sum().clamp(min=1)


def _exact(known: Any, teacher: Tensor, labels: Tensor, keep: Tensor, have: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """([b, t] the teacher's position beside each of the student's, its choice there as the student's id, where both hold)."""
    starts, theirs = spans(have["student_ids"], known.sizes), spans(have["teacher_ids"], known.their_sizes)
    at = torch.searchsorted(theirs, starts).clamp(max=theirs.shape[1] - 1)
    same = (theirs.gather(1, at) == starts) & (known.shared[have["teacher_labels"].gather(1, at)] == labels)
    choice = known.shared[teacher.argmax(-1)].gather(1, at)
    there = keep & have["teacher_keep"].gather(1, at) & same & (choice >= 0)
    return at, choice.clamp(min=0), there


class _Spaces(nn.Module):
    """The projectors of both directions; for v2 what the vocabularies have in common."""

    down: nn.Linear
    gram: Tensor
    shared: Tensor

    def __init__(self, mine: int, theirs: int, embeddings: list[int] | None, learned: bool):
        super().__init__()
        sizes = {"down": (theirs, mine)} | ({"up": (mine, theirs)} if learned else {})
        if embeddings is not None:
            if embeddings[1] != theirs:
                raise SmeltError(f"dskd: cma adds the teacher's embeddings ({embeddings[1]} wide) to its hidden states ({theirs} wide)")
            sizes["query"] = (2 * embeddings[0], 2 * embeddings[1])
        for name, (given, out) in sizes.items():
            layer = nn.utils.skip_init(nn.Linear, given, out, bias=False)
            nn.init.normal_(layer.weight, std=given**-0.5)
            setattr(self, name, layer)

    def know(self, mine: list[bytes], theirs: list[bytes], head: Tensor, their_head: Tensor) -> None:
        """`shared`: the student's id of each of the teacher's, -1 where there is none; P_ts from both heads, (W_t^T W_t)^+."""
        common = shared(theirs, mine)
        if not (common >= 0).any():
            raise SmeltError("dskd: the two vocabularies have no token in common; take alignment='cma'")
        for name, side in (("sizes", mine), ("their_sizes", theirs)):
            self.register_buffer(name, torch.tensor([len(piece) for piece in side]))
        self.register_buffer("shared", common)
        common = common.to(head.device)
        own, their = head.double()[common[common >= 0]], their_head.double()[common >= 0]
        with torch.no_grad():
            self.down.weight.copy_(projection(their, own).mT)
        self.register_buffer("gram", torch.linalg.pinv(their.mT @ their, hermitian=True).to(self.down.weight.dtype))

    def back(self, head: Tensor, their_head: Tensor) -> Tensor:
        """P_st [d, D] of the student's head as it is now."""
        common = self.shared[: len(their_head)]
        return projection(head[common[common >= 0]], their_head[common >= 0], self.gram)
