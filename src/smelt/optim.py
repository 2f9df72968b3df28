"""Muon for the matrices, AdamW for the rest, as one optimizer that Trainer can save, resume and schedule.

torch.optim.Muon orthogonalises in bfloat16, which is 4 to 5 times slower than float32 on CPUs without native bf16,
one matrix at a time; here equal shapes go through one batched product in the parameters' own precision on CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalize"]


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: U V^T of M = U S V^T, singular values within about [0.7, 1.2]. [..., m, n] -> the same.

    X <- a X + (b A + c A^2) X with A = X X^T, X_0 = M / |M|_F, (a, b, c) = (3.4445, -4.7750, 2.0315).
    Source: Keller Jordan, "Muon: an optimizer for hidden layers" (2024). Cost: 3 products per step.
    """
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else matrix.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """W <- (1 - lr wd) W - lr 0.2 sqrt(max(m, n)) NS(mu B + G), B <- mu B + G, for matrices; AdamW for the rest.

    The factor 0.2 sqrt(max(m, n)) makes the update as large as AdamW's usual one, so one learning rate serves both
    ("Muon is scalable for LLM training", arXiv:2502.16982, section 2.2). Embeddings, head, norms and biases take
    AdamW with betas (0.9, 0.95). State: one tensor per matrix, two per other parameter.
    """

    def __init__(self, matrices: list[Tensor], others: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        groups = [
            {"params": matrices, "muon": True, "weight_decay": weight_decay},
            {"params": [p for p in others if p.dim() > 1], "muon": False, "weight_decay": weight_decay},
            {"params": [p for p in others if p.dim() <= 1], "muon": False, "weight_decay": 0.0},
        ]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "momentum": momentum, "betas": (0.9, 0.95), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["muon"] else self._adamw)(params, group)
        return loss

    def _muon(self, params: list[Tensor], group: dict) -> None:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        for shape, same in shapes.items():
            for p in same:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum"] for p in same]
            grads = [p.grad for p in same if p.grad is not None]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            direction = orthogonalize(torch.stack(torch._foreach_add(grads, buffers, alpha=group["momentum"])))
            rate = group["lr"] * 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, list(direction.unbind(0)), alpha=-rate)

    def _adamw(self, params: list[Tensor], group: dict) -> None:
        (b1, b2), lr = group["betas"], group["lr"]
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=torch.zeros(()), mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            t = state["step"].item()
            state["mean"].lerp_(p.grad, 1 - b1)
            state["square"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            p.mul_(1 - lr * group["weight_decay"])
            denominator = (state["square"] / (1 - b2**t)).sqrt_().add_(group["eps"])
            p.addcdiv_(state["mean"], denominator, value=-lr / (1 - b1**t))
