"""What a variant holds in memory: weights, cache, and the peak while it reads a prompt."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder
from smelt.evaluate._text import prompt, room
from smelt.runtime import cache_bytes, new_cache
from smelt.spec import Paper

__all__ = ["Memory"]


@dataclass(frozen=True)
class Memory(Probe):
    """weight_bytes = sum over distinct storages; cache_bytes_per_token = bytes held after `tokens` tokens / tokens.

    Bytes are those the storages really hold (room kept ready included), each storage counted once however many
    tensors share it. The cache is the bound one, else transformers' DynamicCache, after one prompt of held-out text
    (shortened to the model's context), batch 1. `parameters` counts distinct elements; packed codes count as stored.

    peak_bytes = weight_bytes + the most that tensors made while reading that prompt held at one time. On CUDA from
    the allocator (max_memory_allocated); on the CPU by watching every operator's results, which misses scratch space
    inside kernels and gaps in the heap: a process of its own was seen to grow by 1.2 to 1.6 times as much. It is not
    the resident size of the process: that holds the interpreter, the libraries and every other variant, moves from
    run to run, and cannot be told apart by variant. A draft model is not counted.
    """

    paper: ClassVar = Paper("Efficiently Scaling Transformer Inference", "arXiv:2211.05102", "memory costs")
    tokens: Annotated[int, Ge(1)] = 1024

    @classmethod
    def example(cls) -> Self:
        return cls(tokens=64)

    def __call__(self, variant: Variant) -> list[Metric]:
        model = decoder(variant, "memory")
        weights = held([*model.parameters(), *model.buffers()])
        count = room(model, self.tokens)
        ids = torch.tensor([prompt(variant, count)], device=model.device)
        cache = DynamicCache(config=model.config) if variant.cache is None else new_cache(model, variant.cache)
        working = Working(model.device, [*model.parameters(), *model.buffers(), ids])
        with torch.no_grad(), working:
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [
            Metric("weight_bytes", float(weights), "bytes", "lower"),
            Metric("parameters", float(sum(p.numel() for p in model.parameters())), "elements", "lower"),
            Metric("cache_bytes_per_token", cache_bytes(cache) / count, "bytes/token", "lower"),
            Metric("peak_bytes", float(weights + working.peak), "bytes", "lower"),
        ]


def held(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of `tensors`, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(s.nbytes() for s in storages.values())


class Working(TorchDispatchMode):
    """`peak`: the most bytes held at one time by tensors made inside the block. Exact bookkeeping, not sampling."""

    def __init__(self, device: torch.device, given: Iterable[torch.Tensor]):
        super().__init__()
        self.device = device
        self.known = {t.untyped_storage()._cdata for t in given}
        self.now = self.peak = self.before = 0

    def __enter__(self) -> Working:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
