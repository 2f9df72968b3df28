"""Each passage judged by itself: by a question about it, by how likely it makes the query, or by a cross-encoder's head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from smelt.rank import Answer, Asked, Scoring
from smelt.rank._order import sort
from smelt.rank._prompt import chat, encode
from smelt.rank._reading import at_once, batches, needs_decoder, room
from smelt.rank._training import Labelled, Learns
from smelt.rank._vectors import Row, around, pad, relevant, shortened
from smelt.spec import Paper, SmeltError

__all__ = ["Pointwise"]

PASSAGE, QUERY = "\ue000", "\ue001"  # where they will stand, in a chat template too
QUESTION = f"Passage: {PASSAGE}\nQuery: {QUERY}\nDoes the passage answer the query?"


@dataclass(frozen=True)
class Pointwise(Scoring, Learns):
    """s(q, d) = mean_i log p(q_i | d, q_<i), or log p(yes | d, q) - log p(no | d, q), or the head's logit for (q, d).

    `read="likelihood"`: nats per token of the query after the passage and `bridge`; any decoder can be asked so.
    `"yes_no"`: logit of `yes` minus that of `no` where the answer to a short question would begin; both have to be one
    token each. A chat template is used when there is one. `"head"`: a sequence-classification checkpoint reads the
    pair; of two labels the score is the second's logit minus the first's. An empty query scores 0 by likelihood.

    The passage is cut so that all of it fits in `length` tokens; the query takes at most half. Scores depend on nothing
    else in the window and compare between windows.

    Trained on lists: `objective="softmax"` is -log sum of the softmax of a list's scores at its relevant passages,
    `"binary"` the mean cross-entropy of sigmoid(s) against relevant or not; relevant is what is graded as high as the
    first. Nats. Scores and grades [b, n] -> [b].

    Cost: one forward over every pair, n (query + passage) tokens; an index is of no use. The vocabulary's logits are
    computed at the query's tokens only (likelihood) or at one (yes_no).

    Raises SmeltError for a model of the wrong kind, for a word that is not one token and for scores that are not finite.

    Differs from the paper (query likelihood): no instruction between passage and query, as small models were not
    taught to follow one. The wording of the question is ours.
    """

    paper: ClassVar = Paper(
        "Improving Passage Retrieval with Zero-Shot Question Generation", "arXiv:2204.07496", "query likelihood; yes_no: arXiv:2003.06713"
    )
    comparable: ClassVar[bool] = True
    together: ClassVar[bool] = False
    read: Literal["likelihood", "yes_no", "head"] = "likelihood"
    objective: Literal["softmax", "binary"] = "softmax"
    length: Annotated[int, Ge(8)] = 512  # tokens of a pair
    bridge: str = "\n"  # between passage and query, of likelihood
    yes: str = " yes"
    no: str = " no"
    labels: Any = None  # judge or strategy that the teacher grades lists with
    weights: Any = None  # not read: there are no parameters beside the model's

    def heads(self, config: Any) -> nn.Module | None:
        return None

    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        return sort(self.scores(asked, model))

    @torch.no_grad()
    def scores(self, asked: Sequence[Asked], model: Any) -> list[Tensor]:
        self._check(model)
        pairs = [(a.query, p) for a in asked for p in a.passages]
        rows, kinds = self.rows(pairs, model, min(self.length, room(model)))
        words = self.words(model.tokenizer)
        found, device = torch.empty(len(rows)), model.model.device
        budget = max(1, min(at_once(model), (1 << 28) // model.model.config.get_text_config().vocab_size))  # for the logits
        for batch in batches([len(row.ids) for row in rows], budget):
            ids, mask = pad([rows[r] for r in batch])
            types = pad([Row(kinds[r], 0, 0) for r in batch])[0]
            given = (x.to(device) for x in (ids, mask, types, words.expand(len(batch), 2)))
            found[batch] = self.marks(model.model, *given).cpu()
        if not torch.isfinite(found).all():
            raise SmeltError("pointwise: the model's scores are not finite")
        return list(found.split([len(a.passages) for a in asked])) if asked else []

    def _check(self, model: Any) -> None:
        if self.read != "head":
            needs_decoder(model, f"pointwise(read='{self.read}')")
        elif model is None or not type(model.model).__name__.endswith("ForSequenceClassification"):
            kind = "none" if model is None else type(model.model).__name__
            raise SmeltError(f"pointwise(read='head') needs a sequence-classification model and was given {kind}; decoders: read='yes_no'")

    def words(self, tokenizer: Any) -> Tensor:
        """[1, 2] ids of yes and no; zeros where they are not read."""
        if self.read != "yes_no":
            return torch.zeros(1, 2, dtype=torch.long)
        found = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in (self.yes, self.no)]
        for word, ids in zip((self.yes, self.no), found, strict=True):
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id or found[0] == found[1]:
                raise SmeltError(
                    f"pointwise: '{word}' is not one token of its own for {type(tokenizer).__name__}; "
                    "name two words that are: pointwise(read='yes_no', yes=' True', no=' False'), or '+' and '-'"
                )
        return torch.tensor(found).view(1, 2)

    def rows(self, pairs: Sequence[tuple[str, str]], model: Any, most: int) -> tuple[list[Row], list[list[int]]]:
        """Ids of each pair (query, passage), at most `most`, with the tokens that are scored; and their segments."""
        tokenizer = model.tokenizer
        if not pairs:
            return [], []
        if self.read == "head":
            asks, found = [q for q, _ in pairs], [p for _, p in pairs]
            made = tokenizer(asks, found, truncation="longest_first", max_length=most, verbose=False)
            kinds = made.get("token_type_ids") or [[0] * len(ids) for ids in made["input_ids"]]
            return [Row(list(ids), 0, len(ids)) for ids in made["input_ids"]], [list(kind) for kind in kinds]

        def plain(texts: Sequence[str]) -> list[list[int]]:
            return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

        if self.read == "likelihood":
            start = around(tokenizer)[0] or [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
            head, between, end = start, plain([self.bridge])[0], []
        else:
            template = chat(tokenizer)
            text = (QUESTION + "\n" if template is None else template(QUESTION)) + "Answer:"
            before, rest = text.split(PASSAGE)
            head = encode(tokenizer, before, template is not None)
            between, end = plain(rest.split(QUERY))
        left = max(2, most - len(head) - len(between) - len(end))
        found_rows = []
        for query, passage in zip(plain([q for q, _ in pairs]), plain([p for _, p in pairs]), strict=True):
            query = query[: left // 2]
            ids = head + passage[: left - len(query)] + between
            ids, first = ids + query + end, len(ids)
            if not ids or len(ids) > room(model):
                raise SmeltError(f"pointwise: a pair needs {len(ids)} tokens and the model reads {room(model)}")
            found_rows.append(Row(ids, first, first + len(query)))
        return found_rows, [[0] * len(row.ids) for row in found_rows]

    def marks(self, model: Any, ids: Tensor, mask: Tensor, types: Tensor, words: Tensor) -> Tensor:
        """[rows] float32 scores; mask 2 are the tokens of the query. `model` is the transformers model."""
        if self.read == "head":
            ids = ids.masked_fill(mask == 0, model.config.pad_token_id or 0)
            more = {"token_type_ids": types} if getattr(model.config, "type_vocab_size", 0) > 1 else {}
            logits = model(input_ids=ids, attention_mask=(mask > 0).long(), **more).logits.float()
            if logits.shape[-1] > 2:
                raise SmeltError(f"pointwise: the model has {logits.shape[-1]} labels; one or two are a score")
            return logits[:, 0] if logits.shape[-1] == 1 else logits[:, 1] - logits[:, 0]
        rows = torch.arange(len(ids), device=ids.device)
        if self.read == "yes_no":
            ends, which = torch.unique((mask > 0).sum(1) - 1, return_inverse=True)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=ends).logits[rows, which].float()
            return logits.gather(1, words[:, :1])[:, 0] - logits.gather(1, words[:, 1:])[:, 0]
        asked = mask[:, 1:] > 1
        places = asked.any(0).nonzero()[:, 0]  # the logits before these tokens are needed, no others
        if not len(places):
            return mask.new_zeros(len(ids), dtype=torch.float32)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits.float()
        said = -cross_entropy(logits.transpose(1, 2), ids[:, 1:][:, places], reduction="none")
        inside = asked[:, places]
        return torch.where(inside, said, 0.0).sum(1) / inside.sum(1).clamp(min=1)

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """ids, mask, types [b n, t], words [b n, 2], keep and grades [b, n]; n is the longest list's."""
        self._check(model)
        n = max(len(one.passages) for one in lists)
        pairs = [(one.query, p) for one in lists for p in [*one.passages, *[""] * (n - len(one.passages))]]
        rows, kinds = self.rows(pairs, model, max(8, min(shortened(self.length, context, n), room(model))))
        ids, mask = pad(rows)
        return {
            "ids": ids,
            "mask": mask,
            "types": pad([Row(kind, 0, 0) for kind in kinds])[0],
            "words": self.words(model.tokenizer).expand(len(rows), 2).contiguous(),
            "keep": torch.tensor([[at < len(one.passages) for at in range(n)] for one in lists]),
            "grades": torch.tensor([[*map(float, one.grades), *[0.0] * (n - len(one.passages))] for one in lists]),
        }

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        scores = self.marks(model, batch["ids"], batch["mask"], batch["types"], batch["words"]).view(batch["keep"].shape)
        good = relevant(batch["grades"], batch["keep"])
        return (binary if self.objective == "binary" else softmax)(scores, good, batch["keep"])


def softmax(scores: Tensor, good: Tensor, keep: Tensor) -> Tensor:
    every = scores.float().masked_fill(~keep, -torch.inf).logsumexp(-1)
    return every - scores.float().masked_fill(~good, -torch.inf).logsumexp(-1)


def binary(scores: Tensor, good: Tensor, keep: Tensor) -> Tensor:
    each = binary_cross_entropy_with_logits(scores.float(), good.float(), reduction="none")
    return (each * keep).sum(-1) / keep.sum(-1)
