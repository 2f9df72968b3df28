"""Queries, keys and values of every layer, read off a model while it runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from smelt.model._walk import blocks, projections_of

__all__ = ["Capture"]


class Capture:
    """`take()` -> per layer (q [b, t, h k], k [b, t, g k], v [b, t, g k]) of the forward before it, with their graph.

    The outputs of the three maps, before heads are split and rotary angles are put on. Holds no tensor between steps.
    Raises SmeltError for a model whose layers have one fused map. `close()` takes the hooks off.
    """

    def __init__(self, model: Any):
        self._found: dict[tuple[int, int], Tensor] = {}
        self._handles = [
            module.register_forward_hook(self._keeper((layer, which)))
            for layer, block in enumerate(blocks(model))
            for which, module in enumerate(projections_of(block))
        ]
        self._layers = len(self._handles) // 3

    def _keeper(self, place: tuple[int, int]) -> Any:
        def keep(module: Any, given: Any, made: Tensor) -> None:
            self._found[place] = made

        return keep

    def take(self) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        found, self._found = self._found, {}
        return tuple((found[layer, 0], found[layer, 1], found[layer, 2]) for layer in range(self._layers))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._found = {}
