"""MOHAWK: a state space in the place of attention, taught to mix tokens with the matrix that attention mixes them with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.nn.functional import pad, silu, softplus
from torch.nn.utils import skip_init

from smelt.attention._heads import attended, heads, refuse, shape, weights
from smelt.attention._mixer import MixerModule, State, Transferring
from smelt.model._walk import parts
from smelt.spec import Paper

__all__ = ["Mohawk"]

CHUNK, SPAN = 64, 1024  # tokens worked on together, tokens of a pass: they change speed and memory, never what comes out
TAPS = 4  # of the short convolution
SHORTEST, LONGEST = 2.0, 128.0  # at the start: tokens after which a head's memory has faded to 1/e
STRENGTH = 0.25  # at the start: the spread of the entries C_i^T B_j, of the size of attention weights


def faded(fade: Tensor) -> Tensor:
    """fade [..., t] = log a -> [..., t, t] float32: the product of a over k = j + 1 .. i at (i, j) for j <= i, zero elsewhere."""
    since = fade.double().cumsum(-1)  # what came long ago would cost the last digits of what is near
    gap = (since[..., :, None] - since[..., None, :]).float()
    later = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).triu(1)
    return gap.masked_fill(later, -torch.inf).exp()  # before exp: what is masked could be infinite


def matrix(b: Tensor, c: Tensor, fade: Tensor, skip: Tensor) -> Tensor:
    """T [batch, h, t, t] float32 with y = T x."""
    return (c.float() @ b.float().mT) * faded(fade) + torch.diag_embed(skip.float()[:, None].expand(-1, fade.shape[-1]))


def scan(x: Tensor, b: Tensor, c: Tensor, fade: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_i = C_i^T S_i, S_i = a_i S_(i-1) + B_i x_i^T: x [batch, h, t, d], b, c [batch, h, t, n], fade [batch, h, t] = log a
    -> (y like x, the last S [batch, h, n, d]), float32. Chunks: products within one, the state from one to the next."""
    t = x.shape[2]
    size = min(CHUNK, t)
    x, b, c = (pad(z.float(), (0, 0, 0, -t % size)).unflatten(2, (-1, size)) for z in (x, b, c))
    fade = pad(fade, (0, -t % size)).unflatten(2, (-1, size))
    since = fade.double().cumsum(-1)
    whole = since[..., -1:]
    enters = (b * (whole - since).float().exp()[..., None]).mT @ x
    state = torch.zeros_like(enters[:, :, 0]) if state is None else state
    before = []
    for chunk in range(x.shape[2]):
        before.append(state)
        state = whole[:, :, chunk, :, None].float().exp() * state + enters[:, :, chunk]
    y = (c @ b.mT * faded(fade)) @ x + (c * since.float().exp()[..., None]) @ torch.stack(before, 2)
    return y.flatten(2, 3)[:, :, :t], state


class MohawkMixer(MixerModule):
    """Discrete Mamba-2 of h heads. State: `conv` [b, 3, h (d + 2 n)], the convolution's last inputs, and `sums` [b, h, n, d] float32."""

    owner: ClassVar[str] = "attention.mohawk"

    def __init__(self, was: Any, state: int):
        super().__init__(was)
        count, _, d, hidden = shape(was)
        like = {"device": was.o_proj.weight.device, "dtype": was.o_proj.weight.dtype}
        values = getattr(was, "v_proj", None) or was.qkv_proj
        self.head_dim, self.states = d, state
        self.x_proj = skip_init(nn.Linear, hidden, count * d, bias=values.bias is not None, **like)
        self.b_proj = skip_init(nn.Linear, hidden, count * state, bias=False, **like)
        self.c_proj = skip_init(nn.Linear, hidden, count * state, bias=False, **like)
        self.gate_proj = skip_init(nn.Linear, hidden, count * d, **like)
        self.fade_proj = skip_init(nn.Linear, hidden, count, **like)
        self.o_proj = skip_init(nn.Linear, count * d, hidden, bias=was.o_proj.bias is not None, **like)
        channels = count * (d + 2 * state)
        self.conv, self.conv_bias = nn.Parameter(torch.zeros(TAPS, channels, **like)), nn.Parameter(torch.zeros(channels, **like))
        self.skip = nn.Parameter(torch.ones(count, **like))

    def settings(self) -> dict[str, Any]:
        return {"state": self.states}

    @classmethod
    def build(cls, was: Any, *, state: int) -> Self:
        refuse(was, "mohawk")
        return cls(was, state)

    @torch.no_grad()
    def start(self, was: Any) -> None:
        """Values and output are the attention's, convolution and gate let everything through, C and B are drawn."""
        count, groups, d, hidden = shape(was)
        values = getattr(was, "v_proj", None) or was.qkv_proj
        for name, new in self.x_proj.named_parameters():
            new.copy_(getattr(values, name)[-groups * d :].unflatten(0, (groups, d)).repeat_interleave(count // groups, 0).flatten(0, 1))
        self.o_proj.load_state_dict(was.o_proj.state_dict())
        for weight in (self.b_proj.weight, self.c_proj.weight):
            nn.init.normal_(weight, std=(STRENGTH / (hidden * self.states**0.5)) ** 0.5)
        nn.init.zeros_(self.gate_proj.weight)
        nn.init.constant_(self.gate_proj.bias, 1.2784645)  # silu of it is 1
        nn.init.normal_(self.fade_proj.weight, std=0.1 * hidden**-0.5)
        memory = torch.logspace(0, 1, count, base=LONGEST / SHORTEST) * SHORTEST
        self.fade_proj.bias.copy_((1 / memory).expm1().log())  # softplus of it is 1 / memory
        self.conv[-1] = 1.0

    def streams(self, hidden: Tensor, held: dict[str, Tensor], real: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(x [b, h, t, d], B and C [b, h, t, n], log a [b, h, t], the convolution's last inputs)."""
        t = hidden.shape[1]
        given = torch.cat([self.x_proj(hidden), self.b_proj(hidden), self.c_proj(hidden)], -1)
        fade = -softplus(self.fade_proj(hidden).float())
        if real is not None:
            given, fade = given * real[..., None], fade * real[..., None]
        given = torch.cat([held["conv"], given], 1) if held else pad(given, (0, 0, TAPS - 1, 0))
        made = sum((given[:, k : k + t] * self.conv[k] for k in range(TAPS)), self.conv_bias)
        wide, count = self.x_proj.out_features, self.skip.shape[0]
        x, b, c = (part.unflatten(-1, (count, -1)).transpose(1, 2) for part in made.tensor_split((wide, wide + count * self.states), -1))
        b = b if real is None else b * real[:, None, :, None]
        return x, b, c, fade.transpose(1, 2), given[:, -(TAPS - 1) :]

    def mix(self, hidden: Tensor, angles: tuple[Tensor, Tensor], state: State | None, real: Tensor | None) -> Tensor:
        held, pieces = state.held if state is not None else {}, []
        for start in range(0, hidden.shape[1], SPAN):
            part = hidden[:, start : start + SPAN]
            x, b, c, fade, conv = self.streams(part, held, None if real is None else real[:, start : start + SPAN])
            y, sums = scan(x, b, c, fade, held.get("sums"))
            held = {"conv": conv, "sums": sums}
            pieces.append(self.out(part, x, y))
        if state is not None:
            state.held = {name: last.clone(memory_format=torch.contiguous_format) for name, last in held.items()}
        return torch.cat(pieces, 1)

    def out(self, hidden: Tensor, x: Tensor, y: Tensor) -> Tensor:
        y = (y + self.skip.float()[:, None, None] * x).to(hidden.dtype).transpose(1, 2).flatten(2)
        return self.o_proj(y * silu(self.gate_proj(hidden)))


@dataclass(frozen=True)
class Mohawk(Transferring):
    """y = T x, T_ij = C_i^T (prod of a_k over k = j + 1 .. i) B_j for j <= i, plus D on the diagonal; a = exp(-softplus(A_log)).

    x, B, C and A_log are linear in the layer's input u, x, B and C then pass a causal convolution over 4 tokens; y is gated by silu of
    a fifth map, o_proj follows. As many heads as attention has; B and C [n] and a of each head, x [d]. No positions, no norm.

    With a `train:` block each layer learns on attention's own input, in the paper's order: stage 1, the first `matrix` of the steps,
    ||T - A||_F, A the softmax matrix, the mean over batch and heads, counted at every position of its row; then stage 2,
    ||mixer(u) - attention(u)||_2 of each token. The logged loss is that of its stage, and ||T - A||_F grows with the length. Stage 3,
    the whole model, is `distill: forward_kl()` with `teacher: base` after it; what is not mixer stands still until then.

    Cost per token and layer, at any length: h (2 c (n + d) + 4 n d) FLOPs beside the projections, c = 64 the chunk (1 in decode).
    The matrix loss holds some 8 h t^2 floats for a row of t tokens: short rows, or `micro`. State: 3 h (d + 2 n) numbers and h n d
    float32 sums, at any length. Raises SmeltError for attention that is not softmax over all the past.

    Differs from the paper: stages 1 and 2 share one schedule of the learning rate. Ours is the start: values and o_proj copied from
    attention, the gate at 1, the convolution passing its input on, heads that fade over 2 to 128 tokens. D begins at 1, as in the
    authors' code. Every layer is converted; name some in `layers` for the paper's hybrid.
    """

    paper: ClassVar = Paper("Transformers to SSMs: Distilling Quadratic Knowledge to Subquadratic Models", "arXiv:2408.10189", "section 4")
    module: ClassVar = MohawkMixer
    state: Annotated[int, Ge(1)] = 64  # n
    matrix: Annotated[float, Interval(ge=0, le=1)] = 0.33  # share of the steps in stage 1; the paper: 80M of 240M tokens
    layers: tuple[int, ...] | None = None  # None: all

    @classmethod
    def example(cls) -> Self:
        return cls(state=8)

    def mixer(self, was: nn.Module, config: Any) -> MohawkMixer:
        refuse(was, "mohawk")
        made = MohawkMixer(was, self.state)
        made.start(was)
        return made

    def state_bytes(self, config: Any, tokens: int, batch: int = 1, itemsize: int = 4) -> int:
        sizes = parts(config)
        layers = sizes.layers if self.layers is None else len(self.layers)
        each = (TAPS - 1) * (sizes.head_dim + 2 * self.state) * itemsize + self.state * sizes.head_dim * 4
        return layers * batch * sizes.heads * each

    def learned(self, module: Any) -> list[nn.Parameter]:
        return list(module.parameters())

    def lost(self, module: Any, was: Any, hidden: Tensor, angles: tuple[Tensor, Tensor], progress: float) -> Tensor:
        with torch.no_grad():
            query, key, value = heads(was, hidden, angles)
        x, b, c, fade, _ = module.streams(hidden, {}, None)
        if progress < self.matrix:
            apart = torch.linalg.matrix_norm(matrix(b, c, fade, module.skip) - weights(query, key, was.scaling))
            return apart.mean(1, keepdim=True).expand(hidden.shape[:2])
        with torch.no_grad():
            wanted = was.o_proj(attended(query, key, value, was.scaling).transpose(1, 2).flatten(2))
        return (module.out(hidden, x, scan(x, b, c, fade)[0]) - wanted).float().norm(dim=-1)
