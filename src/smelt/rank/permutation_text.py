"""The model writes the whole order out, `[2] > [1] > [3]`, and what it wrote is read as a permutation."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from smelt.rank import Answer, Asked, Judge
from smelt.rank._prompt import WRITTEN, chat, clean, encode, fit, listwise
from smelt.rank._reading import batches, needs_decoder, room
from smelt.rank._repair import count, repair
from smelt.rank._training import Labelled, Learns, shuffled
from smelt.spec import Paper, SmeltError

__all__ = ["PermutationText"]

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class PermutationText(Judge, Learns):
    """order = repair(argmax-decoded y), y_t = argmax p(y_t | prompt, y_<t), T tokens, T = tokens of " [1] > [2] > ... > [n]".

    The prompt has one line `[1] text` per passage, with the query before and after. Exactly T tokens are written, no end of
    text among them. Any text becomes a permutation (`_repair.py`); `with _repair.counting() as counts:` around a run says
    how many answers were ok, wrong_format, repetition or missing. `strict`: an answer that names fewer than half of the
    passages changes nothing. `identifiers="letters"` takes at most 26 passages, numbers as many as fit.

    Learns (`labels`: None or a judge of the teacher) the text of the order by falling grade, equal ones as shown:
    loss = -(1/T) sum_t w_t log p(y_t | prompt, y_<t), w_t = 1; with `importance` w_t = 1 + 1/log2(i + 1) for the tokens of the i-th
    identifier, brackets included, and 1 for separators (arXiv:2412.14574): 1.3 to 2 times plain cross-entropy, so rates
    do not carry over. Each list is shown in a shuffled order of its own, another one each time it comes.

    Cost: a prefill of about n x `words` x 1.3 tokens, then T (4 to 5 n) forwards of one token that wait for each other; that is where
    one row of logits (`first_token`) saves. Prompts are batched, padded on the left; what refuses such a batch (a bound
    cache method) gets one prompt at a time. When the prompt and T do not fit in the context, all texts are cut alike.

    Raises SmeltError for a model that is not a decoder, for a prompt that does not fit with one word each, and in training
    for a tokenizer that cannot say which token is which identifier.

    Differs from the paper: one turn in our words, not a conversation of n turns; the query is cut as the passages are; circled numbers
    are one identifier each; `strict` is ours. The authors train a student with pairwise losses on the teacher's order; the loss on
    its text is that of RankVicuna (arXiv:2309.15088), without noise on the embeddings.
    """

    paper: ClassVar = Paper("Is ChatGPT Good at Search? (RankGPT)", "arXiv:2304.09542", "section 3.2, permutation generation")
    words: Annotated[int, Ge(1)] = 300  # kept of the query and of each passage
    identifiers: Literal["numbers", "letters"] = "numbers"
    strict: bool = False
    importance: bool = False  # weigh the first places of the target more
    labels: Any = None  # in training: the judge or strategy the teacher grades with; None: the grades of the data
    weights: Any = None  # folder of the trained model; nothing beside the model is trained

    @property
    def limit(self) -> int | None:  # type: ignore[override]
        return len(LETTERS) if self.identifiers == "letters" else None

    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        found = []
        for text, one in zip(self.written(asked, model), asked, strict=True):
            order, outcome = repair(text, len(one.passages), self.identifiers == "letters", self.strict)
            count(outcome)
            found.append(Answer(order, None))
        return found

    def written(self, asked: Sequence[Asked], model: Any) -> list[str]:
        """What the model writes to each question, as it is."""
        needs_decoder(model, "permutation_text")
        budgets = [len(self._ids(model.tokenizer, self.target(range(len(a.passages))))) for a in asked]
        rows = [self.prompt(a, model, room(model) - budget) for a, budget in zip(asked, budgets, strict=True)]
        texts = [""] * len(asked)
        for batch in batches([len(row) + budget for row, budget in zip(rows, budgets, strict=True)]):
            some, most = [rows[i] for i in batch], max(budgets[i] for i in batch)
            try:
                made = _generate(model, some, most)
            except SmeltError:  # a bound method that cannot tell padding from text
                if len(batch) == 1:
                    raise
                made = [_generate(model, [row], most)[0] for row in some]
            for i, ids in zip(batch, made, strict=True):
                texts[i] = model.tokenizer.decode(ids[: budgets[i]], skip_special_tokens=True)
        return texts

    def prompt(self, asked: Asked, model: Any, space: int) -> list[int]:
        """Ids up to where the answer begins, at most `space`."""
        n, template = len(asked.passages), chat(model.tokenizer)
        names = [self.name(i) for i in range(n)]

        def build(words: int) -> list[int]:
            text = listwise(clean(asked.query, words), [clean(p, words) for p in asked.passages], names, WRITTEN, template)
            return encode(model.tokenizer, text, template is not None)

        return fit(build, self.words, space, f"{n} passages and the query, beside the answer,")

    def name(self, place: int) -> str:
        return LETTERS[place] if self.identifiers == "letters" else str(place + 1)

    def target(self, order: Sequence[int]) -> str:
        """The ideal answer, with the space it begins with."""
        return " >".join(WRITTEN.name.format(id=self.name(i)) for i in order)

    def _ids(self, tokenizer: Any, target: str) -> list[int]:
        """Tokens of an answer where it stands, after the prompt's ending."""
        before, whole = tokenizer([WRITTEN.ending, WRITTEN.ending + target], add_special_tokens=False, verbose=False)["input_ids"]
        return whole[len(before) :]

    def _places(self, tokenizer: Any, target: str) -> list[int]:
        """Of each token of an answer the place 1..n of the identifier it belongs to, 0 for a separator."""
        if not tokenizer.is_fast:
            raise SmeltError(
                f"permutation_text: {type(tokenizer).__name__} does not say where its tokens stand; training needs a fast tokenizer"
            )
        place_of, place = [0] * len(WRITTEN.ending), 0
        for c in target:
            place += c == "["
            place_of.append(0 if c in " >" else place)
        spans = tokenizer(WRITTEN.ending + target, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        before = len(spans) - len(self._ids(tokenizer, target))
        if any(end > len(WRITTEN.ending) for _, end in spans[:before]):
            raise SmeltError(
                f"permutation_text: {type(tokenizer).__name__} joins '{WRITTEN.ending}' and the identifier after it in one token"
            )
        return [max(place_of[start:end], default=0) for start, end in spans[before:]]

    def heads(self, config: Any) -> None:
        return None

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """ids [b, t] padded on the right, labels [b, t] (-100 outside the target), place [b, t] (0: no identifier's token)."""
        rows = []
        for one in map(shuffled, lists):
            n = len(one.passages)
            if self.limit is not None and n > self.limit:
                raise SmeltError(
                    f"permutation_text: letters name at most {self.limit} passages, and a list has {n}; use identifiers='numbers'"
                )
            target = self.target(sorted(range(n), key=lambda i: -one.grades[i]))
            answer, place = self._ids(model.tokenizer, target), self._places(model.tokenizer, target)
            prompt = self.prompt(Asked(one.query, one.passages), model, min(context, room(model)) - len(answer))
            rows.append((prompt + answer, [-100] * len(prompt) + answer, [0] * len(prompt) + place))
        width = max(len(ids) for ids, _, _ in rows)
        ids, labels, places = (
            torch.tensor([row[which] + [filler] * (width - len(row[which])) for row in rows]) for which, filler in enumerate((0, -100, 0))
        )
        return {"ids": ids, "labels": labels, "place": places}

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        labels, place = batch["labels"], batch["place"]
        first = int((labels != -100).any(0).nonzero()[0])  # rows of logits are needed from the one before it on
        logits = model(input_ids=batch["ids"], use_cache=False, logits_to_keep=labels.shape[1] - first + 1).logits
        return listwise_loss(logits[:, :-1], labels[:, first:], place[:, first:], self.importance)


def listwise_loss(logits: Tensor, labels: Tensor, place: Tensor, importance: bool) -> Tensor:
    """logits [b, t, V] that predict labels [b, t] (-100: none), place [b, t] of its identifier or 0 -> [b] float32, means over T."""
    lost = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    weight = 1 + (place > 0) / torch.log2(place.clamp(min=1) + 1.0) if importance else torch.ones_like(lost)
    return (weight * lost).sum(1) / (labels != -100).sum(1)


@torch.no_grad()
def _generate(model: Any, rows: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """`new` tokens after each row, greedily, with whatever cache and decoding method is bound to the model."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, width - len(row) :], mask[at, width - len(row) :] = torch.tensor(row), 1
    pad = model.tokenizer.pad_token_id
    how = {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "pad_token_id": 0 if pad is None else pad,
    }  # over the model's own habits
    device = model.model.device
    made = model.model.generate(ids.to(device), attention_mask=mask.to(device), max_new_tokens=new, min_new_tokens=new, **how)
    return made[:, width:].tolist()
