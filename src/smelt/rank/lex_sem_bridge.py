"""A query's vector, its dimensions weighed by the words it has or makes likely; passages stay plain vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from smelt.rank._reading import at_once, batches
from smelt.rank._training import FILE, Labelled, Learns, read
from smelt.rank._vectors import Dense, hidden, in_batch, pad, pooled
from smelt.rank.embedding import Embedding
from smelt.spec import Paper, SmeltError

__all__ = ["LexSemBridge"]


@dataclass(frozen=True)
class LexSemBridge(Dense, Learns):
    """score(q, d) = <norm(softmax(W w(q)) * e(q)), e(d)>, w [vocabulary] of the query's words, W [hidden, vocabulary].

    w is, by `words`: "present" (SLR): a learned scalar at the tokens of the query; "tokens" (LLR): max over places of
    relu(a . h_t + c) at the token that stands there; "likely" (CLR): log(1 + relu(logits)) of the language head at the
    query's last token, at its first in an encoder that has a head. Special tokens are 0. e is the held embedding(); an
    index of plain vectors stays as it is. Trained with its InfoNCE, at temperature 0.02.

    W is trained (heads) and starts at zero, where the gate is uniform: an untrained one is the plain embedding() exactly,
    and so is this judge with a model in whose folder there is no judge.safetensors and without `weights`.

    Cost beside embedding(): 2 hidden vocabulary FLOPs and 4 hidden vocabulary bytes of W a query; "likely" the language
    head once. Shapes: queries [n, hidden] float32, unit length.

    Raises SmeltError for a judge that is no embedding(), for echo (the query stands twice), for `weights` without a file
    and for "likely" with a model that has no language head.

    Differs from the paper: as in its released code, which differs from its text (no logarithm in SLR and LLR, the mean of
    pooled states has no part in LLR). A decoder reads CLR at the last token, where it has seen the query. W from zero is ours.
    """

    paper: ClassVar = Paper(
        "LexSemBridge: Fine-Grained Dense Representation Enhancement through Token-Aware Embedding Augmentation",
        "arXiv:2508.17858",
        "section 3",
    )
    judge: Any = field(default_factory=lambda: Embedding(temperature=0.02))
    words: Literal["present", "tokens", "likely"] = "tokens"
    labels: Any = None  # judge or strategy that the teacher grades lists with
    weights: Any = None  # folder with the trained W

    def __post_init__(self) -> None:
        if not isinstance(self.judge, Embedding) or self.judge.echo or not self.judge.normalize:
            raise SmeltError(f"lex_sem_bridge: judge={self.judge!r}; a normalised embedding() without echo is expected")
        if self.judge.query_model is not None:
            raise SmeltError("lex_sem_bridge reads the query itself; leave query_model out of its embedding()")

    def heads(self, config: Any) -> nn.Module:
        return Bridge(config.vocab_size, config.hidden_size)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], model: Any, query: bool = False) -> Tensor:
        trained = self.weights or (model is not None and model.folder and (Path(model.folder) / FILE).is_file())
        if not query or not trained:
            return self.judge.embed(texts, model, query)
        heads, device = read(self, model), model.model.device
        rows = self.judge.rows(texts, model, True)
        found = torch.empty(len(rows), model.model.config.get_text_config().hidden_size)
        special = self._special(model, 1)
        for batch in batches([len(row.ids) for row in rows], at_once(model)):
            ids, mask = (x.to(device) for x in pad([rows[r] for r in batch]))
            found[batch] = self.queries(model.model, heads, ids, mask, special.to(device)).cpu()
        return found

    def _special(self, model: Any, lists: int) -> Tensor:
        return torch.tensor(model.tokenizer.all_special_ids or [-1], dtype=torch.long).expand(lists, -1).contiguous()

    def queries(self, model: Any, heads: Any, ids: Tensor, mask: Tensor, special: Tensor) -> Tensor:
        """[b, t] ids and mask, [.., s] ids without weight -> [b, hidden]. `model` is the transformers model."""
        (states,) = hidden(model, ids, mask, (self.judge.layer,), self.judge.bidirectional)
        plain = normalize(pooled(states, mask, self.judge.pool), dim=-1)
        if self.words == "likely":
            head = model.get_output_embeddings()
            if head is None:
                raise SmeltError(f"lex_sem_bridge: {type(model).__name__} has no language head; use words='tokens' or 'present'")
            place = "last" if model.can_generate() else "first"
            lexical = torch.log1p(head(pooled(states, mask, place).to(states.dtype)).float().relu())
        elif self.words == "tokens":
            lexical = scattered(heads.token(states.float())[..., 0].relu(), ids, mask, heads.gate.in_features)
        else:
            lexical = scattered(heads.present.relu().expand(ids.shape), ids, mask, heads.gate.in_features)
        without = torch.zeros(lexical.shape[1] + 1, dtype=torch.bool, device=ids.device)
        without[special[0]] = True  # -1 is none of them
        return bridged(plain, lexical.masked_fill(without[:-1], 0.0), heads.gate)

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """What embedding() collates, and special [b, s], the ids of special tokens."""
        return self.judge.collate(lists, model, context) | {"special": self._special(model, len(lists))}

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        queries = self.queries(model, heads, batch["query_ids"], batch["query_mask"], batch["special"])
        (passages,) = self.judge.vectors(model, batch["passage_ids"], batch["passage_mask"])
        return in_batch(queries, passages, batch, self.judge.temperature)


class Bridge(nn.Module):
    """W from zero; the scalar of SLR and the map of LLR beside it (of each setting only one is used)."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.gate = nn.Linear(vocabulary, width, bias=False)
        nn.init.zeros_(self.gate.weight)
        self.token = nn.Linear(width, 1)
        self.present = nn.Parameter(torch.ones(()))


def scattered(values: Tensor, ids: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """[b, t] values >= 0 at their tokens, the largest where one comes twice: [b, vocabulary]; 0 elsewhere and for padding."""
    empty = torch.zeros(len(ids), vocabulary, dtype=values.dtype, device=ids.device)
    return empty.scatter_reduce(1, ids, torch.where(mask > 1, values, 0.0), "amax")


def bridged(plain: Tensor, lexical: Tensor, gate: nn.Linear) -> Tensor:
    """norm(softmax(W w) * e), [b, d]. The softmax makes every gate small; only the direction is kept."""
    return normalize(gate(lexical).softmax(-1) * plain, dim=-1)
