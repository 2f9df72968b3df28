"""A new, untrained decoder that sends its states through the same blocks several times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge, Le
from torch import Tensor, nn
from transformers import MistralConfig, PreTrainedModel, PreTrainedTokenizerFast

from smelt.model._swap import Swapped
from smelt.model._walk import attention_of
from smelt.model.mistral import Mistral
from smelt.spec import Paper, SmeltError

__all__ = ["Loop"]


class Passes(nn.Module):
    """states [b, t, d] -> [b, t, d]: the one entry in the list of layers of a looped model. It is called as a block is."""

    def __init__(self, blocks: list[nn.Module], times: int, residual: bool):
        super().__init__()
        self.blocks, self.times, self.residual = nn.ModuleList(blocks), times, residual

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attentions: list[Any] = [attention_of(block) for block in self.blocks]
        try:
            for n in range(self.times):
                before = hidden_states
                for at, block in enumerate(self.blocks):
                    attentions[at].layer_idx = n * len(attentions) + at  # where this pass keeps its keys and values
                    hidden_states = block(hidden_states, **kwargs)
                if self.residual:
                    hidden_states = before + hidden_states
        finally:
            for at, attention in enumerate(attentions):
                attention.layer_idx = at
        return hidden_states


class Looped(nn.ModuleList, Swapped):
    """Stands for the list of blocks and holds one `Passes`."""

    owner = "model.loop"

    def settings(self) -> dict[str, Any]:
        passes: Any = self[0]
        return {"times": passes.times, "residual": passes.residual}

    @classmethod
    def build(cls, was: Any, times: int, residual: bool) -> Self:
        """`was` has as many blocks as passes run: the first of each `times` of them stay."""
        if times < 1 or len(was) % times:
            raise SmeltError(f"num_hidden_layers is {len(was)}, which {times} passes through the same blocks cannot make")
        return cls([Passes(list(was)[: len(was) // times], times, residual)])


@dataclass(frozen=True)
class Loop:
    """x_{n+1} = x_n + f(x_n) for n < T, then the final norm and the head; f is a run of `layers` blocks, the same in every pass.

    x_0 [b, t, d] are the embeddings. Without `residual` x_{n+1} = f(x_n), and T = 1 is then the model of `mistral(...)`, bit for
    bit. A block adds to its input itself, so with the residual x doubles with every pass and early passes weigh more in the
    end; the norms in front of attention, ffn and head take the scale out. Weights are drawn as for a model of
    T `layers` blocks: what writes to the residual stream is divided by sqrt(2 T layers). The loss is on the last iterate.

    Parameters: those of `mistral` with `layers` blocks, whatever T. FLOPs of the blocks, activations in training and the KV
    cache: T times, 2 T layers (kv_heads 64) numbers per token; pass n of block l keeps its keys and values in layer n layers + l.
    config.json says T layers blocks, so that every cache, and the estimate before a run, has room for all; its estimate of the
    disk is too large by as much. Plain transformers cannot express it: the checkpoint says "smelt" and loads with
    `smelt.load`. The list of layers has one entry, all passes together: what needs single blocks (attention bound to
    it, pruning of heads, early exit) refuses it or sees one layer.

    Raises SmeltError without `data` and for heads that do not divide. At most 9 passes, or a model of one block says more
    layers than it has weights, which the loader refuses.

    Differs from the paper: there GPT-2 blocks, here Mistral's; the variant that feeds x_0 to every pass is left out, and so are
    blocks outside the loop. "81M-LOOP" is 6 blocks 6 times, "45M-LOOP" 1 block twice.
    """

    paper: ClassVar = Paper("Loop Neural Networks for Parameter Sharing", "arXiv:2409.14199", "residual iteration of a run of blocks")
    module: ClassVar = Looped
    times: Annotated[int, Ge(1), Le(9)] = 3
    residual: bool = True
    layers: Annotated[int, Ge(1)] = 2
    hidden: Annotated[int, Ge(64)] = 256
    ffn: Annotated[int, Ge(1)] = 640
    heads: Annotated[int, Ge(1)] = 4
    kv_heads: Annotated[int, Ge(1)] = 2
    vocab: Annotated[int, Ge(258), Le(1 << 20)] = 4096
    context: Annotated[int, Ge(16)] = 2048
    data: Any = None  # a corpus: the tokenizer is trained on its train split

    def create(self, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        if self.data is None:
            raise SmeltError("loop needs a corpus for its tokenizer: loop(data=stdlib())")
        model, tokenizer = self._unrolled().create(seed)
        model.model.layers = Looped.build(model.model.layers, self.times, self.residual)
        return model, tokenizer

    def config(self) -> MistralConfig:
        if self.heads % self.kv_heads:
            raise SmeltError(f"loop: heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        return self._unrolled().config()

    def _unrolled(self) -> Mistral:
        """With blocks of their own for every pass."""
        return Mistral(self.times * self.layers, self.hidden, self.ffn, self.heads, self.kv_heads, self.vocab, self.context, data=self.data)
