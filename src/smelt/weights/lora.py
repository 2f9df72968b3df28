"""Learn a low-rank change of the linear maps instead of the maps, and add it to them at the end (LoRA, through peft)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from safetensors.torch import save_file
from torch import nn

from smelt.model._walk import linears
from smelt.spec import Paper, SmeltError, nearest
from smelt.weights._adapter import Adapter, Attached, fingerprint, seeded

__all__ = ["Lora"]


@dataclass(frozen=True)
class Lora(Adapter):
    """W' = W + (alpha / rank) B A, with A [rank, in] drawn, B [out, rank] = 0, and W [out, in] standing still.

    On every linear map inside the blocks, or on those whose last names are in `maps` (q_proj, v_proj, ...); embeddings and head are
    left alone. rank (in + out) weights are trained for each. Training costs 4 N FLOPs per token for the N weights that stand still (6 N
    for a whole training), optimizer state only for what is trained, and checkpoints hold only that.

    At the end W' takes the place of W: the checkpoint is a plain one. A and B stay beside it in peft's format,
    `adapter/adapter_model.safetensors` and `adapter_config.json` (which has alpha and rank), with a fingerprint of each W
    they were learned on; peft loads them, and `portllm` puts them onto a later version of the model.

    A checkpoint in bfloat16 rounds W' once, to 1 part in 512 of each weight; a change much smaller than that is lost there,
    as it is after a whole training. The weights in `adapter/` are float32.

    Raises SmeltError without peft, for a name in `maps` that no linear map has, and when the merged model's logits differ
    from the adapted one's by more than 1e-4 of the largest (float32).
    Differs from the paper: every linear map by default, where the paper takes queries and values; no dropout.
    """

    paper: ClassVar = Paper("LoRA: Low-Rank Adaptation of Large Language Models", "arXiv:2106.09685", "section 4.1")
    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[int, Ge(1)] = 16
    maps: tuple[str, ...] = ()  # last names of the maps; none: all

    def parameters(self, model: Any) -> int:
        return sum(self.rank * (module.in_features + module.out_features) for _, module in self._maps(model))

    def _maps(self, model: Any) -> Iterator[tuple[str, nn.Linear]]:
        found = {name: module for _, name, module in linears(model)}
        known = {name.rpartition(".")[2] for name in found}
        for name in self.maps:
            if name not in known:
                raise SmeltError(f"lora: maps: no linear map inside the blocks is called '{name}'{nearest(name, known)}")
        chosen = {name: module for name, module in found.items() if not self.maps or name.rpartition(".")[2] in self.maps}
        if not chosen:
            raise SmeltError(f"lora: {type(model).__name__} has no linear map inside its blocks")
        yield from chosen.items()

    def attach(self, model: Any, seed: int) -> Attached:
        try:
            import peft
        except ImportError as error:
            raise SmeltError("lora needs the package 'peft': pip install 'smelt[adapters]'") from error
        maps = dict(self._maps(model))
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(maps), lora_dropout=0.0, bias="none")
        with seeded(seed):
            tuner: Any = peft.LoraModel(model, {"default": config}, "default")

        def save(folder: Path) -> None:
            """Before the merge: the weights that stood still are fingerprinted as they are."""
            folder.mkdir(parents=True, exist_ok=True)
            state = peft.get_peft_model_state_dict(tuner, adapter_name="default", save_embedding_layers=False)
            tensors = {f"base_model.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
            base = {f"{name}.weight": fingerprint(module.weight) for name, module in maps.items()}
            save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt", "smelt.base": json.dumps(base, sort_keys=True)})
            config.inference_mode = True
            config.save_pretrained(str(folder))
            file = folder / "adapter_config.json"  # its sets come in another order in every process
            about = json.loads(file.read_text(encoding="utf-8"))
            about["target_modules"] = sorted(about["target_modules"])
            file.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")

        def finish() -> None:
            try:
                tuner.merge_and_unload(safe_merge=True)
            except ValueError as error:  # not finite
                raise SmeltError(f"lora: what was learned cannot be merged: {error}") from error

        def undo() -> None:
            tuner.unload()

        return Attached(finish, undo, save, merged=True)
