"""A trigram encoder and one layer over the target's states, with a head for every token ahead."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, silu

from smelt.decode._grower import Grower, Layer
from smelt.decode._learned import Learned
from smelt.model._walk import parts
from smelt.spec import Paper

__all__ = ["Chimera"]


@dataclass(frozen=True)
class Chimera(Learned):
    """z = [e_{p-2}; e_{p-1}; e_p]; g_p = W_g (z + silu(W z)); c_p = layer([f_1..f_t; g_{t+1}..g_p])_p; logits = H_i [f_t; c_p], i = p-t-1.

    e the target's embeddings [D], f_t the state of the last token that the target has read, g the trigram states of those behind
    it, in the layer at their true places. `layer` is one decoder layer of the target's own class (the full-context
    encoder). Head i [V, 2 D] says what follows token t+1+i, that is t+2+i; it begins as the target's head twice side by side,
    and W at 0, where the trigram encoder is its linear part. Before a text's first token stands that token again.

    loss = sum_i CE(x_{p+1}, H_i [f_{p-i-1}; c_p]) + hidden * mean (c_p - f_p)^2, for every row p with i < p; nats.

    Drafts: a chain of `heads` tokens, under sampling drawn from the heads' law and kept by the rule for drawn drafts, or a tree
    (`_learned.Grower`), exact because it is certain of itself. States of drafted tokens are never taken for states of the
    target: the memory of the layer holds f only, and g until the next round.

    Cost: 12 D^2 and the layer, and 2 D V weights per head; a round is `heads` calls of the layer, each with one head on one
    row (`width` rows in a tree). Training: one call of the target, (1 + heads) rows of the layer and every head, per token.
    Raises SmeltError without weights, and for those of another target or another number of heads.

    Differs from the paper: while training a head reads the true tokens between t and p, the released code its own arg-max; rows
    f_t stand at t and g_p at p (both reconstructions); no distillation of logits; hidden=0 as in the code, the paper weighs
    a squared error of states; the tree is grown by log-probability, the paper's is fixed; typical acceptance, which changes the
    text, is left out.
    """

    paper: ClassVar = Paper(
        "Chimera: A Lossless Decoding Method for Accelerating Large Language Models Inference by Fusing all Tokens",
        "arXiv:2402.15758",
        "section 3",
    )
    weights: str = ""  # folder with draft.safetensors; "": a train block makes one
    heads: Annotated[int, Ge(1)] = 3  # tokens drafted ahead
    form: Literal["tree", "chain"] = "tree"
    width: Annotated[int, Ge(1)] = 3  # nodes of a level that get children, and how many each
    nodes: Annotated[int, Ge(1)] = 12  # of the tree that the target reads
    hidden: Annotated[float, Ge(0)] = 0.0  # weight of the states' squared error

    def module(self, config: Any) -> nn.Module:
        return _Fused(config, self.heads)

    def start(self, draft: Any, model: Any) -> None:
        head = model.get_output_embeddings().weight
        with torch.no_grad():
            for one in draft.heads:
                one.weight.copy_(torch.cat([head, head], 1))

    def loss(self, draft: Any, model: Any, ids: Tensor, states: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = model.get_input_embeddings()(ids)
        rounds = draft.rounds(tokens, states)  # [i][b, t, D]; row p has states up to p - i - 1
        total = states.new_zeros(ids[:, 1:].shape, dtype=torch.float32)
        for i, made in enumerate(rounds):
            if self.hidden and made.shape[1] > i + 1:
                apart = (made[:, i + 1 :].float() - states[:, i + 1 :].float()).square().mean(-1)
                total = total + self.hidden * pad(apart, (i, 0))
            known, then = made[:, i + 1 : -1], ids[:, i + 2 :]  # the last row's next token is not in the row
            if then.shape[1]:
                logits = draft.heads[i](torch.cat([states[:, : known.shape[1]], known], -1)).float()
                loss = cross_entropy(logits.flatten(0, 1), then.flatten(), reduction="none").view(then.shape)
                total = total + pad(loss, (i, 1))
        return total

    def cost(self, draft: Any, config: Any) -> int:
        once, layer = (sum(p.numel() for p in module.parameters()) for module in (draft, draft.layer))
        return 6 * (once + self.heads * layer)

    def grower(self, draft: Any, model: Any) -> Grower:
        return _Fusing(draft, model, self.form == "tree", self.heads, self.width, self.nodes)

    @classmethod
    def example(cls, draft: Path) -> Chimera:
        return cls(form="chain").untrained(draft, draft / "untrained-chimera")


class _Fused(nn.Module):
    def __init__(self, config: Any, heads: int):
        super().__init__()
        size = parts(config).hidden
        self.bend = nn.Linear(3 * size, 3 * size, bias=False)  # W
        self.narrow = nn.Linear(3 * size, size, bias=False)  # W_g
        self.layer = Layer(config)
        self.heads = nn.ModuleList(nn.Linear(2 * size, parts(config).vocab, bias=False) for _ in range(heads))
        nn.init.zeros_(self.bend.weight)

    def trigram(self, z: Tensor) -> Tensor:
        """Three embeddings side by side [..., 3 D] -> [..., D]."""
        return self.narrow(z + silu(self.bend(z)))

    def rounds(self, tokens: Tensor, states: Tensor) -> list[Tensor]:
        """c [b, t, D] of every head: in round i row p reads the states of 0..p-i-1 and the trigrams of p-i..p.

        One call of the layer over [f; g; g; ...]: rows are only keys where they stand for others, so one layer needs no second pass.
        """
        t, device = tokens.shape[1], tokens.device
        at = torch.arange(t, device=device)
        spread = torch.stack([at - 2, at - 1, at], 1).clamp(min=0)
        trigrams = self.trigram(tokens[:, spread].flatten(2))
        rounds = len(self.heads)
        sees = torch.zeros((1 + rounds) * t, (1 + rounds) * t, dtype=torch.bool, device=device)
        sees.fill_diagonal_(True)
        for i in range(rounds):
            part = sees[(1 + i) * t : (2 + i) * t]
            part[:, :t] = at[None] < (at - i)[:, None]
            if i:  # round 0's rows stand for the drafted tokens before p
                part[:, t : 2 * t] = (at[None] < at[:, None]) & (at[None] >= (at - i)[:, None])
        mask = states.new_zeros(sees.shape).masked_fill_(~sees, torch.finfo(states.dtype).min)[None, None]
        made = self.layer(torch.cat([states, *[trigrams] * rounds], 1), at.repeat(1 + rounds)[None], mask)
        return list(made[:, t:].split(t, 1))


class _Fusing(Grower):
    """`memory`: a row for every state of the target, then those of the drafted tokens until the next round."""

    def __init__(self, draft: Any, model: Any, *shape: Any):
        super().__init__(model, *shape)
        self.net = draft

    def known(self, text: list[int], at: int, states: Tensor) -> Tensor:
        self.memory.length = at - self.first
        last = [text[max(0, len(text) - back)] for back in (3, 2, 1)]
        z = self.embed(torch.tensor([last], device=self.device)).flatten(1)
        rows = torch.cat([states, self.net.trigram(z)])[None]
        positions = torch.arange(at, len(text), device=self.device)[None]
        made = self.net.layer(rows, positions, None, self.memory)[0, -1:]
        self.state, self.pairs = states[-1:], torch.tensor([last[1:]], device=self.device)
        return self.net.heads[0](torch.cat([self.state, made], 1))

    def deeper(self, tokens: Tensor, above: Tensor, level: int) -> Tensor:
        three = torch.cat([self.pairs[above], tokens[:, None]], 1)
        self.pairs = three[:, 1:]
        made = self.read_level(self.net.layer, self.net.trigram(self.embed(three).flatten(1)), above)[0]
        return self.net.heads[level](torch.cat([self.state.expand(len(made), -1), made], 1))
