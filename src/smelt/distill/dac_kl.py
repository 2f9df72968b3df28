"""Learn the dense part of the teacher's distribution, which a small network marks off, and how the tokens of a word hang together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from smelt.distill import Equipped
from smelt.distill._divergence import wide
from smelt.model._load import Loaded
from smelt.spec import Paper

__all__ = ["DacKL"]

START = 4.0  # log-odds of the first band: from 1.8 % to 98.2 % of the teacher's mass


@dataclass(frozen=True)
class DacKL(Equipped):
    """loss = KL(p' || q') + span sum_v (q_v q+_v - p_v p+_v)^2; p' = g p / sum g p, q' = g q / sum g q: a gated band of the teacher.

    p teacher, q student, p+ and q+ the position after it. g_v = sigmoid((x_v - low) / s) sigmoid((high - x_v) / s), and 1 for
    the label; x_v is the log-odds of the teacher's mass of all likelier tokens and half of v's own, s = `softness`. (low,
    high) come from a network that reads the teacher's `classes` largest probabilities: Linear, GELU, Linear, trained with
    the student. A band of (-inf, inf) is forward KL exactly. The second term, for two tokens of one word, both of which
    count, is put at the second of them.

    Shapes: student, teacher [b, t, v], labels, keep [b, t] -> [b, t]; KL in nats, the span term has no unit. Gradient of
    the first term by the student's logits: q' - p'. Zero, with a zero gradient, where p = q.
    Cost: a sort of v and about 30 v operations a position; some eight buffers of the size of the logits.

    Reconstruction, where the paper's summaries leave it open: the size and input of the network; that both clipped
    distributions are normalised again (otherwise p = q would have a gradient); gates on log-odds of the mass, so that the band
    can open fully; the squared L2 norm of the span term; words (runs of letters, digits and underscores) where the paper
    takes phrases of a chunker.
    Differs from the paper: no cross-entropy of the labels is added. The network is trained by the same loss, which a
    narrow band lowers too: nothing but the label in it and the common rate holds it open.
    """

    paper: ClassVar = Paper(
        "Multi-Granularity Semantic Revision for Large Language Model Distillation", "arXiv:2407.10068", "DAC-KL and the span loss"
    )
    zero_at_teacher: ClassVar = True
    span: Annotated[float, Ge(0)] = 1.0  # weight of the span term
    softness: Annotated[float, Gt(0)] = 0.5  # of the band's edges, in log-odds
    classes: Annotated[int, Ge(1)] = 64  # probabilities that the network reads
    hidden: Annotated[int, Ge(1)] = 32  # its width

    def equipment(self, student: Loaded, teacher: Loaded | None) -> nn.Module:
        width = student.model.get_output_embeddings().weight.shape[0]
        return Band(min(self.classes, width), self.hidden, *word_ends(student.tokenizer, width))

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor, keep: Tensor, equipment: Any) -> Tensor:
        log_q, log_p = wide(student).log_softmax(-1), wide(teacher.detach()).log_softmax(-1)
        low, high = equipment(log_p)
        loss = clipped(log_q, log_p, labels, low, high, self.softness)
        if not self.span or labels.shape[-1] < 2:
            return loss
        pairs = keep[:, :-1] & keep[:, 1:] & equipment.ends[labels[:, :-1]] & equipment.starts[labels[:, 1:]]
        apart = spans(log_q[:, :-1][pairs], log_q[:, 1:][pairs], log_p[:, :-1][pairs], log_p[:, 1:][pairs])
        return loss + self.span * torch.zeros_like(loss).masked_scatter(torch.nn.functional.pad(pairs, (1, 0)), apart)


class Band(nn.Module):
    """log p [..., v] -> (low, high) [...], log-odds of the teacher's mass. `starts`, `ends` [v]: tokens a word goes on in."""

    starts: Tensor
    ends: Tensor

    def __init__(self, classes: int, hidden: int, starts: Tensor, ends: Tensor):
        super().__init__()
        self.first, self.last = nn.Linear(classes, hidden), nn.Linear(hidden, 2)
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.copy_(torch.tensor([-START, START]))
        self.register_buffer("starts", starts)
        self.register_buffer("ends", ends)

    def forward(self, log_p: Tensor) -> tuple[Tensor, Tensor]:
        read = log_p.topk(self.first.in_features).values.exp().to(self.first.weight.dtype)
        low, high = self.last(torch.nn.functional.gelu(self.first(read))).to(log_p.dtype).unbind(-1)
        return low, high


def clipped(log_q: Tensor, log_p: Tensor, labels: Tensor, low: Tensor, high: Tensor, softness: float) -> Tensor:
    """KL of the two distributions inside the soft band (low, high) [...] of the teacher's sorted mass; [..., v] -> [...]."""
    log_p, order = log_p.sort(descending=True, stable=True)
    log_q, mass = log_q.gather(-1, order), log_p.exp()
    x = torch.logit(mass.cumsum(-1) - mass / 2, eps=torch.finfo(mass.dtype).eps)
    gate = logsigmoid((x - low[..., None]) / softness) + logsigmoid((high[..., None] - x) / softness)
    gate = gate.masked_fill(order == labels[..., None], 0)
    log_a, log_b = (log_p + gate).log_softmax(-1), (log_q + gate).log_softmax(-1)
    return (log_a.exp() * (log_a - log_b).masked_fill(log_a == -torch.inf, 0)).sum(-1)


def spans(q: Tensor, q_next: Tensor, p: Tensor, p_next: Tensor) -> Tensor:
    """sum_v (q_v q+_v - p_v p+_v)^2 of log-probabilities [n, v] of adjacent positions -> [n]."""
    return ((q + q_next).exp() - (p + p_next).exp()).square().sum(-1)


def word_ends(tokenizer: Any, width: int) -> tuple[Tensor, Tensor]:
    """([width], [width]) bool: tokens that start inside a word, and tokens after which a word may go on."""
    starts, ends = torch.zeros(width, dtype=torch.bool), torch.zeros(width, dtype=torch.bool)
    count = min(width, len(tokenizer))
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[token] for token in range(count)], clean_up_tokenization_spaces=False)
    for token, (text, piece) in enumerate(zip(texts, tokenizer.convert_ids_to_tokens(range(count)), strict=True)):
        if text and token not in special:
            # decoding one token drops the mark by which sentencepiece writes a space
            starts[token] = _in_word(text[0]) and not (piece or "").startswith("\N{LOWER ONE EIGHTH BLOCK}")
            ends[token] = _in_word(text[-1])
    return starts, ends


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
