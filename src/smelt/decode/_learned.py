"""Drafts that are trained over the states of one target: how they are kept, grown and refused.

    row p of a draft = (token x_p, the target's state f_{p-1})  ->  what comes after x_p

f is what the target's head reads (after its final norm), in training and in drafting alike. A method says what its module
is, what it loses on a batch, and how it reads one more level; `Grower` makes a chain or a tree of that. The target is
never trained: embeddings and head are read from the model a draft is bound to, and the file holds neither.

The tree is that of EAGLE-2 (arXiv:2406.16858): on every level the `width` best of all new nodes, by the sum of their
log-probabilities, get `width` children each; of all nodes the `nodes` best are kept, whose ancestors are always among them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from smelt import registry
from smelt.decode._loop import Choice
from smelt.decode._rule import drawn
from smelt.decode._verify import Draft, Drafter, Drafting
from smelt.model._load import load, vocabulary
from smelt.model._walk import blocks, mlp_of, parts, stack
from smelt.spec import SmeltError

__all__ = ["FILE", "Grower", "Layer", "Learned", "Memory", "target_digest"]

FILE = "draft.safetensors"
ROWS = 256  # of the embedding, that a target is known by


class Learned(Drafting):
    """A draft with weights of its own: `weights` names the folder that holds `draft.safetensors`.

    In a recipe a `train:` block beside the method makes that folder (`smelt.train.draft`). The file names its method, its
    target and its target's tokenizer; a draft is refused by name where one of them, or a shape, is another's.
    """

    trains: ClassVar[bool] = True  # so that a recipe lets it have a train block
    drafting: ClassVar[tuple[str, ...]] = ("form", "depth", "width", "nodes")  # fields that no training looks at
    weights: Any  # a field of every method

    @abstractmethod
    def module(self, config: Any) -> nn.Module:
        """The draft for a target of this configuration, new. It may be made on the meta device."""

    @abstractmethod
    def start(self, draft: nn.Module, model: Any) -> None:
        """Set what a training begins with and the target gives, in place; nothing for many."""

    @abstractmethod
    def loss(self, draft: Any, model: Any, ids: Tensor, states: Tensor) -> Tensor:
        """Losses [b, t - 1] of the rows 1..t-1 of ids [b, t], float32; `states` [b, t, D] of the target, without gradient."""

    @abstractmethod
    def cost(self, draft: Any, config: Any) -> int:
        """FLOPs of training on one token, without the target's blocks. `draft` may be on the meta device."""

    @abstractmethod
    def grower(self, draft: Any, model: Any) -> Grower: ...

    @property
    def learned(self) -> Self:
        """This method as its training sees it: methods that differ in `drafting` alone share one draft."""
        said = {field.name: field.default for field in dataclasses.fields(cast(Any, self)) if field.name in self.drafting}
        return dataclasses.replace(cast(Any, self), **said)

    def drafter(self, model: Any, tokenizer: Any) -> Drafter:
        return self.grower(self.read(model, tokenizer), model)

    @property
    def file(self) -> Path:
        """Where its weights are. Raises SmeltError where there are none."""
        name = registry.name_of(self)[1]
        if not self.weights:
            raise SmeltError(
                f"decode: {name} is a draft that has to be trained; give it 'train: {{tokens: 500_000, context: 256, batch: 8}}' "
                f"in a recipe, or name the folder of one that has been: {name}(weights='runs/NAME/stages/{name}-...')"
            )
        file = Path(self.weights) / FILE
        if not file.is_file():
            raise SmeltError(f"decode: {name}: there is no {FILE} in '{self.weights}'; name the folder of a decode stage that was trained")
        return file

    def read(self, model: Any, tokenizer: Any) -> nn.Module:
        """The trained module, on the target's device and in its precision."""
        file, name = self.file, registry.name_of(self)[1]
        where = f"decode: {name}: the draft '{self.weights}'"
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads((opened.metadata() or {}).get("smelt", "{}"))
            held = load_file(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise SmeltError(f"{where} cannot be read: {error}") from error
        if about.get("method") != name:
            raise SmeltError(f"{where} is one of '{about.get('method')}'")
        draft = self.module(model.config.get_text_config(decoder=True))
        wanted = {key: tuple(value.shape) for key, value in draft.state_dict().items()}
        for key in sorted(wanted.keys() | held.keys()):
            there = tuple(held[key].shape) if key in held else None
            if there != wanted.get(key):
                said = f"'{key}' is {there or 'missing'} there and {wanted.get(key) or 'unknown'} here"
                raise SmeltError(f"{where} is for another target or other settings: {said}; it was made as {about.get('text')}")
        if about.get("target") and about["target"] != target_digest(model):
            raise SmeltError(f"{where} was trained for another model (other embeddings or sizes); train one for this model")
        if about.get("tokenizer") and tokenizer is not None and about["tokenizer"] != vocabulary(tokenizer):
            raise SmeltError(f"{where} was trained with another tokenizer; ids would change their meaning")
        draft.load_state_dict(held)
        return draft.to(model.device, model.dtype).eval().requires_grad_(False)

    def write(self, draft: nn.Module, folder: Path, model: Any = None, tokenizer: Any = None) -> None:
        """draft.safetensors with what it is for; without a model it fits every target of its shapes."""
        about = {"method": registry.name_of(self)[1], "text": registry.text(self.learned)}
        about |= {"target": target_digest(model)} if model is not None else {}
        about |= {"tokenizer": vocabulary(tokenizer)} if tokenizer is not None else {}
        folder.mkdir(parents=True, exist_ok=True)
        held = {name: value.detach().cpu().contiguous() for name, value in draft.state_dict().items()}
        save_file(held, folder / FILE, {"smelt": json.dumps(about)})  # one entry: of several the order on the disk is by chance

    def untrained(self, target: Path, place: Path, seed: int = 0) -> Self:
        """This method with weights as a training begins with, written into `place` for targets shaped as the checkpoint
        `target`: what shows that the text does not depend on the draft."""
        model = load(target).model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            draft = self.module(model.config.get_text_config(decoder=True))
            self.start(draft, model)
        self.write(draft, place)
        return dataclasses.replace(cast(Any, self), weights=str(place))


def target_digest(model: Any) -> str:
    """Of the sizes and the first embeddings in bfloat16: the same for a model, its other precisions and its quantized blocks."""
    config = model.config.get_text_config(decoder=True)
    rows = model.get_input_embeddings().weight[:ROWS].detach().cpu().to(torch.bfloat16)
    about = json.dumps([config.model_type, *parts(config)]).encode()
    return hashlib.sha256(about + rows.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


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
