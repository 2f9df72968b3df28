"""Tokens leave the stack of layers as soon as the model is sure of what follows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.nn.functional import cosine_similarity

from smelt.decode import Steered
from smelt.decode._skip import Policy, Used, skipping
from smelt.model._walk import blocks, stack
from smelt.spec import Paper, SmeltError

__all__ = ["EarlyExit"]

ROWS = 1024  # tokens whose exits are scored at once


@dataclass(frozen=True)
class EarlyExit(Steered):
    """exit after the first layer l >= first with c_l > threshold; h_L := h_l, and keys and values of layers k > l are those of h_l.

    c_l by `by`: "probability" max p_l, "margin" the largest p_l less the second (CALM's softmax response), p_l =
    softmax(head(norm(h_l))); "cosine" cos(h_l, h_{l-1}), a state that no longer turns. h_l [b, t, d] is the output of the
    l-th layer, l = 1..L. Each token decides from its own states alone, so a text is read alike in one call and in many,
    up to rounding. threshold=1.0: no token exits (c_l <= 1), and the output is plain bit for bit.

    Saved in a call where all tokens have exited, thus in generation at batch 1: a layer less its first norm and its maps
    of keys and values. A call with exited and other tokens runs the layer for all. Cost: "probability" and "margin" 2 d V
    FLOPs at each exit a token tries; where the vocabulary is large beside the layer (d = 256, V = 4,096: 2.1 M, a layer 1.4 M)
    trying costs more than leaving saves; "cosine" costs 6 d. `attach` yields `Used`, the shares of tokens that ran each layer.

    Lossy: the model was not trained to be read early. Exits trained with distill's multi_exit are the ones this is for;
    without them confident middle layers are often wrong: the embedded model (8 layers, 2,500 tokens) needed 1.20 times the bits
    with 86 % of the layers (threshold=.7), 2.2 times with 43 % (by="cosine", .95). Not transformers' `assistant_early_exit`,
    which drafts with the first layers, verifies with all, and loses nothing.

    Raises SmeltError for models whose keys and values cannot be written apart, that have no final norm or, where the
    head is asked, bend its logits (gemma2), and for `first` beyond the layers.

    Differs from the paper: decoder-only, so tokens of the prompt exit too (its encoder reads the prompt in full); the
    threshold does not decay along the text; no trained classifier of exits and no calibrated guarantee; "probability" is ours.
    """

    paper: ClassVar = Paper("Confident Adaptive Language Modeling", "arXiv:2207.07061", "sections 3.1 to 3.4")
    threshold: Annotated[float, Ge(-1), Le(1)] = 0.9
    by: Literal["probability", "margin", "cosine"] = "probability"
    first: Annotated[int, Ge(1)] = 1  # layers every token runs

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        return {}

    @contextmanager
    def attach(self, model: Any, tokenizer: Any) -> Iterator[Used]:
        layers, config = len(blocks(model)), model.config
        if self.first > layers:
            raise SmeltError(f"early_exit: first={self.first}, but the model has {layers} layers")
        norm, head = getattr(stack(model), "norm", None), model.get_output_embeddings()
        if norm is None or head is None:
            raise SmeltError(f"early_exit: {config.model_type} models have no final norm and head where smelt looks for them")
        for name, plain in (("final_logit_softcapping", None), ("logit_scale", 1), ("logits_scaling", 1)):
            if self.by != "cosine" and getattr(config, name, None) not in (None, plain):
                raise SmeltError(f"early_exit: {config.model_type} models bend their logits after the head ({name}); use by='cosine'")
        policy = _Exits(self, norm, head, layers)
        with skipping(model, policy):
            yield policy.used

    @classmethod
    def example(cls, draft: Path) -> EarlyExit:
        return cls(threshold=0.0)


class _Exits(Policy):
    def __init__(self, method: EarlyExit, norm: Any, head: Any, layers: int):
        self.method, self.norm, self.head, self.layers = method, norm, head, layers
        self.used = Used(layers)
        self.out: Tensor = torch.zeros(0)  # [b, t] tokens that have exited

    def runs(self, layer: int, state: Tensor, places: Tensor | None) -> Tensor:
        if layer == 0:
            self.out = torch.zeros(state.shape[:2], dtype=torch.bool, device=state.device)
        return ~self.out

    def left(self, layer: int, state: Tensor, out: Tensor, places: Tensor | None) -> Tensor:
        self.used.count(layer, ~self.out, places)
        if self.method.first <= layer + 1 < self.layers and self.method.threshold < 1:
            still = ~self.out
            if bool(still.any()):
                self.out = self.out.masked_scatter(still, self._confidence(state[still], out[still]) > self.method.threshold)
        return out

    @torch.no_grad()
    def _confidence(self, before: Tensor, now: Tensor) -> Tensor:
        """c of each row, float32 [n], for states [n, d]."""
        if self.method.by == "cosine":
            return cosine_similarity(before.float(), now.float(), dim=-1)
        found = []
        for part in now.split(ROWS):
            top = self.head(self.norm(part)).float().softmax(-1).topk(2, -1).values
            found.append(top[:, 0] - top[:, 1] if self.method.by == "margin" else top[:, 0])
        return torch.cat(found)
