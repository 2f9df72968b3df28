"""An invertible change of the embeddings, undone before the head, with adapters behind the blocks' parts (MAD-X)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from smelt.model._swap import Swapped
from smelt.model._walk import stack
from smelt.spec import Paper, SmeltError
from smelt.weights._adapter import Adapter, Attached, placed, seeded
from smelt.weights.sequential_adapter import SequentialAdapter

__all__ = ["InvertibleAdapter"]


class Coupling(Swapped):
    """[a; b] -> [a + F(b); b + G(a + F(b))] behind the embedding, or its inverse behind the last norm. F and G start at zero."""

    owner: ClassVar[str] = "weights.invertible_adapter"

    def __init__(self, was: nn.Module, size: int, inverse: bool):
        super().__init__()
        weight: Any = was.weight
        self.inverse, self.size = inverse, size
        if inverse:
            self.inner = was
        else:  # the table keeps its name: a tied head looks for it
            self.weight = weight
            self.padding: Any = was.padding_idx
        self.first, self.second = (_bottleneck(size, weight) for _ in range(2))

    def do(self, e: Tensor) -> Tensor:
        a, b = e.chunk(2, -1)
        a = a + self.first(b)
        return torch.cat([a, b + self.second(a)], -1)

    def undo(self, o: Tensor) -> Tensor:
        a, b = o.chunk(2, -1)
        b = b - self.second(a)
        return torch.cat([a - self.first(b), b], -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.undo(self.inner(x)) if self.inverse else self.do(nn.functional.embedding(x, self.weight, self.padding))

    def settings(self) -> dict[str, Any]:
        return {"size": self.size, "inverse": self.inverse}

    @classmethod
    def build(cls, was: nn.Module, **settings: Any) -> Self:
        size, inverse = settings.get("size"), settings.get("inverse")
        weight = getattr(was, "weight", None)
        if type(size) is not int or type(inverse) is not bool or len(settings) != 2 or size < 4 or size % 4:
            raise SmeltError(f"invertible_adapter: its settings are a size (a multiple of 4) and inverse, not {settings}")
        if not isinstance(weight, Tensor) or weight.shape[-1] != size or (type(was) is nn.Embedding) == inverse:
            raise SmeltError(f"invertible_adapter: a {type(was).__name__} is not what it stands for, of {size} channels")
        return cls(was, size, inverse)


def _bottleneck(size: int, like: Tensor) -> nn.Sequential:
    about: dict[str, Any] = {"device": like.device, "dtype": like.dtype, "bias": False}
    up = nn.Linear(size // 4, size // 2, **about)
    nn.init.zeros_(up.weight)
    return nn.Sequential(nn.Linear(size // 2, size // 4, **about), nn.ReLU(), up)


@dataclass(frozen=True)
class InvertibleAdapter(Adapter):
    """o_1 = e_1 + F(e_2), o_2 = e_2 + G(o_1) on embeddings e = [e_1; e_2], and the inverse before the head; F, G: d/2 -> d/4 -> d/2.

    The inverse e_2 = o_2 - G(o_1), e_1 = o_1 - F(e_2) stands behind the last norm [.., d]: text goes through one map on its way in and
    out, so that a tied table serves both. Trained: d^2 / 2 weights, and those of `blocks`, the adapters inside the blocks. The model is
    slower by 2 d^2 FLOPs per token. It cannot be merged (F and G have a relu): the checkpoint has modules of its own and
    loads in smelt.

    While it learns, the map and its inverse share F and G. The checkpoint holds them twice, once for each side, as each
    module must stand alone: so it is d^2 / 2 numbers larger, and a later training moves the two sides apart.

    Raises SmeltError for d that is no multiple of 4, an embedding that does more than look up (Gemma), no last norm, and
    `blocks` that is no adapter.
    Differs from the paper: no biases; set for encoders, where the inverse stands before a masked-language head.
    """

    paper: ClassVar = Paper("MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer", "arXiv:2005.00052", "section 4.3")
    module: ClassVar = Coupling
    blocks: Any = field(default_factory=SequentialAdapter)  # adapters inside the blocks, or None

    def __post_init__(self) -> None:
        if self.blocks is not None and (not isinstance(self.blocks, Adapter) or isinstance(self.blocks, InvertibleAdapter)):
            raise SmeltError(f"invertible_adapter: blocks={self.blocks!r}; an adapter inside the blocks is expected, or None")

    def parameters(self, model: Any) -> int:
        size = self._places(model)[2]
        return size * size // 2 + (0 if self.blocks is None else self.blocks.parameters(model))

    @staticmethod
    def _places(model: Any) -> tuple[str, str, int]:
        """(name of the embedding, name of the last norm, channels)."""
        table, norm = model.get_input_embeddings(), getattr(stack(model), "norm", None)
        if isinstance(table, Coupling):
            raise SmeltError("invertible_adapter: this model has such an adapter already; go on training without 'adapter'")
        if type(table) is not nn.Embedding or norm is None:
            raise SmeltError(f"invertible_adapter: {type(model).__name__} has no plain embedding or no last norm; take lora()")
        if table.embedding_dim % 4:
            raise SmeltError(f"invertible_adapter: {table.embedding_dim} channels are not a multiple of 4")
        names = {id(module): name for name, module in model.named_modules()}
        return names[id(table)], names[id(norm)], table.embedding_dim

    def attach(self, model: Any, seed: int) -> Attached:
        inside = None if self.blocks is None else self.blocks.attach(model, seed)
        first, last, size = self._places(model)
        with seeded(seed):
            there, back = (Coupling(model.get_submodule(name), size, name == last) for name in (first, last))
        back.first, back.second = there.first, there.second

        def finish() -> None:
            with seeded(seed):  # each side its own copy from here on
                back.first, back.second = (_bottleneck(size, there.weight) for _ in range(2))
            back.first.load_state_dict(there.first.state_dict())
            back.second.load_state_dict(there.second.state_dict())
            if inside is not None:
                inside.finish()

        def undo() -> None:
            around.undo()
            if inside is not None:
                inside.undo()

        around = placed(model, {first: there, last: back}, finish)
        return Attached(finish, undo, None if inside is None else inside.save)
