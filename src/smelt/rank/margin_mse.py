"""A student learns by how much its teacher prefers one passage to another, not what the teacher's scores are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from annotated_types import Gt
from torch import Tensor

from smelt.rank._training import Labelled
from smelt.rank._vectors import Towers
from smelt.rank.embedding import Embedding
from smelt.spec import Paper, SmeltError

__all__ = ["MarginMSE"]


@dataclass(frozen=True)
class MarginMSE(Towers):
    """loss = mean_j ((s_0 - s_j) - scale (t_0 - t_j))^2 over the passages j > 0 of a list, s the student's scores, t the grades.

    Only margins are learned: a constant added to all grades of a query changes nothing, so a teacher of another kind
    fits; its unit does matter, so the student's scores are raw products (`normalize=False` of the held judge). A
    teacher whose scores are cosines wants `scale=20`, or the margins are too small beside raw products.

    `judge` is the embedding() that is trained and asked; asking costs and gives what it does alone. Shapes: scores and
    grades [b, n], keep [b, n] bool -> [b]; a list of one passage loses 0. Cost of a step: that of the judge.

    Raises SmeltError for a judge that is no embedding(), and for one whose vectors are normalised: cosines span 2, no
    teacher's margins do.

    Differs from the paper: lists of any length instead of triples, their first passage against each other one; the
    grades come from the stage's teacher (there the mean of three cross-encoders).
    """

    paper: ClassVar = Paper(
        "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation", "arXiv:2010.02666", "Margin-MSE"
    )
    judge: Any = field(default_factory=lambda: Embedding(normalize=False))
    scale: Annotated[float, Gt(0)] = 1.0  # of the grades
    labels: Any = None  # judge or strategy that the teacher grades lists with
    weights: Any = None  # not read: there are no parameters beside the model's

    def __post_init__(self) -> None:
        if not isinstance(self.judge, Embedding):
            raise SmeltError(f"margin_mse: judge={self.judge!r} is no embedding(); use margin_mse(judge=embedding(normalize=False))")
        if self.judge.normalize:
            raise SmeltError("margin_mse: margins of cosines cannot reach a teacher's; use judge=embedding(normalize=False)")

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        return self.judge.collate(lists, model, context)

    def objective(self, queries: Tensor, passages: Tensor, batch: dict[str, Tensor]) -> Tensor:
        keep = batch["keep"]
        scores = (queries[:, None] * passages.view(*keep.shape, -1)).sum(-1)
        return margins(scores, self.scale * batch["grades"], keep)


def margins(scores: Tensor, grades: Tensor, keep: Tensor) -> Tensor:
    """[b, n] each -> [b], the mean of the squared differences of margins."""
    wrong = (scores[:, :1] - scores[:, 1:]) - (grades[:, :1] - grades[:, 1:])
    return (wrong.square() * keep[:, 1:]).sum(-1) / keep[:, 1:].sum(-1).clamp(min=1)
