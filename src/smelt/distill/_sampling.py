"""Rows that the student writes itself, in the place of rows of the data: the on-policy half of a training."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smelt import registry
from smelt.distill import Procedure
from smelt.distill._divergence import wide
from smelt.distill._holding import reading
from smelt.model._walk import multiplied
from smelt.spec import SmeltError

__all__ = ["Sampler", "finish", "holds", "sampling", "spoken"]

REPLACED = 1  # keeps this draw apart from others made of (seed, row)


class Sampler:
    """`sampler(inputs)`, the `change` of a fit: some rows go on after their first `prompt` tokens as the student would.

    inputs {"input_ids" [b, t], "labels" [b, t], "row" [b]} -> the same keys. Row r is replaced with probability `share`,
    decided by (seed, r) alone; the samples of a micro-batch follow from (seed, its row numbers) and the weights, so a run
    that was killed repeats them. Of a replaced row only sampled tokens are labels, up to and with its first end-of-text
    token; the others are -100. Where all rows are replaced, columns beyond the longest sample are cut. No gradient.
    `revise(tokens [n, s], seed) -> [n, s]` may change the samples.
    """

    def __init__(
        self,
        write: Callable[[Tensor, int, float, int], Tensor],
        eos: int,
        seed: int,
        *,
        share: float,
        prompt: int,
        new: int = 0,
        temperature: float = 1.0,
        single: bool = False,
        revise: Callable[[Tensor, int], Tensor] | None = None,
    ):
        self.write, self.eos, self.seed, self.single, self.revise = write, eos, seed, single, revise
        self.share, self.prompt, self.new, self.temperature = share, prompt, new, temperature

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, labels, rows = inputs["input_ids"], inputs["labels"], inputs["row"].tolist()
        take = [np.random.default_rng([self.seed, row, REPLACED]).random() < self.share for row in rows]
        if not any(take):
            return inputs
        picked = torch.tensor(take, device=ids.device)
        room = ids.shape[1] + 1 - self.prompt
        digest = hashlib.sha256(repr((self.seed, [row for row, taken in zip(rows, take, strict=True) if taken])).encode())
        seed = int.from_bytes(digest.digest()[:6])
        made = self._written(ids[picked, : self.prompt], min(self.new or room, room), seed)
        if self.revise is not None:
            made = self.revise(made, seed)
        whole = made.new_full((len(made), ids.shape[1] + 1), self.eos)
        whole[:, : made.shape[1]] = made
        said = torch.zeros_like(whole, dtype=torch.bool)
        said[:, : made.shape[1]] = spoken(made, self.prompt, self.eos)
        ids, labels = ids.clone(), labels.clone()
        ids[picked], labels[picked] = whole[:, :-1], torch.where(said, whole, -100)[:, 1:]
        last = made.shape[1] - 1 if all(take) else ids.shape[1]
        return inputs | {"input_ids": ids[:, :last], "labels": labels[:, :last]}

    def _written(self, start: Tensor, new: int, seed: int) -> Tensor:
        if not self.single:
            return self.write(start, new, self.temperature, seed)
        texts = [self.write(start[i : i + 1], new, self.temperature, seed + i)[0] for i in range(len(start))]
        return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.eos)


def spoken(tokens: Tensor, prompt: int, eos: int) -> Tensor:
    """[n, s] bool: the tokens after the prompt, up to and with the first end-of-text token among them."""
    said = torch.arange(tokens.shape[1], device=tokens.device) >= prompt
    ends = ((tokens == eos) & said).long()
    return said & (ends.cumsum(1) - ends == 0)


@torch.no_grad()
def finish(model: Any, tokens: Tensor, known: Tensor, temperature: float, seed: int, eos: int) -> Tensor:
    """tokens [n, s] with all after the first known[i] of row i drawn anew from the model, all rows at once.

    One call of the model for all that every row knows, then one per token; a row takes its own tokens until they end. A
    row whose last known token is `eos`, or that draws one, is filled with it. The cache is the one bound to the model.
    """
    training = model.training
    model.eval()
    made, draw = tokens.clone(), torch.Generator(tokens.device).manual_seed(seed)
    ended = made.gather(1, known[:, None] - 1)[:, 0] == eos
    past, read = None, 0
    try:
        for at in range(int(known.min()), made.shape[1]):
            out = model(input_ids=made[:, read:at], past_key_values=past, use_cache=True, logits_to_keep=1)
            past, read = out.past_key_values, at
            drawn = torch.multinomial((wide(out.logits[:, -1]) / temperature).softmax(-1), 1, generator=draw)[:, 0]
            free = known <= at
            made[:, at] = torch.where(free, drawn.masked_fill(ended, eos), made[:, at])
            ended |= free & (made[:, at] == eos)
    finally:
        model.train(training)
    return made


def holds(method: Any, objective: Any) -> None:
    """Raises SmeltError unless the method holds an objective, a cache or none, and a decoding method or none."""
    name = registry.name_of(method)[1]
    if isinstance(objective, Procedure) or not reading(objective):
        raise SmeltError(f"{name}: it trains by an objective, such as forward_kl(); {str(objective)[:60]} is none")
    for family in ("cache", "decode"):
        value = getattr(method, family, None)
        if value is not None and (isinstance(value, str) or registry.name_of(value)[0] != family):
            raise SmeltError(f"{name}: {family} holds {str(value)[:60]}, which is no method of the family {family}")


@contextlib.contextmanager
def sampling(
    course: Any, method: Any, share: float, revise: Callable[[Tensor, int], Tensor] | None = None, passes: float = 1.0
) -> Iterator[tuple[Sampler, float]]:
    """(the `change` of `course.fit`, FLOPs of the samples of a whole fit) for a method with prompt, new, temperature, cache, decode.

    `passes` of the student go over every sampled row. Raises SmeltError for what would be sampled from the wrong
    weights or in the wrong places: sharded weights, rows of several documents, a prompt that fills the row.
    """
    asked, name = course.settings, registry.name_of(method)[1]
    if course.fsdp or asked.shard == "fsdp2":
        raise SmeltError(f"{name}: the student writes while it learns, which needs whole weights; leave out 'shard: fsdp2'")
    if asked.boundaries == "mask":
        raise SmeltError(f"{name}: samples go on from whole rows, so documents cannot be kept apart; leave out 'boundaries: mask'")
    if method.prompt > asked.context:
        raise SmeltError(f"{name}: prompt={method.prompt} leaves nothing to sample in rows of context={asked.context}")
    eos = course.student.tokenizer.eos_token_id
    room = asked.context + 1 - method.prompt
    length = method.prompt + min(method.new or room, room)
    # methods that take tokens back work on one row at a time in transformers
    single = method.decode is not None and method.decode.crops
    with course.generating(cache=method.cache, decode=method.decode) as write:
        change = Sampler(
            write, eos, course.seed, share=share, prompt=method.prompt, new=method.new, temperature=method.temperature,
            single=single, revise=revise,
        )  # fmt: skip
        yield change, 2 * multiplied(course.student.model) * passes * share * asked.steps * asked.batch * length
