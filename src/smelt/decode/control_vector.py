"""A direction in the states of a model that stands for one trait: read it, push along it, or take it out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from smelt.decode import Steered
from smelt.model._walk import blocks
from smelt.spec import Paper, SmeltError

__all__ = ["ControlVector"]

BATCH = 16  # texts read at once


class Directions(NamedTuple):
    layers: tuple[int, ...]
    vectors: Tensor  # [layers, D] float32, unit length, towards the positive texts
    sizes: Tensor  # [layers] float32, mean ||h_l|| of the texts' last tokens


@dataclass(frozen=True)
class ControlVector(Steered):
    """h_l <- h_l + strength * m_l * v_l; v_l = +-PC1 of (h_l+ - h_l-) over the pairs, |v_l| = 1, m_l = mean ||h_l||.

    h_l [D] the output of block l at the last token of a text. direction="pca": the first principal component of the
    differences and their negatives (so they are not centred: their common part is what is looked for), turned so that the
    positive texts lie higher on average; "mean": their mean. The norm of h_l grows with depth, hence the unit m_l.
    mode="erase": h - (h . v) v, `strength` unused; "piecewise": h + sign(h . v) strength m v, away from the middle.
    keep_norm: each state is scaled back to the norm it had. All positions are steered, the prompt's too: bind before
    reading it, a cache read before keeps its old keys. strength=0 (except with erase) puts no hook on.

    Texts are `positive` and `negative`, pair by pair, or `pairs`, a JSONL file of {"positive": ..., "negative": ...}.
    `layers` counts from 0; () is the middle third. `read` gives the score h . v / m, mean over the layers, of any texts,
    and `detection` the chance that a positive text scores above a negative one (AUC).

    Cost: fitting reads each text once; layers * D numbers; one addition (erase: two products) of D per layer and token.
    Raises SmeltError without texts or tokenizer, for unequal sides, pairs that cannot be read or do not differ, no such layer.

    Measured on the embedded model, imports against classes: AUC 1.0 on held-out modules; strength 0.25 moves the log-odds of
    the two words from 1.5 to 3.2 at layer 4 alone, to 4.9 at layers 2 to 4, at 1.11 and 2.6 of the perplexity: pushes add
    up. A random direction moves them 0.22 as much on the mean at the one layer, 0.35 at the three.

    Differs from the paper: the texts are given as they are, where it fills templates; layers are settings, not searched.
    """

    paper: ClassVar = Paper(
        "Representation Engineering: A Top-Down Approach to AI Transparency", "arXiv:2310.01405", "sections 3.1 and 3.2"
    )
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    pairs: str = ""  # a JSONL file instead
    strength: float = 0.1  # in units of mean ||h_l||; below 0 away from the positive texts
    direction: Literal["pca", "mean"] = "pca"
    mode: Literal["add", "erase", "piecewise"] = "add"
    layers: tuple[Annotated[int, Ge(0)], ...] = ()
    keep_norm: bool = False

    def __post_init__(self) -> None:
        if bool(self.pairs) == bool(self.positive or self.negative):
            raise SmeltError("control_vector: give positive=(...) and negative=(...), or pairs='file.jsonl'")
        if len(self.positive) != len(self.negative):
            raise SmeltError(f"control_vector: {len(self.positive)} positive and {len(self.negative)} negative texts; pairs are needed")

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        return {}

    @contextmanager
    def attach(self, model: Any, tokenizer: Any) -> Iterator[None]:
        if not self.strength and self.mode != "erase":
            yield
            return
        with steering(model, self.fit(model, tokenizer), self.change):
            yield

    def fit(self, model: Any, tokenizer: Any) -> Directions:
        if tokenizer is None:
            raise SmeltError("control_vector: reading its texts needs the model's tokenizer")
        count = len(blocks(model))
        layers = self.layers or tuple(range(count // 3, max(count // 3 + 1, 2 * count // 3)))
        if max(layers) >= count:
            raise SmeltError(f"control_vector: there is no layer {max(layers)}; the model has {count}, counted from 0")
        positive, negative = _pairs(Path(self.pairs)) if self.pairs else (self.positive, self.negative)
        states = last_states(model, tokenizer, [*positive, *negative], layers)
        differences = states[:, : len(positive)] - states[:, len(positive) :]
        mean = differences.mean(1)
        vectors = mean if self.direction == "mean" else torch.linalg.svd(differences, full_matrices=False).Vh[:, 0]
        vectors = torch.where((vectors * mean).sum(-1, keepdim=True) < 0, -vectors, vectors)
        sizes = states.norm(dim=-1).mean(1)
        largest = mean.norm(dim=-1) if self.direction == "mean" else differences.norm(dim=-1).amax(1)
        for layer, size, change in zip(layers, sizes.tolist(), largest.tolist(), strict=True):
            if change <= 1e-6 * size:
                raise SmeltError(f"control_vector: the positive and the negative texts have no direction between them at layer {layer}")
        return Directions(layers, torch.nn.functional.normalize(vectors, dim=-1).float(), sizes.float())

    def change(self, states: Tensor, vector: Tensor, size: Tensor) -> Tensor:
        """Steered states [..., D], float32."""
        along = (states * vector).sum(-1, keepdim=True)
        if self.mode == "erase":
            found = states - along * vector
        else:
            push = self.strength * size * vector
            found = states + (along.sign() * push if self.mode == "piecewise" else push)
        if self.keep_norm:
            found = found * (states.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True).clamp_min(1e-30))
        return found

    def read(self, model: Any, tokenizer: Any, texts: Sequence[str], directions: Directions | None = None) -> Tensor:
        """Scores [n], float64: how far towards the positive texts each is, in units of mean ||h_l||. Fits unless given."""
        layers, vectors, sizes = directions or self.fit(model, tokenizer)
        states = last_states(model, tokenizer, texts, layers)
        return ((states * vectors.double()[:, None]).sum(-1) / sizes.double()[:, None]).mean(0)

    def detection(self, model: Any, tokenizer: Any, positive: Sequence[str], negative: Sequence[str]) -> float:
        """AUC: the share of pairs of a positive and a negative text that `read` puts in order; equal scores count half."""
        scores = self.read(model, tokenizer, [*positive, *negative])
        above, below = scores[: len(positive), None], scores[None, len(positive) :]
        return float(((above > below).double() + (above == below).double() / 2).mean())

    @classmethod
    def example(cls, draft: Path) -> ControlVector:
        return cls(positive=("import os", "import re, sys"), negative=("class A:", "class B(A):"))


@contextmanager
def steering(model: Any, directions: Directions, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Hooks that put `change(states, vector, size)` in the place of what the chosen blocks give."""

    def hook(vector: Tensor, size: Tensor) -> Callable[[Any, tuple, Any], Any]:
        def steer(_: Any, __: tuple, out: Any) -> Any:
            states = out[0] if isinstance(out, tuple) else out
            found = change(states.float(), vector.to(states.device), size.to(states.device)).to(states.dtype)
            return (found, *out[1:]) if isinstance(out, tuple) else found

        return steer

    with ExitStack() as undo:
        for layer, vector, size in zip(*directions, strict=True):
            # prepended, so that hooks that only read the states see what the next block does
            undo.callback(blocks(model)[layer].register_forward_hook(hook(vector, size), prepend=True).remove)
        yield


@torch.no_grad()
def last_states(model: Any, tokenizer: Any, texts: Sequence[str], layers: Sequence[int]) -> Tensor:
    """States [layers, n, D] of each text's last token, float64 on the CPU. Padded on the right, which causality hides."""
    rows = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    for text, ids in zip(texts, rows, strict=True):
        if not ids:
            raise SmeltError(f"control_vector: the text {text[:60]!r} has no token")
    found: list[Tensor] = []
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        ends = torch.tensor([len(ids) - 1 for ids in part])
        padded = pad_sequence([torch.tensor(ids) for ids in part], batch_first=True)
        seen: dict[int, Tensor] = {}
        with ExitStack() as undo:
            for layer in layers:
                undo.callback(blocks(model)[layer].register_forward_hook(partial(_keep, seen, layer, ends)).remove)
            model.base_model(input_ids=padded.to(model.device), use_cache=False)
        found.append(torch.stack([seen[layer] for layer in layers]))
    return torch.cat(found, 1)


def _keep(seen: dict[int, Tensor], layer: int, ends: Tensor, _: Any, __: tuple, out: Any) -> None:
    states = (out[0] if isinstance(out, tuple) else out).detach().cpu()
    seen[layer] = states[torch.arange(len(ends)), ends].double()


def _pairs(file: Path) -> tuple[list[str], list[str]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines, which also cuts inside strings
    except (OSError, UnicodeDecodeError) as error:
        raise SmeltError(f"control_vector: pairs cannot be read: {error}", file=str(file)) from None
    sides: tuple[list[str], list[str]] = ([], [])
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                texts = row["positive"], row["negative"]
            except (ValueError, KeyError, TypeError):
                texts = (None, None)
            if not all(isinstance(text, str) for text in texts):
                raise SmeltError('each line is {"positive": "...", "negative": "..."}', file=str(file), line=number)
            for side, text in zip(sides, texts, strict=True):
                side.append(text)
    if not sides[0]:
        raise SmeltError("there is no pair in this file", file=str(file))
    return sides
