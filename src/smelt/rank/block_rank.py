"""The order from the attention that the end of the prompt pays to each passage, all passages read side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from smelt.model import _walk
from smelt.rank import Answer, Asked, Scoring
from smelt.rank._blocks import MARK, TAIL, Blocks, compose, mask, reach, read, stack
from smelt.rank._order import by_digest, sort
from smelt.rank._reading import needs_decoder
from smelt.rank._training import Labelled, Learns
from smelt.spec import Paper, SmeltError

__all__ = ["BlockRank"]

TAU = 0.05  # of the contrastive loss; the authors' configuration, their guide says 0.1
NAME = "smelt_block_rank"
REQUEST = f"Find the passages that answer the query. Query: {MARK}\n\n{MARK}\nQuery: {MARK}\nName the passages that answer it."


class _Looked(NamedTuple):
    query: Tensor  # [b, heads, t, d], rotated
    key: Tensor  # [b, kv heads, w, d], rotated, the cache's before the new ones
    scaling: float
    softcap: float | None


_watched: dict[Any, tuple[Callable[..., Any] | None, list[_Looked]]] = {}


@dataclass(frozen=True)
class BlockRank(Scoring, Learns):
    """S_i = mean over heads and signal rows q of sum_{t in passage i} softmax_t(q k_t / sqrt d), t over all passages' tokens.

    The attention of `layer` (a number, or a part of the depth: 0.5 is the middle) from the last two tokens of the
    prompt, where the answer opens. Instruction and query see themselves, a passage sees them and itself, the query
    written again at the end sees all; positions of every passage begin after the instruction, those of the end at half
    the context, so that the number and order of passages change nothing there. Passages carry the identifiers
    0, 1, ... as given; with `order_free` they carry none and S moves with the passages.

    Trained by L = L_LM + `aux` L_aux: the cross-entropy of "3, 7]", the passages of the largest grade, and
    L_aux = -log(sum_{i positive} e^(S_i/0.05) / sum_i e^(S_i/0.05)); without identifiers by `aux` L_aux alone.
    S [n] float32, sum 1: shares of one call's attention, not divided by lengths, so long passages collect more.

    Cost: the tokens of n passages through layer / layers of the depth and the queries and keys of one more; attention pairs
    n L (L + A) + D n L for passages of L, an instruction of A and an end of D tokens, linear in n (`_blocks.read`; keys
    and values of all passages are held). Training uses the dense mask, quadratic, and all layers, with `order_free` those that are
    read. Gradient checkpointing must be the kind that is not reentrant, or L_aux has no gradient.

    Raises SmeltError for a model that is no decoder or has no such layer, for texts that find no room, and for attention
    that is not finite. Differs from the paper: the wording of the prompt; the end begins at half the context (16384 is that
    of their Mistral); documents are `length` tokens and their marks; in training they stand in an order drawn from the texts.
    """

    paper: ClassVar = Paper("Scalable In-context Ranking with Generative Models (BlockRank)", "arXiv:2510.05396", "blockwise attention")
    layer: int | float = 0.5
    length: Annotated[int, Ge(1)] = 160  # tokens kept of each passage
    order_free: bool = False
    aux: Annotated[float, Ge(0)] = 0.1
    labels: Any = None  # judge or strategy of the teacher that grades what is trained on; None: the grades of the data
    weights: Any = None  # folder of a trained one; there is nothing beside the checkpoint itself

    def __post_init__(self) -> None:
        if self.layer < 0 or (isinstance(self.layer, float) and self.layer >= 1):
            raise SmeltError(f"block_rank: layer={self.layer} is neither a layer (0, 1, ...) nor a part of the depth from 0.0 to below 1.0")
        if self.order_free and self.aux == 0:
            raise SmeltError("block_rank: with order_free and aux=0 nothing would be learned; give aux=1.0")

    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        return sort(self.scores(asked, model))

    def scores(self, asked: Sequence[Asked], model: Any) -> list[Tensor]:
        needs_decoder(model, "block_rank")
        index, found = self._index(model.model), [torch.empty(0)] * len(asked)
        laid = [self._lay(one.query, one.passages, model) for one in asked]
        with _watching(model.model, index, ends=True) as looked:
            for part in read(model, laid):  # the last call before each of them is that of the tails
                last = torch.tensor([int((laid[i].segment == TAIL).sum()) - 1 for i in part.which], device=part.segment.device)
                n = max(len(asked[i].passages) for i in part.which)
                mass = shares(looked[0], last, part.segment, n).cpu()
                for at, i in enumerate(part.which):
                    found[i] = mass[at, : len(asked[i].passages)]
        if not all(bool(torch.isfinite(s).all()) for s in found):
            raise SmeltError("block_rank: the model's attention is not finite")
        return found

    def heads(self, config: Any) -> None:
        return None

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """ids, positions, segment [b, t]; ends [b], the prompt's last token; positive [b, n], 1 or 0, -1 where there is no passage."""
        laid, ends, positive = [], [], []
        for one in lists:
            order = by_digest(one.query, one.passages, one.turn)
            good = [int(one.grades[i] == max(one.grades)) for i in order]
            answer = ", ".join(str(at) for at, g in enumerate(good) if g) + "]"
            more = [] if self.order_free else model.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
            laid.append(self._lay(one.query, [one.passages[i] for i in order], model, context, more))
            ends.append(len(laid[-1].ids) - len(more) - 1)
            positive.append(torch.tensor(good))
        grades = pad_sequence(positive, batch_first=True, padding_value=-1)
        return {**stack(laid)._asdict(), "ends": torch.tensor(ends), "positive": grades}

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        ids, segment, ends, positive = (batch[name] for name in ("ids", "segment", "ends", "positive"))
        first, index = int(ends.min()), self._index(model)
        options = {"attention_mask": mask(segment, model.dtype), "position_ids": batch["positions"], "use_cache": False}
        with _watching(model, index, ends=self.order_free) as looked:
            if self.order_free:  # nothing behind that attention is learned from
                model.base_model(input_ids=ids, **options)
            else:
                logits = model(input_ids=ids, logits_to_keep=ids.shape[1] - first, **options).logits
        found = self.aux * info_nce(shares(looked[0], ends, segment, positive.shape[1]), positive)
        if self.order_free:
            return found
        told = (segment == TAIL) & (torch.arange(ids.shape[1], device=ids.device) > ends[:, None])
        each = cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, first + 1 :], reduction="none") * told[:, first + 1 :]
        return found + each.sum(1) / told.sum(1)

    def _lay(self, query: str, passages: Sequence[str], model: Any, total: int | None = None, after: Sequence[int] = ()) -> Blocks:
        if self.order_free:
            parts = [("", text, "\n") for text in passages]
        else:
            parts = [(f"ID {i} | ", text, f" | END ID {i}\n") for i, text in enumerate(passages)]
        how: Any = {"length": self.length, "tail_at": reach(model) // 2, "total": total, "after": after}
        return compose(model, REQUEST, query, parts, "Relevant: [", **how)

    def _index(self, model: Any) -> int:
        layers = len(_walk.blocks(model))
        index = int(self.layer * layers) if isinstance(self.layer, float) else self.layer
        if index >= layers:
            raise SmeltError(f"block_rank: layer={self.layer}, and the model has the layers 0 to {layers - 1}")
        return index


def shares(looked: _Looked, last: Tensor, segment: Tensor, n: int) -> Tensor:
    """S [b, n] float32: rows `last` [b] - 1 and `last` of the query over the keys of passages, `segment` [b, w] of the first w keys."""
    b, heads, _, d = looked.query.shape
    rows = torch.stack([last - 1, last], 1)
    query = looked.query[torch.arange(b, device=last.device)[:, None], :, rows].float()  # [b, 2, heads, d]
    key = looked.key[:, :, : segment.shape[1]].float()
    logits = torch.einsum("bskgd,bkwd->bskgw", query.view(b, 2, key.shape[1], heads // key.shape[1], d), key) * looked.scaling
    if looked.softcap is not None:
        logits = torch.tanh(logits / looked.softcap) * looked.softcap
    mass = logits.masked_fill((segment <= 0)[:, None, None, None], -torch.inf).softmax(-1).mean((1, 2, 3))
    return torch.zeros(b, n + 1, device=mass.device).scatter_add(1, segment.clamp(min=0), mass)[:, 1:]


def info_nce(scores: Tensor, positive: Tensor, tau: float = TAU) -> Tensor:
    """-log(sum over positives / sum over all) of e^(score / tau); both [b, n], -1 in `positive` is no passage."""
    scaled = scores / tau
    every = scaled.masked_fill(positive < 0, -torch.inf).logsumexp(1)
    return every - scaled.masked_fill(positive < 1, -torch.inf).logsumexp(1)


def _watch(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    through, found = _watched[module]
    found[:] = [_Looked(query, key, options["scaling"], options.get("softcap"))]
    if through is not None:
        return through(module, query, key, value, mask, **options)
    return torch.zeros_like(query[..., :1]).transpose(1, 2).repeat(1, 1, 1, value.shape[-1]), None


@contextmanager
def _watching(model: Any, index: int, ends: bool = False) -> Iterator[list[_Looked]]:
    """What the attention of one layer was given last. Only that layer is sent through `_watch`, by a configuration of its own.
    Where the model `ends` there, nothing behind the layer's keys is computed: what it puts out is nonsense that nobody reads."""
    block, config = _walk.blocks(model)[index], model.base_model.config
    attention: Any = _walk.attention_of(block)
    before, own = attention.config, getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    to: Any = None if ends else AttentionInterface().get_interface(before._attn_implementation, own)  # type: ignore[arg-type]
    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, _watch)
    found: list[_Looked] = []
    _watched[attention], attention.config = (to, found), copy(before)
    attention.config._attn_implementation = NAME
    layers, mlp = config.num_hidden_layers, getattr(block, "mlp", nn.Module())
    held = {name: value for name, value in vars(mlp).items() if name == "forward"}
    if ends:
        config.num_hidden_layers, mlp.forward = index + 1, lambda hidden, *_, **__: hidden
    try:
        yield found
    finally:
        attention.config, config.num_hidden_layers = before, layers
        _watched.pop(attention)
        vars(mlp).pop("forward", None)
        vars(mlp).update(held)
