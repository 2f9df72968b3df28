"""EAGLE with features that the sampled token gates, and a state apart from the logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.functional import silu, smooth_l1_loss

from smelt.decode._grower import Grower, Layer, Memory
from smelt.decode._learned import Learned
from smelt.model._walk import parts
from smelt.spec import Paper, SmeltError

__all__ = ["FSPAD"]

BATCH = 1024  # rows whose logits are held at once while training


@dataclass(frozen=True)
class FSPAD(Learned):
    """u = W[e; f]; u <- u + W_d(silu(W_g e) * W_u norm(u)); (a, b) = layer(u); logits = head(a), the next row's f is b.

    e [D] the embedding of token x_p, f [D] the target's state before it, so one state becomes another feature for each token
    that may follow it. `layer` is one decoder layer of the target's own class over all rows so far, its last map twice
    as wide: a = h + M i, b = h + (M + S) i, with h its residual and i the input of that map. S = 0 ties the halves and W_d = 0
    closes the gate: then this is EAGLE, and training begins there, with W = [., 1], a feature that is the state.

    loss = regression * smoothL1(b, f_p) + classification * CE(softmax(head(f_p)), head(a)), per row p; the first is the mean over D, the
    second in nats. While training uniform noise in +-noise / 2 of the state's root mean square is put on f (partial alignment distillation:
    only b is held to the target's state, so the logits are free of that).

    Drafts: a tree (`_learned.Grower`), exact greedy and sampled because it is certain of itself, or a chain, which under
    sampling is drawn from the draft's law and kept by the rule for drawn drafts. Each round the draft forgets the rows it
    wrote itself and reads the kept tokens with the target's states.

    Cost: the layer and 2 D^2 + 4 D I more weights (I the width of the feed-forward); a round is `depth` calls of the layer and
    the target's head, on `width` rows, and `nodes` more positions in the call of the target. Training: one call of the target,
    6 FLOPs per weight of the draft and twice the head, per token. Raises SmeltError without weights, and for those of another target.

    Differs from the paper: the layer keeps its first norm (EAGLE drops it); the second half is kept as its difference S from the
    first, which is the same map; W and the gate begin where EAGLE is a copy of the state; the noise is in units of the state, the
    paper's in absolute ones; in a layer with a norm after its feed-forward (Gemma 2) S comes after that norm (all four
    reconstructions). The paper trains 20 epochs of a chat corpus at lr 5e-5 and drafts 60 nodes, which on a CPU cost more
    than they save: the defaults are small.
    """

    paper: ClassVar = Paper(
        "Boosting Lossless Speculative Decoding via Feature Sampling and Partial Alignment Distillation",
        "arXiv:2408.15562",
        "section 3",
    )
    weights: str = ""  # folder with draft.safetensors; "": a train block makes one
    form: Literal["tree", "chain"] = "tree"
    depth: Annotated[int, Ge(1)] = 4  # tokens drafted ahead
    width: Annotated[int, Ge(1)] = 3  # nodes of a level that get children, and how many each
    nodes: Annotated[int, Ge(1)] = 12  # of the tree that the target reads
    regression: Annotated[float, Ge(0)] = 1.0
    classification: Annotated[float, Ge(0)] = 0.1
    noise: Annotated[float, Ge(0)] = 0.2

    def __post_init__(self) -> None:
        if not self.classification:
            raise SmeltError("fspad: classification=0 leaves the logits of the draft without any loss; make it larger than 0")

    def module(self, config: Any) -> nn.Module:
        return _Eagle(config)

    def start(self, draft: Any, model: Any) -> None:
        with torch.no_grad():
            draft.join.weight[:, : draft.size].normal_(std=0.02)
            draft.join.weight[:, draft.size :].copy_(torch.eye(draft.size))

    def loss(self, draft: Any, model: Any, ids: Tensor, states: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = model.get_input_embeddings()(ids[:, 1:])
            before, after = states[:, :-1], states[:, 1:]
            if self.noise:
                scale = self.noise * before.float().square().mean(-1, keepdim=True).sqrt().to(before.dtype)
                before = before + (torch.rand_like(before) - 0.5) * scale
        positions = torch.arange(1, ids.shape[1], device=ids.device)[None]
        said, state = draft(tokens, before, positions)
        loss = self.regression * smooth_l1_loss(state.float(), after.float(), reduction="none").mean(-1)
        return loss + self.classification * _against(model.get_output_embeddings(), said, after)

    def cost(self, draft: Any, config: Any) -> int:
        return (
            6 * sum(p.numel() for p in draft.parameters()) + 6 * parts(config).vocab * parts(config).hidden
        )  # the head: 2 both ways, 2 back

    def grower(self, draft: Any, model: Any) -> Grower:
        return _Rows(draft, model, self.form == "tree", self.depth, self.width, self.nodes)

    @classmethod
    def example(cls, draft: Path) -> FSPAD:
        return cls(depth=3).untrained(draft, draft / "untrained-fspad")


def _against(head: Any, said: Tensor, states: Tensor) -> Tensor:
    """CE(softmax(head(states)), head(said)) of every row; logits of BATCH rows at a time."""
    losses = []
    for mine, theirs in zip(said.flatten(0, 1).split(BATCH), states.flatten(0, 1).split(BATCH), strict=True):
        with torch.no_grad():
            law = head(theirs).float().softmax(-1)
        losses.append(-(law * head(mine).float().log_softmax(-1)).sum(-1))
    return torch.cat(losses).view(said.shape[:2])


class _Eagle(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.size, wide = parts(config).hidden, parts(config).ffn
        self.join = nn.Linear(2 * self.size, self.size, bias=False)  # W
        self.norm = nn.RMSNorm(self.size, eps=1e-6)
        self.gate = nn.Linear(self.size, wide, bias=False)  # W_g
        self.up = nn.Linear(self.size, wide, bias=False)  # W_u
        self.down = nn.Linear(wide, self.size, bias=False)  # W_d
        self.layer = Layer(config)
        self.second = nn.Linear(self.layer.wide, self.size, bias=False)  # S
        for closed in (self.down, self.second):
            nn.init.zeros_(closed.weight)

    def enter(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Embeddings and states [..., D] -> what the layer reads."""
        u = self.join(torch.cat([tokens, states], -1))
        return u + self.down(silu(self.gate(tokens)) * self.up(self.norm(u)))

    def leave(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """(what the head reads, the next state), right after the layer has run."""
        return first, first + self.second(self.layer.inner)

    def forward(self, tokens: Tensor, states: Tensor, positions: Tensor, memory: Memory | None = None) -> tuple[Tensor, Tensor]:
        return self.leave(self.layer(self.enter(tokens, states), positions, None, memory))


class _Rows(Grower):
    """`memory`: row p for every p the target has read the token before; then those of the tree, until the next round."""

    def __init__(self, draft: Any, model: Any, *shape: Any):
        super().__init__(model, *shape)
        self.net = draft

    def known(self, text: list[int], at: int, states: Tensor) -> Tensor:
        self.memory.length = at - self.first
        ids = torch.tensor([text[at + 1 :]], device=self.device)
        positions = torch.arange(at + 1, len(text), device=self.device)[None]
        said, state = self.net(self.embed(ids), states[None], positions, self.memory)
        self.states = state[0, -1:]
        return self.head(said[0, -1:])

    def deeper(self, tokens: Tensor, above: Tensor, level: int) -> Tensor:
        rows = self.net.enter(self.embed(tokens), self.states[above])
        said, state = self.net.leave(self.read_level(self.net.layer, rows, above))
        self.states = state[0]
        return self.head(said[0])
