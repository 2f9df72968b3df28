"""Every position of held-out text with the teacher's logits beside the variant's: the walk of the probes that compare them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from smelt.evaluate import Variant
from smelt.evaluate._score import batches, decoder, logits, sees_only_what_came, windows
from smelt.evaluate._text import encoded, room
from smelt.model._load import same_tokenizer
from smelt.spec import SmeltError

__all__ = ["Beside", "Positions"]

KEPT = 1 << 29  # bytes of teacher answers kept for the next variant; above that the teacher is asked again
SLICE = 256  # positions handed over at once
_answers: WeakKeyDictionary[Any, tuple[Any, list[Tensor]]] = WeakKeyDictionary()


class Positions(NamedTuple):
    """Neighbouring positions of one document: logits [n, v] of both, cut to the columns both have, and the true next ids [n]."""

    document: int
    at: int  # place of the first in its document
    teacher: Tensor
    student: Tensor
    following: Tensor


class Beside:
    """Iterates over `Positions`, each position of the text once. `weights`: how many each document has.

    Text, windows and chunks are those of the probe perplexity, from the fields of `probe` (tokens, document, context, stride,
    batch, prefill, chunk). The teacher reads plainly, its answers serve all variants while they fit `KEPT`; the variant reads
    through its cache when one is bound. Logits are float32 on the variant's device. Raises SmeltError without a teacher, for a
    teacher whose ids mean something else, for one that is the very model an attention method is bound to (it would answer
    through it), and for a model without a language head.
    """

    def __init__(self, variant: Variant, probe: Any, name: str):
        model = decoder(variant, name)
        sees_only_what_came(variant, name)
        if variant.teacher is None:
            raise SmeltError(f"{name} needs a teacher to compare with; there is none")
        if variant.teacher.model is model and variant.attention is not None:
            raise SmeltError(f"{name}: the teacher of '{variant.name}' is the model its attention is bound to; load the teacher apart")
        if not same_tokenizer(variant.tokenizer, variant.teacher.tokenizer):
            raise SmeltError(f"{name}: '{variant.name}' and its teacher do not share a tokenizer, so their ids mean different things")
        self.variant, self.probe = variant, probe
        self.teacher = Variant("teacher", variant.teacher.model, variant.teacher.tokenizer)
        decoder(self.teacher, name)
        self.documents = encoded(variant, probe.tokens, probe.document)
        context = min(room(model, probe.context), room(self.teacher.model, probe.context))
        stride = min(probe.stride, context)
        self.cuts = [(at, *w) for at, d in enumerate(self.documents) for w in windows(len(d.ids), context, stride)]
        self.weights = tuple(float(len(d.ids) - 1) for d in self.documents)

    def __iter__(self) -> Iterator[Positions]:
        probe = self.probe
        rows = [self.documents[at].ids[first:last] for at, first, last, _ in self.cuts]
        kept = _kept(self.teacher, rows, probe.batch)
        for part, ids in batches(self.variant.model, rows, probe.batch):
            answers = [kept[i] for i in part] if kept else next(logits(self.teacher, ids, prefill=1, chunk=1))[1]
            for start, piece in logits(self.variant, ids, prefill=probe.prefill, chunk=probe.chunk):
                for place, index in enumerate(part):
                    document, first, last, done = self.cuts[index]
                    following = torch.tensor(self.documents[document].ids[first + 1 : last + 1], device=piece.device)
                    low, high = max(start, done - first - 1), min(start + piece.shape[1], len(rows[index]))  # each position once
                    for at in range(low, high, SLICE):
                        stop = min(at + SLICE, high)
                        sides = answers[place][at:stop].to(piece.device), piece[place, at - start : stop - start]
                        columns = min(side.shape[-1] for side in sides)
                        teacher, student = (side[:, :columns].float() for side in sides)
                        yield Positions(document, first + at, teacher, student, following[at:stop])


def _kept(teacher: Variant, rows: list[list[int]], batch: int) -> list[Tensor] | None:
    """The teacher's logits of every row, kept while its weights stay as they are; None when they would not fit."""
    model = teacher.model
    head = model.get_output_embeddings().weight
    if sum(map(len, rows)) * head.shape[0] * head.element_size() > KEPT:
        return None
    state = ([(id(p), p._version) for p in model.parameters()], rows, batch)
    if model not in _answers or _answers[model][0] != state:
        found = [torch.empty(0)] * len(rows)
        for part, ids in batches(model, rows, batch):
            answer = next(logits(teacher, ids, prefill=1, chunk=1))[1]
            for place, index in enumerate(part):
                found[index] = answer[place, : len(rows[index])].clone()
        _answers[model] = (state, found)
    return _answers[model][1]
