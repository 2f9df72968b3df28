"""Judges whose model is trained for them: a rank stage with a `train:` block leaves the trained checkpoint.

What is learned from are lists: a query, passages and a grade for each. A method says what a batch of lists is for its
model and what it loses there; `smelt.train.ranked` has the loop. Parameters beside the model's own (`heads`) are
trained with it and kept in `judge.safetensors` of the stage's folder, which the field `weights` names. `labels` is a
judge or strategy that the teacher of the block grades the lists with, or whose vectors are learned; without one the
grades of the data stand.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import softplus

from smelt import registry
from smelt.rank._order import by_digest
from smelt.rank._reading import needs_model
from smelt.spec import SmeltError

__all__ = ["FILE", "Labelled", "Learns", "order_places", "read", "shuffled", "weighted_ranknet", "write"]

FILE = "judge.safetensors"


class Labelled(NamedTuple):
    query: str
    passages: list[str]
    grades: list[float]  # of each passage, larger is better; the first passage is a relevant one
    turn: int = 0  # how often the training has seen this list before: what a method draws for it may differ by it
    vectors: Tensor | None = None  # [1 + passages, width]: the teacher's of the query and of each passage, for what `copies`


class Learns(ABC):
    trains: ClassVar[bool] = True
    together: ClassVar[bool] = True  # a list is read as one row of `context` tokens, not text by text
    copies: ClassVar[bool] = False  # learns the teacher's vectors: `labels` embeds, it does not grade
    labels: Any  # field: judge or strategy of the teacher, or None
    weights: Any  # field: folder with judge.safetensors, or None

    @abstractmethod
    def heads(self, config: Any) -> nn.Module | None:
        """Parameters beside the model's, new; None when it needs none. `config` is the model's text configuration."""

    @abstractmethod
    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """A batch: tensors whose first dimension is a multiple of len(lists); each list's ids are cut to about `context`
        tokens in all. `model` is Loaded, for its tokenizer and configuration; on the CPU."""

    @abstractmethod
    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        """[lists] float32, the loss of each. `model` is the transformers model itself, in training mode."""


def order_places(grades: Tensor) -> Tensor:
    """[b, n] grades -> [b, n] places 1..n, 1 the largest; equal grades in the order given. The same dtype as an index."""
    by = torch.argsort(grades, dim=-1, descending=True, stable=True)
    return torch.empty_like(by).scatter_(-1, by, torch.arange(1, grades.shape[-1] + 1, device=by.device).expand_as(by))


def weighted_ranknet(scores: Tensor, grades: Tensor, there: Tensor) -> Tensor:
    """[..., n] each -> [...]: 2 / m(m-1) sum_{g_i > g_j} softplus(s_j - s_i) / (r_i + r_j), r the places by grade, m those `there`.

    FIRST (arXiv:2406.15657) section 3. Finite at equal scores: pairs are chosen by their grades, never by their scores. 0 where m < 2.
    """
    count, place = there.sum(-1), order_places(grades.masked_fill(~there, -torch.inf))
    better = (grades[..., :, None] > grades[..., None, :]) & there[..., :, None] & there[..., None, :]
    pair = softplus(scores[..., None, :] - scores[..., :, None]) / (place[..., :, None] + place[..., None, :])
    return (pair * better).sum((-1, -2)) / (count * (count - 1) / 2).clamp(min=1)


def shuffled(one: Labelled) -> Labelled:
    """The list in an order of its own: the first passage of a list is a relevant one, and the prompt must not tell."""
    by = by_digest(one.query, one.passages, one.turn)
    return one._replace(passages=[one.passages[i] for i in by], grades=[one.grades[i] for i in by])


def write(method: Any, heads: nn.Module | None, folder: Path) -> None:
    """What the folder of a trained judge says beside its checkpoint: the method, and its heads where it has some."""
    held = {name: value.detach().cpu().contiguous() for name, value in heads.state_dict().items()} if heads is not None else {}
    held |= {} if held else {"none": torch.zeros(1)}  # safetensors has no empty file
    save_file(held, folder / FILE, {"smelt": json.dumps({"method": registry.name_of(method)[1], "text": registry.text(method)})})


def untrained(name: str) -> SmeltError:
    return SmeltError(
        f"rank: {name} has parameters that have to be trained; give its stage 'train: {{data: code_pairs, tokens: 500_000}}' "
        f"in a recipe, or name the folder of one that has been: {name}(weights='runs/NAME/stages/{name}-...')"
    )


def read(method: Any, model: Any) -> nn.Module | None:
    """The trained heads of a method, on the model's device; None for methods without. Raises SmeltError where they are missing."""
    name = registry.name_of(method)[1]
    needs_model(model, name)
    made = method.heads(model.model.config.get_text_config())
    if made is None:
        return None
    place = method.weights or model.folder
    file = Path(place) / FILE if place else None
    if file is None or not file.is_file():
        raise untrained(name)
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("smelt", "{}"))
        held = load_file(file)
        if about.get("method") != name:
            raise SmeltError(f"rank: '{file}' is of the method '{about.get('method')}', not of {name}")
        made.load_state_dict(held)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0][:200]
        raise SmeltError(f"rank: {name}: '{file}' cannot be read: {first}") from error
    return made.to(model.model.device, torch.float32).eval().requires_grad_(False)
