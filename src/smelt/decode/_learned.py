"""Drafts that are trained over the states of one target: how they are kept, grown and refused.

    row p of a draft = (token x_p, the target's state f_{p-1})  ->  what comes after x_p

f is what the target's head reads (after its final norm), in training and in drafting alike. A method says what its module
is, what it loses on a batch, and how it reads one more level; `Grower` makes a chain or a tree of that. The target is
never trained: embeddings and head are read from the model a draft is bound to, and the file holds neither.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smelt import registry
from smelt.decode._grower import Grower
from smelt.decode._verify import Drafter, Drafting
from smelt.model._load import load, vocabulary
from smelt.model._walk import parts
from smelt.spec import SmeltError

__all__ = ["FILE", "Learned", "target_digest"]

FILE = "draft.safetensors"
ROWS = 256  # of the embedding, that a target is known by


class Learned(Drafting):
    """A draft with weights of its own: `weights` names the folder that holds `draft.safetensors`.

    In a recipe a `train:` block beside the method makes that folder (`smelt.train.draft`). The file names its method, its
    target and its target's tokenizer; a draft is refused by name where one of them, or a shape, is another's.
    """

    trains: ClassVar[bool] = True  # so that a recipe lets it have a train block
    drafting: ClassVar[tuple[str, ...]] = ("form", "depth", "width", "nodes")  # fields that no training looks at
    weights: Any  # a field of every method

    @abstractmethod
    def module(self, config: Any) -> nn.Module:
        """The draft for a target of this configuration, new. It may be made on the meta device."""

    @abstractmethod
    def start(self, draft: nn.Module, model: Any) -> None:
        """Set what a training begins with and the target gives, in place; nothing for many."""

    @abstractmethod
    def loss(self, draft: Any, model: Any, ids: Tensor, states: Tensor) -> Tensor:
        """Losses [b, t - 1] of the rows 1..t-1 of ids [b, t], float32; `states` [b, t, D] of the target, without gradient."""

    @abstractmethod
    def cost(self, draft: Any, config: Any) -> int:
        """FLOPs of training on one token, without the target's blocks. `draft` may be on the meta device."""

    @abstractmethod
    def grower(self, draft: Any, model: Any) -> Grower: ...

    @property
    def learned(self) -> Self:
        """This method as its training sees it: methods that differ in `drafting` alone share one draft."""
        said = {field.name: field.default for field in dataclasses.fields(cast(Any, self)) if field.name in self.drafting}
        return dataclasses.replace(cast(Any, self), **said)

    def drafter(self, model: Any, tokenizer: Any) -> Drafter:
        return self.grower(self.read(model, tokenizer), model)

    @property
    def file(self) -> Path:
        """Where its weights are. Raises SmeltError where there are none."""
        name = registry.name_of(self)[1]
        if not self.weights:
            raise SmeltError(
                f"decode: {name} is a draft that has to be trained; give it 'train: {{tokens: 500_000, context: 256, batch: 8}}' "
                f"in a recipe, or name the folder of one that has been: {name}(weights='runs/NAME/stages/{name}-...')"
            )
        file = Path(self.weights) / FILE
        if not file.is_file():
            raise SmeltError(f"decode: {name}: there is no {FILE} in '{self.weights}'; name the folder of a decode stage that was trained")
        return file

    def read(self, model: Any, tokenizer: Any) -> nn.Module:
        """The trained module, on the target's device and in its precision."""
        file, name = self.file, registry.name_of(self)[1]
        where = f"decode: {name}: the draft '{self.weights}'"
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads((opened.metadata() or {}).get("smelt", "{}"))
            held = load_file(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise SmeltError(f"{where} cannot be read: {error}") from error
        if about.get("method") != name:
            raise SmeltError(f"{where} is one of '{about.get('method')}'")
        draft = self.module(model.config.get_text_config(decoder=True))
        wanted = {key: tuple(value.shape) for key, value in draft.state_dict().items()}
        for key in sorted(wanted.keys() | held.keys()):
            there = tuple(held[key].shape) if key in held else None
            if there != wanted.get(key):
                said = f"'{key}' is {there or 'missing'} there and {wanted.get(key) or 'unknown'} here"
                raise SmeltError(f"{where} is for another target or other settings: {said}; it was made as {about.get('text')}")
        if about.get("target") and about["target"] != target_digest(model):
            raise SmeltError(f"{where} was trained for another model (other embeddings or sizes); train one for this model")
        if about.get("tokenizer") and tokenizer is not None and about["tokenizer"] != vocabulary(tokenizer):
            raise SmeltError(f"{where} was trained with another tokenizer; ids would change their meaning")
        draft.load_state_dict(held)
        return draft.to(model.device, model.dtype).eval().requires_grad_(False)

    def write(self, draft: nn.Module, folder: Path, model: Any = None, tokenizer: Any = None) -> None:
        """draft.safetensors with what it is for; without a model it fits every target of its shapes."""
        about = {"method": registry.name_of(self)[1], "text": registry.text(self.learned)}
        about |= {"target": target_digest(model)} if model is not None else {}
        about |= {"tokenizer": vocabulary(tokenizer)} if tokenizer is not None else {}
        folder.mkdir(parents=True, exist_ok=True)
        held = {name: value.detach().cpu().contiguous() for name, value in draft.state_dict().items()}
        save_file(held, folder / FILE, {"smelt": json.dumps(about)})  # one entry: of several the order on the disk is by chance

    def untrained(self, target: Path, place: Path, seed: int = 0) -> Self:
        """This method with weights as a training begins with, written into `place` for targets shaped as the checkpoint
        `target`: what shows that the text does not depend on the draft."""
        model = load(target).model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            draft = self.module(model.config.get_text_config(decoder=True))
            self.start(draft, model)
        self.write(draft, place)
        return dataclasses.replace(cast(Any, self), weights=str(place))


def target_digest(model: Any) -> str:
    """Of the sizes and the first embeddings in bfloat16: the same for a model, its other precisions and its quantized blocks."""
    config = model.config.get_text_config(decoder=True)
    rows = model.get_input_embeddings().weight[:ROWS].detach().cpu().to(torch.bfloat16)
    about = json.dumps([config.model_type, *parts(config)]).encode()
    return hashlib.sha256(about + rows.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
