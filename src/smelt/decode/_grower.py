"""How a learned draft grows: a layer of the target's own class with a memory, and chains or trees of what it proposes.

The tree is that of EAGLE-2 (arXiv:2406.16858): on every level the `width` best of all new nodes, by the sum of their
log-probabilities, get `width` children each; of all nodes the `nodes` best are kept, whose ancestors are always among them.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel

from smelt.decode._loop import Choice
from smelt.decode._rule import drawn
from smelt.decode._verify import Draft, Drafter
from smelt.model._walk import blocks, mlp_of, stack
from smelt.spec import SmeltError

__all__ = ["Grower", "Layer", "Memory"]


class Memory:
    """Keys and values [1, h, n, d] of one layer in buffers that double; what a decoder layer takes for its cache."""

    def __init__(self) -> None:
        self.length = 0
        self.held: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + keys.shape[2]
        if not self.held or self.length > self.held[0].shape[2]:
            room = 2 * self.length + 64
            grown = [new.new_empty(*new.shape[:2], room, new.shape[3]) for new in (keys, values)]
            for old, new in zip(self.held, grown):
                new[:, :, :start] = old[:, :, :start]
            self.held = grown
        for buffer, new in zip(self.held, (keys, values), strict=True):
            buffer[:, :, start : self.length] = new
        return self.held[0][:, :, : self.length], self.held[1][:, :, : self.length]


class Layer(nn.Module):
    """One decoder layer of the target's own class, new, and what places its rows. Reads [b, t, D], whatever they are made of.

    `inner` after a call: the input of its last map (feed-forward, [b, t, `wide`]). Raises SmeltError for a layer without one.
    """

    inner: Tensor

    def __init__(self, config: Any):
        super().__init__()
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"  # every class has it
        with torch.device("meta"):
            whole: Any = AutoModel.from_config(config)
        places = getattr(stack(whole), "rotary_emb", None)
        down = getattr(mlp_of(blocks(whole)[0]), "down_proj", None)
        if places is None or not isinstance(down, nn.Linear):
            raise SmeltError(
                f"{config.model_type}: its layers have no rotary positions or no mlp.down_proj; a draft needs a llama-like target"
            )
        self.wide = down.in_features
        config._attn_implementation = "sdpa"  # causal by itself where there is no mask
        if getattr(config, "attn_logit_softcapping", None) is not None:
            config.attn_logit_softcapping = None  # which sdpa cannot do; a layer of our own need not
        self.block = type(blocks(whole)[0])(config, 0)
        self.places = type(places)(config)
        for module in self.block.modules():
            whole._init_weights(module)
        last: Any = mlp_of(self.block).down_proj
        last.register_forward_pre_hook(lambda _, args: setattr(self, "inner", args[0]))

    def forward(self, rows: Tensor, positions: Tensor, mask: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """`mask` [1, 1, t, n] is added to the scores; None: each row sees those before it and all of the memory."""
        if mask is None and memory is not None and memory.length and rows.shape[1] > 1:
            past, t = memory.length, rows.shape[1]
            mask = rows.new_full((t, past + t), torch.finfo(rows.dtype).min).triu(past + 1)[None, None]
        more = {"past_key_values": memory, "use_cache": True} if memory is not None else {}
        made = self.block(rows, attention_mask=mask, position_ids=positions, position_embeddings=self.places(rows, positions), **more)
        return made[0] if isinstance(made, tuple) else made


class Grower(Drafter):
    """Chains or trees out of a layer with a memory. What the memory holds of rows that were only drafted is cut every round,
    and the rows that were kept are read with the target's states. A draft begins once the target has read the text."""

    reads: ClassVar[bool] = True

    def __init__(self, model: Any, tree: bool, depth: int, width: int, nodes: int):
        self.tree, self.depth, self.width, self.nodes = tree, depth, width, nodes
        self.embed, self.head, self.device, self.dtype = (
            model.get_input_embeddings(),
            model.get_output_embeddings(),
            model.device,
            model.dtype,
        )

    def begin(self, text: list[int], choice: Choice) -> None:
        self.choice, self.memory, self.first, self.have = choice, Memory(), -1, 0
        self.pending: list[Tensor] = []

    def kept(self, text: list[int], read: int, hidden: Tensor | None) -> None:
        assert hidden is not None
        if self.first < 0:
            self.first = self.have = read  # later than 0 where a cache came with the call: what is before it stays unknown
        new = hidden[self.have - read :]  # some were read again
        if len(new):
            self.pending.append(new)
            self.have += len(new)

    def draft(self, text: list[int], room: int) -> Draft | None:
        if not self.pending or self.have != len(text) - 1:
            return None
        states = self.pending[0] if len(self.pending) == 1 else torch.cat(self.pending)
        self.pending = []
        logits = self.known(text, self.have - len(states), states)
        self.sees: Tensor | None = None
        self.past, self.place = self.memory.length, len(text)
        depth = min(self.depth, room)
        return self._tree(logits, depth) if self.tree else self._chain(logits, text, depth)

    @abstractmethod
    def known(self, text: list[int], at: int, states: Tensor) -> Tensor:
        """Logits [1, V] after `text`: cut the memory to what is true, and read the states [k, D] of text[at : at + k]."""

    @abstractmethod
    def deeper(self, tokens: Tensor, above: Tensor, level: int) -> Tensor:
        """Logits [w, V] after one more level of nodes: tokens [w] under the rows `above` [w] of the level before (level 1: row 0)."""

    def read_level(self, layer: Layer, rows: Tensor, above: Tensor) -> Tensor:
        """The rows [w, D] of a level through the layer, [1, w, D]: each sees what is known, its ancestors and itself. For `deeper`."""
        count = len(rows)
        positions = torch.full((1, count), self.place, device=self.device)
        self.place += 1
        mask = None
        if self.tree:
            own = torch.eye(count, dtype=torch.bool, device=self.device)
            self.sees = own if self.sees is None else torch.cat([self.sees[above], own], 1)
            mask = rows.new_zeros(count, self.past + self.sees.shape[1])
            mask[:, self.past :].masked_fill_(~self.sees, torch.finfo(rows.dtype).min)
            mask = mask[None, None]
        return layer(rows[None], positions, mask, self.memory)

    def _chain(self, logits: Tensor, text: list[int], depth: int) -> Draft:
        said, laws, above = list(text), [], torch.zeros(1, dtype=torch.long, device=self.device)
        for level in range(1, depth + 1):
            scores = self.choice.scores([said], logits)
            if self.choice.sample:
                laws.append(scores.softmax(-1))
                token = drawn(laws[-1])
            else:
                token = scores.argmax(-1)
            said.append(int(token))
            if level < depth:
                logits = self.deeper(token, above, level)
        return Draft(torch.tensor(said[len(text) :]), None, torch.cat(laws) if laws else None)

    def _tree(self, logits: Tensor, depth: int) -> Draft:
        width = min(self.width, logits.shape[-1])
        sums = logits.new_zeros(1, dtype=torch.float32)
        above = torch.zeros(1, dtype=torch.long, device=self.device)  # of a level's nodes: their parents among the level before
        names = above - 1  # of the rows just read: their nodes
        tokens, scores, parents, count = [], [], [], 0
        for level in range(1, depth + 1):
            best, said = logits.float().log_softmax(-1).topk(width, -1)
            best = (best + sums[:, None]).flatten()
            said = said.flatten()
            tokens.append(said)
            scores.append(best)
            parents.append(names.repeat_interleave(width))
            if level < depth:
                sums, chosen = best.topk(width)
                names, above = chosen + count, chosen // width
                logits = self.deeper(said[chosen], above, level)
            count += len(said)
        order = torch.cat(scores).sort(descending=True, stable=True).indices[: self.nodes].sort().values
        place = {node: at for at, node in enumerate(order.tolist())} | {-1: -1}
        return Draft(torch.cat(tokens)[order], [place[parent] for parent in torch.cat(parents)[order].tolist()])
