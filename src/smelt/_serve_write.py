"""Writing answers: tokens into text that may be sent already; several requests as rows of one batch that come and go
(`_serve_flight.py`), or one call of `generate` where something is bound to the model or a seed is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smelt._serve_engine import Done, Job
from smelt._serve_flight import fly, rule

__all__ = ["Choice", "Growing", "Writing"]

HELD = 64  # tokens that may wait for the rest of a character; a character has at most 4 bytes


class Growing:
    """The text of an answer while its tokens come in: whole characters only, and nothing that may belong to a stop string.

    The text is cut before the stop string that begins first. The pieces joined are the text of the whole answer, and
    the text does not depend on the pieces it came in. Cost: each token is decoded twice, with the few before it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.longest = max(map(len, self.stops), default=0)
        self.ids: list[int] = []
        self.text, self.sent, self.stopped = "", 0, False
        self._start = self._known = 0  # ids[start:known] is decoded again with what is new: a token's text depends on those before it

    def put(self, token: int) -> None:
        self.ids.append(token)
        self._grow(last=False)

    def ready(self, last: bool = False) -> str:
        """What can be sent now and was not yet."""
        if last and not self.stopped:
            self._grow(last=True)
        end = len(self.text) if last or self.stopped else len(self.text) - self._open()
        piece = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return piece

    def _grow(self, last: bool) -> None:
        before = self._decode(self.ids[self._start : self._known])
        now = self._decode(self.ids[self._start :])
        if now.endswith("\ufffd") and not last and len(self.ids) - self._known <= HELD:
            return  # perhaps the first bytes of a character
        begin = max(0, len(self.text) - self.longest + 1)
        self.text += now[len(before) :]
        self._start, self._known = self._known, len(self.ids)
        found = [at for stop in self.stops if (at := self.text.find(stop, begin)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _open(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        for count in range(min(self.longest - 1, len(self.text)), 0, -1):
            tail = self.text[-count:]
            if any(stop.startswith(tail) for stop in self.stops):
                return count
        return 0

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""


class Choice(NamedTuple):
    """How tokens are chosen. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def sampled(self) -> bool:
        return self.temperature > 0 and self.top_p > 0

    def options(self) -> dict[str, Any]:
        """Of `generate`. top_k=0: transformers would cut to the 50 likeliest tokens where nobody says."""
        if not self.sampled:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class Writing(Job):
    """One answer. `alone`: whatever is bound to the model sees one text at a time."""

    def __init__(self, tokenizer: Any, ids: list[int], most: int, choice: Choice, stops: Sequence[str], seconds: float, alone: bool):
        # The generator is one for all: a seeded request in company would depend on the others.
        super().__init__(seconds, None if alone or (choice.sampled and choice.seed is not None) else Writing)
        self.ids, self.most, self.choice = ids, most, choice if choice.sampled else Choice(0.0)  # a seed changes nothing there
        self.growing = Growing(tokenizer, stops)

    def put(self, token: int, ends: frozenset[int]) -> None:
        if self.over:
            return
        self.growing.put(token)
        made = len(self.growing.ids)
        ended = token in ends
        if ended or self.growing.stopped or made >= self.most:
            self.finish(ended)
        elif piece := self.growing.ready():
            self.deliver(piece)

    def finish(self, ended: bool) -> None:
        if self.over:
            return
        if piece := self.growing.ready(last=True):
            self.deliver(piece)
        self.deliver(Done("stop" if ended or self.growing.stopped else "length", len(self.ids), len(self.growing.ids)))

    def run(self, model: Any, jobs: Sequence[Job], join: Callable[[int], Sequence[Any]]) -> None:
        writings = [job for job in jobs if isinstance(job, Writing)]

        @lru_cache(maxsize=64)  # a run that others join may last for hours
        def ruled(choice: Choice) -> Any:
            return rule(model, choice.options())

        if self.together is not None and ruled(self.choice) is not None:
            fly(model, writings, ruled, _ends(model), join)
            return
        for choice in dict.fromkeys(writing.choice for writing in writings):
            some = [writing for writing in writings if writing.choice == choice]
            if not choice.sampled or choice.seed is None:
                _write(model, some, choice.options())
                continue
            devices = [model.device] if model.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(choice.seed)
                _write(model, some, choice.options())


class _Enough(Exception):
    """Every answer of this call is over."""


class _Follow:
    """What `generate` tells about its tokens, as its streamer and its stopping criterion at once.

    The streamer is where a token is final, whatever loop wrote it. Once all answers are over (by an end, a stop string,
    a cut connection) the next token ends the call by an exception, which no loop can overlook; the criterion says the
    same to loops that put their tokens at the very end.
    """

    def __init__(self, writings: Sequence[Writing], ends: frozenset[int]):
        self.writings, self.ends = writings, ends

    def put(self, value: Tensor) -> None:
        if value.dim() > 1:  # the prompt
            return
        tokens = value.tolist()
        for writing, token in zip(self.writings if len(self.writings) > 1 else [self.writings[0]] * len(tokens), tokens, strict=True):
            writing.put(token, self.ends)
        if all(writing.over for writing in self.writings):
            raise _Enough

    def end(self) -> None:
        pass

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        over = all(writing.over for writing in self.writings)
        return torch.full((input_ids.shape[0],), over, dtype=torch.bool, device=input_ids.device)


def _ends(model: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _write(model: Any, writings: Sequence[Writing], options: dict[str, Any]) -> None:
    """One call of generate. Shorter prompts are padded on the left, out of sight of the mask."""
    follow = _Follow(writings, _ends(model))
    pad = model.generation_config.pad_token_id
    pad = 0 if pad is None else pad
    length = max(len(writing.ids) for writing in writings)
    rows = [[pad] * (length - len(writing.ids)) + writing.ids for writing in writings]
    seen = [[0] * (length - len(writing.ids)) + [1] * len(writing.ids) for writing in writings]
    try:
        made = model.generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(seen, device=model.device),
            max_new_tokens=max(writing.most for writing in writings),
            pad_token_id=pad,
            streamer=follow,
            stopping_criteria=[follow],
            **options,
        )
    except _Enough:
        return
    made = getattr(made, "sequences", made)
    for writing, row in zip(writings, made[:, length:].tolist(), strict=True):
        for token in row[len(writing.growing.ids) :]:  # a loop that shows a streamer nothing, or not all
            writing.put(token, follow.ends)
        writing.finish(ended=True)  # a loop that had nothing more to say before the limit
