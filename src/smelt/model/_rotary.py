"""Rotary angles outside a model: to take keys back to where they were before rotation, and to rotate them elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from smelt.spec import SmeltError

__all__ = ["Rotary"]

# Architectures that turn channel j with channel j + width / 2 (others interleave, or have no angles at all).
HALVES = {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "phi", "phi3", "stablelm", "olmo", "olmo2"}
CHANGING = ("dynamic", "longrope")  # angles that depend on the length of the text


class Rotary:
    """x -> s (x cos(p w) + half(x) sin(p w)) on the first `width` channels, s the architecture's own scaling (1 for most).

    `turn(x, positions)` and its inverse `turn(x, positions, back=True)`: x [b, h, n, d], positions [n] or [b, n]; float32
    inside, the dtype of x outside. The inverse is exact up to rounding (1e-6 of |x| in float32).
    Raises SmeltError for architectures whose keys are not rotated by halves, and for angles that change with the length.
    """

    def __init__(self, config: Any):
        if config.model_type not in HALVES:
            raise SmeltError(f"the keys of {config.model_type} models cannot be taken back to where they were before rotary angles")
        about = dict(config.rope_parameters)
        kind = about.get("rope_type", "default")
        if kind in CHANGING:
            raise SmeltError(f"rotary angles of type '{kind}' change with the length of the text, so keys cannot be turned again")
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if kind == "default":
            share = about.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
            self.width = int(head * share)
            self.frequency = about["rope_theta"] ** (-torch.arange(0, self.width, 2, dtype=torch.float) / self.width)
            self.scaling = 1.0
        else:
            self.frequency, self.scaling = ROPE_INIT_FUNCTIONS[kind](config)
            self.width = 2 * len(self.frequency)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) [..., width] float32 of positions [...], without the scaling."""
        angle = positions[..., None].float() * self.frequency.to(positions.device)
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    def turn(self, x: Tensor, positions: Tensor, back: bool = False) -> Tensor:
        cos, sin = self.angles(positions)
        if positions.dim() == 2:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        part = x[..., : self.width].float()
        left, right = part.chunk(2, -1)
        turned = torch.cat((-right, left), -1) * (-sin if back else sin) + part * cos
        turned = (turned / self.scaling if back else turned * self.scaling).to(x.dtype)
        return turned if self.width == x.shape[-1] else torch.cat((turned, x[..., self.width :]), -1)
