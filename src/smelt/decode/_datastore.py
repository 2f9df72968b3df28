"""States of a model with the token that followed each, and exact search among them: what a nearest-neighbour model is made of.

    bytes = n (D b + 8) + 4 D    n keys of D numbers of b bytes, half their squared distance to the centre and their mean, the
                                 centre, in float32, the token in int32
    search: n D multiply-adds per query, in blocks, so that memory stays at QUERIES * KEYS scores whatever n is

Candidates are ranked by (q - c).k - |k - c|^2 / 2, one product of matrices; without the centre c keys far from the origin would
lose their order to rounding. The distances of the k that stay are then taken from the differences themselves, because for a
near neighbour the product loses what it has in common with the norms to rounding.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smelt.model._walk import blocks, mlp_of
from smelt.spec import SmeltError

__all__ = ["Datastore", "collect", "keys_of", "keys_seen", "weights_digest"]

QUERIES, KEYS = 512, 16_384  # of one block of the search
GATHERED = 1 << 24  # numbers of stored keys looked at once when distances are taken


class Datastore:
    """`keys` [n, D] float32 or float16, `values` [n] int32 the token after each."""

    def __init__(self, keys: Tensor, values: Tensor):
        if keys.dim() != 2 or values.shape != keys.shape[:1] or not len(values):
            raise SmeltError(
                f"a datastore needs as many tokens as keys and at least one, not {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        if not torch.isfinite(keys).all():
            raise SmeltError(f"a key of the datastore is not finite in {str(keys.dtype).removeprefix('torch.')}; use keys='float32'")
        self.keys, self.values = keys.contiguous(), values.to(torch.int32)
        self.centre = torch.stack([part.double().sum(0) for part in keys.split(KEYS)]).sum(0).div(len(keys)).float()
        self.half = torch.cat([(part.float() - self.centre).square().sum(1) / 2 for part in keys.split(KEYS)])

    def __len__(self) -> int:
        return len(self.values)

    @property
    def bytes(self) -> int:
        return sum(part.untyped_storage().nbytes() for part in (self.keys, self.values, self.half, self.centre))

    @torch.no_grad()
    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(squared L2 distances [m, k] from the nearest on, their tokens [m, k] int64) for queries [m, D]; all n where n < k."""
        k = min(k, len(self))
        found = [self._one(part, k) for part in queries.to(self.keys.device).float().split(QUERIES)]
        return torch.cat([d for d, _ in found]), torch.cat([t for _, t in found])

    def _one(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best, away = queries.new_empty(len(queries), 0), queries - self.centre
        places = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
        for start in range(0, len(self), KEYS):
            stop = min(start + KEYS, len(self))
            scores = torch.addmm(-self.half[start:stop], away, self.keys[start:stop].float().T)
            top, at = scores.topk(min(k, stop - start), dim=1)
            best, places = torch.cat([best, top], 1), torch.cat([places, at + start], 1)
            if best.shape[1] > k:
                best, kept = best.topk(k, dim=1)
                places = places.gather(1, kept)
        rows = max(1, GATHERED // (k * self.keys.shape[1]))
        distances = torch.cat(
            [(self.keys[p].float() - q[:, None]).square().sum(-1) for q, p in zip(queries.split(rows), places.split(rows), strict=True)]
        )
        distances, order = distances.sort(dim=1, stable=True)
        return distances, self.values[places.gather(1, order)].long()

    def save(self, file: Path) -> None:
        """Whole or not at all: written beside its place and renamed."""
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"keys": self.keys.cpu(), "values": self.values.cpu()}, temporary)
            os.replace(temporary, file)
        except (OSError, SafetensorError) as error:
            raise SmeltError(f"the datastore cannot be written: {error}", file=str(file)) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, file: Path, device: Any) -> Datastore:
        try:
            held = load_file(file)
            return cls(held["keys"].to(device), held["values"].to(device))
        except (OSError, SafetensorError, KeyError) as error:
            raise SmeltError(f"not a datastore, or a damaged one ({error}); delete it", file=str(file)) from error


@contextmanager
def keys_seen(model: Any) -> Iterator[list[Tensor]]:
    """While open, the list holds the input of the last block's feed-forward (behind its norm) of the latest call [b, t, D]."""
    seen: list[Tensor] = []

    def keep(_: Any, args: tuple) -> None:
        seen[:] = [args[0].detach()]

    handle = mlp_of(blocks(model)[-1]).register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def keys_of(model: Any, ids: list[int]) -> Tensor:
    """Keys [t, D] of one text, each from itself and what stands before it."""
    with keys_seen(model) as seen:
        model.base_model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        return seen[0][0]


def collect(model: Any, texts: Iterable[list[int]], tokens: int, context: int, dtype: torch.dtype) -> Datastore:
    """The first `tokens` pairs of (state, next token) of the texts, read in pieces of `context`. Raises SmeltError when there are none."""
    keys: list[Tensor] = []
    values: list[int] = []
    for ids in texts:
        for start in range(0, len(ids) - 1, context):
            following = ids[start + 1 : start + context + 1][: tokens - len(values)]
            if following:
                keys.append(keys_of(model, ids[start : start + len(following)]).to(dtype))
                values += following
        if len(values) >= tokens:
            break
    if not values:
        raise SmeltError("the train split of the data has no two tokens in a row, so there is nothing to store")
    return Datastore(torch.cat(keys), torch.tensor(values, dtype=torch.int32, device=keys[0].device))


def weights_digest(model: Any) -> str:
    """Of every weight, bit for bit."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(memoryview(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
