"""Put what was tuned on one version of a model onto the next version, without any training (PortLLM)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from annotated_types import Ge, Gt
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smelt.model._files import header, read_json
from smelt.model._load import locate
from smelt.spec import Paper, SmeltError
from smelt.weights._adapter import fingerprint
from smelt.weights._merge import Merge, together, wide

__all__ = ["PortLLM"]

SMALL = 1024  # numbers of a matrix; below, its distance says little about where it comes from
FILE = ".safetensors"
PREFIX = "base_model.model."
UNKNOWN = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "use_qalora", "lora_bias", "layer_replication")


@dataclass(frozen=True)
class PortLLM(Merge):
    """theta = theta_{t+1} + (theta_tuned - theta_t): the patch learned on version t, put onto version t + 1.

    theta_{t+1} is the stage's own model, theta_t is `base`. `tuned` is a model tuned from it, or the file
    `adapter_model.safetensors` of a lora (smelt's or peft's): then theta_tuned - theta_t = (alpha / r) B A, with alpha and r from
    the adapter_config.json beside it. rank > 0 keeps the `rank` largest singular values of each matrix's patch; vectors keep theirs
    whole. Where theta_{t+1} = theta_t the result is theta_tuned, bit for bit (rank=0). Cost: 2 n FLOPs for n weights, one
    singular value decomposition per matrix with a rank; no data; memory: four tensors.

    It holds while the update of the base is small beside the weights. So a base that is not the one of both is refused: matrices
    (of 1,024 numbers or more) of the evolved or tuned model may lie at most `drift` of the base's norm away from it; two models
    trained from other beginnings lie sqrt(2) apart. Shapes, settings and tokenizers must be the same. A lora of smelt's has
    fingerprints of the very weights it was learned on, and only fits those.

    Raises SmeltError for another base, for a lora that names weights the base has not, and for one that is more than B A
    (DoRA, ranks by pattern, biases).
    Differs from the paper (reconstruction: read in summaries only): `rank` and `drift` are ours, and a patch may be the
    difference of two whole models.
    """

    paper: ClassVar = Paper("PortLLM: Personalizing Evolving Large Language Models with Training-Free and Portable Model Patches",
                            "arXiv:2410.10870", "the patch of section 3; a reconstruction")  # fmt: skip
    needs_base: ClassVar[bool] = True
    tuned: str = "base"
    base: str = "base"
    rank: Annotated[int, Ge(0)] = 0  # of each matrix's patch; 0: all of it
    drift: Annotated[float, Gt(0)] = 0.5  # largest distance from the base, as a share of its norm

    @property
    def models(self) -> tuple[str, ...]:
        return () if self.tuned.endswith(FILE) else (self.tuned,)

    def __call__(self, name: str, tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        start, evolved, *rest = together(self, tensors, base)
        self._near(name, start, evolved, "the stage's own model")
        if rest:
            self._near(name, start, rest[0], f"tuned='{self.tuned}'")
            change = wide(rest[0]) - wide(start)
        else:
            change = self._low_rank(name, start)
        if self.rank and change.dim() == 2 and self.rank < min(change.shape):
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            return (wide(evolved) + (u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]).to(evolved.dtype)
        moved = wide(evolved) + change
        return (torch.where(evolved == start, wide(rest[0]), moved) if rest else moved).to(evolved.dtype)

    def _near(self, name: str, start: Tensor, other: Tensor, who: str) -> None:
        if start.dim() < 2 or start.numel() < SMALL:
            return
        size = torch.linalg.vector_norm(start, dtype=torch.float32).item()
        apart = torch.linalg.vector_norm(wide(other) - wide(start), dtype=torch.float32).item()
        if apart > self.drift * size:
            share = apart / size if size else math.inf
            raise SmeltError(
                f"portllm: '{name}' of {who} lies {share:.2f} of its norm from base='{self.base}' (at most drift={self.drift}): "
                "base is the model that the patch was learned on and both come from"
            )

    def _low_rank(self, name: str, start: Tensor) -> Tensor:
        file = Path(self.tuned)
        if not file.is_file():
            raise SmeltError(f"portllm: tuned='{self.tuned}': there is no such file; write a model, or the path of an adapter_model{FILE}")
        state = file.stat()
        patch = _read(file, locate(self.base), state.st_mtime_ns, state.st_size)
        if name not in patch.maps:
            return torch.zeros_like(wide(start))
        if patch.base.get(name, "") not in ("", fingerprint(start)):
            raise SmeltError(f"portllm: {self.tuned} was learned on another '{name}' than that of base='{self.base}'")
        a, b = (wide(tensor).to(start.device) for tensor in patch.maps[name])
        if (len(b), a.shape[1]) != tuple(start.shape):
            raise SmeltError(f"portllm: {self.tuned} changes '{name}' by {[len(b), a.shape[1]]}, but it is {list(start.shape)} in the base")
        return (b @ a) * patch.scale


class _Patch(NamedTuple):
    maps: Mapping[str, tuple[Tensor, Tensor]]  # {weight: (A, B)}
    scale: float
    base: Mapping[str, str]  # {weight: fingerprint of what it was learned on}; peft's own files have none


@lru_cache(maxsize=1)
def _read(file: Path, base: Path, *state: int) -> _Patch:
    """A lora in peft's format, all of whose weights the base has."""
    about = read_json(file.with_name("adapter_config.json"))
    odd = [key for key in UNKNOWN if about.get(key)] + ["bias"] * (about.get("bias", "none") != "none")
    if about.get("peft_type") != "LORA" or odd:
        raise SmeltError(f"portllm: {file} is not a plain lora ({odd[0] if odd else about.get('peft_type')}); merge it and name the model")
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, "pt") as held:
            known: Any = json.loads((held.metadata() or {}).get("smelt.base", "{}"))
            for key in held.keys():  # noqa: SIM118 (not a dictionary)
                module, _, side = key.removeprefix(PREFIX).partition(".lora_")
                found.setdefault(f"{module}.weight", {})[side] = held.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as error:
        raise SmeltError(f"portllm: {file} cannot be read: {error}") from error
    rank, names = about.get("r"), header(base)
    for name, sides in found.items():
        if name not in names:
            raise SmeltError(f"portllm: {file} changes '{name}', which {base} has not")
        if sides.keys() != {"A.weight", "B.weight"} or len(sides["A.weight"]) != rank or sides["B.weight"].shape[1:] != (rank,):
            raise SmeltError(f"portllm: {file}: '{name}' is not a pair A, B of rank {rank}")
    scale = about["lora_alpha"] / (math.sqrt(about["r"]) if about.get("use_rslora") else about["r"])
    return _Patch({name: (sides["A.weight"], sides["B.weight"]) for name, sides in found.items()}, scale, known)
