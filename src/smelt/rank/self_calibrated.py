"""Listwise scores that mean the same in every window, taught by scores that do not see the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from smelt.rank import Answer, Asked, Scoring, _training
from smelt.rank._blocks import MARK, TAIL, Blocks, compose, mask, read, stack
from smelt.rank._order import by_digest, sort
from smelt.rank._reading import needs_decoder
from smelt.rank._training import Labelled, Learns, weighted_ranknet
from smelt.spec import Paper, SmeltError

__all__ = ["SelfCalibrated"]

REQUEST = f"Judge how well each passage answers the query. Query: {MARK}\n\n{MARK}\nQuery: {MARK}\nThe passages, one after the other:"
CLOSING = "\n>"  # its last token is where a passage has been read with the query and nothing else


@dataclass(frozen=True)
class SelfCalibrated(Scoring, Learns):
    """y_i = v h(slot_i) + c, and z_i = u h(end of passage i) + b: one listwise score that sees the window, one pointwise that cannot.

    A reconstruction: the paper has no public code, and of its method only the parts are published (list-view and
    point-view scores, parallel encoding of the passages, calibration of the first by the second). Read side by side, a
    passage sees the instruction, the query and itself, so z does not depend on the window; its identifier follows it. After
    the query written again stands one slot per passage, its identifier, which sees all passages: there y is read. `view`
    says which of the two are the scores. Both compare across calls: z by construction, y as far as it was calibrated.

    L = L_list + L_point + gamma beta L_cal for each list, dealt into `windows` windows that do not see each other:
    L_list    mean over windows of 2 / m(m-1) sum_{g_i > g_j} softplus(y_j - y_i) / (r_i + r_j), r the places by grade
    L_point   -log of the softmax of z at the best passages, against the lesser ones of all lists of the batch
    L_cal     KL(softmax(z) || softmax(y)) over all windows of the list, z fixed: L_list leaves each window of y a free constant
    gamma     1 where z puts a best passage first, else the softmax mass z gives the best ones

    Scores [n] float32 on CPU. Cost: one forward over the passages' tokens, linear in their number (`_blocks.read`), and
    3 to 5 tokens per slot; `view="point"` reads no slots. Calls of disjoint windows do not wait for each other.

    Raises SmeltError for a model that is no decoder, for heads that were not trained, for passages that find no room,
    and for scores that are not finite. Differs from the paper, as far as that is known: the linear heads, the slots, the
    direction of L_cal, gamma, and L_point with the negatives of other queries are choices of ours; passages are dealt in
    an order drawn from their texts, since slots are read one after the other and would learn the order given.
    """

    paper: ClassVar = Paper("Self-Calibrated Listwise Reranking with Large Language Models", "arXiv:2411.04602", "abstract and figure 2")
    comparable: ClassVar[bool] = True
    windowed: ClassVar[bool] = True  # list-view scores see the window
    view: Literal["list", "point"] = "list"
    length: Annotated[int, Ge(1)] = 160  # tokens kept of each passage
    windows: Annotated[int, Ge(1)] = 2
    beta: Annotated[float, Ge(0)] = 1.0
    labels: Any = None  # judge or strategy of the teacher that grades what is trained on; None: the grades of the data
    weights: Any = None  # folder with the trained heads, judge.safetensors; None: that of the model

    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        return sort(self.scores(asked, model))

    @torch.no_grad()
    def scores(self, asked: Sequence[Asked], model: Any) -> list[Tensor]:
        needs_decoder(model, "self_calibrated")
        heads: Any = _training.read(self, model)
        found = [torch.empty(0)] * len(asked)
        laid = [self._lay(one.query, one.passages, model) for one in asked]
        for part in read(model, [blocks for blocks, _, _ in laid], tails=self.view == "list"):
            for at, which in enumerate(part.which):
                blocks, ends, slots = laid[which]
                if self.view == "point":
                    hidden = part.hidden[at, ends.to(part.hidden.device)]
                else:
                    before = int((blocks.segment != TAIL).sum())
                    hidden = part.output.last_hidden_state[at, (slots - before).to(part.hidden.device)]
                found[which] = heads[self.view](hidden.float())[:, 0].cpu()
        if not all(bool(torch.isfinite(s).all()) for s in found):
            raise SmeltError("self_calibrated: the model's scores are not finite")
        return found

    def heads(self, config: Any) -> nn.Module:
        return nn.ModuleDict({"point": nn.Linear(config.hidden_size, 1), "list": nn.Linear(config.hidden_size, 1)})

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """`windows` rows for each list: ids, positions, segment [rows, t]; grades, and ends and slots, places in a row, [rows, n], -1 where
        there is no passage."""
        rows, grades = [], []
        for one in lists:
            order = by_digest(one.query, one.passages, one.turn)
            for window in (order[at :: self.windows] for at in range(self.windows)):
                rows.append(self._lay(one.query, [one.passages[i] for i in window], model, context // self.windows))
                grades.append(torch.tensor([float(one.grades[i]) for i in window]))
        blocks, ends, slots = zip(*rows, strict=True)
        places = {name: pad_sequence(list(held), True, -1) for name, held in (("grades", grades), ("ends", ends), ("slots", slots))}
        return {**stack(blocks)._asdict(), **places}

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        options = {"attention_mask": mask(batch["segment"], model.dtype), "position_ids": batch["positions"], "use_cache": False}
        hidden = model.base_model(input_ids=batch["ids"], **options).last_hidden_state.float()
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        z, y = (heads[name](hidden[rows, batch[at].clamp(min=0)])[..., 0] for name, at in (("point", "ends"), ("list", "slots")))
        shape = (-1, self.windows, z.shape[1])
        return calibrated(y.view(shape), z.view(shape), batch["grades"].view(shape), batch["ends"].view(shape) >= 0, self.beta)

    def _lay(self, query: str, passages: Sequence[str], model: Any, total: int | None = None) -> tuple[Blocks, Tensor, Tensor]:
        """The prompt, and in its ids where each passage ends (before its identifier) and the last token of its slot."""
        names = [f" [{i}]" for i in range(1, len(passages) + 1)]
        slots = model.tokenizer(names, add_special_tokens=False, verbose=False)["input_ids"] if names else []
        parts = [("", text, CLOSING, name) for text, name in zip(passages, names, strict=True)]
        after = [i for slot in slots for i in slot]
        blocks = compose(model, REQUEST, query, parts, "", after=after, length=self.length, total=total)
        sizes = torch.unique_consecutive(blocks.segment, return_counts=True)[1]
        lengths = torch.tensor([len(slot) for slot in slots], dtype=torch.long)
        return blocks, sizes.cumsum(0)[1:-1] - lengths - 1, len(blocks.ids) - len(after) + lengths.cumsum(0) - 1


def calibrated(y: Tensor, z: Tensor, grades: Tensor, there: Tensor, beta: float) -> Tensor:
    """[lists, windows, n] each -> [lists]; `there` marks the passages."""
    count = there.sum(-1)
    listed = weighted_ranknet(y, grades, there).sum(1) / (count > 1).sum(1).clamp(min=1)

    y, z, grades, there = (t.flatten(1) for t in (y, z, grades, there))
    best = there & (grades == grades.masked_fill(~there, -torch.inf).amax(1, keepdim=True))
    good = z.masked_fill(~best, -torch.inf).logsumexp(1)
    bad = z.masked_fill(~there | best, -torch.inf).flatten().logsumexp(0)
    point = torch.logaddexp(good, bad) - good

    held = z.detach().masked_fill(~there, -torch.inf).log_softmax(1)
    gap = held.masked_fill(~there, 0) - y.masked_fill(~there, -torch.inf).log_softmax(1).masked_fill(~there, 0)
    first = best.gather(1, held.argmax(1, keepdim=True))[:, 0]
    gamma = torch.where(first, 1.0, (held.exp() * best).sum(1))
    return listed + point + gamma * beta * (held.exp() * gap).sum(1)
