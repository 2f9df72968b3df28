"""The whole order from one row of logits: those of the identifiers where the first one would be written."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from smelt.rank import Answer, Asked, Scoring
from smelt.rank._order import sort
from smelt.rank._prompt import BRACKET, SPACE, Style, chat, clean, encode, fit, listwise, named
from smelt.rank._reading import last_logits, needs_decoder, room
from smelt.rank._training import Labelled, Learns, shuffled, weighted_ranknet
from smelt.spec import Paper, SmeltError

__all__ = ["FirstToken"]

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class FirstToken(Scoring, Learns):
    """order = argsort_i of -s_i, s_i = logit of identifier i ("A", "B", ...) at the first generated position.

    One prefill, no token is generated. The prompt lists the passages as `[A] text` (`identifiers="bracket"`) and
    ends with the opening bracket, or as `Passage A: text` and ends before a space that belongs to the letter
    (`identifiers="space"`), for tokenizers that join bracket and letter. A chat template is used when there is one.
    Equal logits keep the order given. Scores are comparable inside one call only. At most 26 passages.

    Learns L = L_LM + `ranknet` L_rank for each list, shown in a shuffled order of its own:
    L_LM      -(1/T) sum_t log p(y_t | prompt, y_<t), y the order by falling grade written out, `B] > [A] > [C]`, equal ones as shown
    L_rank    2 / m(m-1) sum_{g_i > g_j} log(1 + e^(s_j - s_i)) / (r_i + r_j), r the places by grade (`_training.weighted_ranknet`)
    s are the logits that predict y_1, in training the same row as in reading. At equal logits L_rank is 0.07 for 10 passages in order
    and less where grades are equal, hence the 10; `ranknet=0.0` is training on the text alone.

    Cost: FLOPs of one forward over the prompt (about n x `words` x 1.3 tokens), one row of logits. When the prompt
    does not fit in the model's context, the query and every passage are cut to the same smaller number of words.

    Raises SmeltError for an identifier that is not one token of this tokenizer, for a
    model that is not a decoder, for a prompt that does not fit with one word each, and for logits that are not finite.

    Differs from the paper: the full row of logits is read, so no identifier can be missing (the authors read the 30
    largest); the wording of the prompt is ours, and one turn; passages are cut in one step by bisection; pairs of equal grade
    teach nothing (the paper's teachers leave none), and pairs are chosen by grade (the authors' code drops those of equal logits).
    """

    paper: ClassVar = Paper("FIRST: Faster Improved Listwise Reranking with Single Token Decoding", "arXiv:2406.15657", "section 3")
    limit: ClassVar[int | None] = len(LETTERS)
    words: Annotated[int, Ge(1)] = 300  # kept of the query and of each passage
    identifiers: Literal["bracket", "space"] = "bracket"
    ranknet: Annotated[float, Ge(0)] = 10.0  # weight of L_rank in training
    labels: Any = None  # in training: the judge or strategy the teacher grades with; None: the grades of the data
    weights: Any = None  # folder of the trained model; nothing beside the model is trained

    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        return sort(self.scores(asked, model))

    def scores(self, asked: Sequence[Asked], model: Any) -> list[Tensor]:
        """s [n] of each question: the logits of its identifiers, float32 on CPU."""
        needs_decoder(model, "first_token")
        tokens = torch.tensor(self._named(model, max((len(a.passages) for a in asked), default=0)))
        rows = last_logits(model, [self.prompt(a, model, room(model)) for a in asked])
        found = [row[tokens[: len(a.passages)]] for row, a in zip(rows, asked, strict=True)]
        if not all(torch.isfinite(s).all() for s in found):
            raise SmeltError("first_token: the model's logits are not finite")
        return found

    def prompt(self, asked: Asked, model: Any, space: int) -> list[int]:
        """Ids up to where the first identifier is written, at most `space`."""
        n, style, template = len(asked.passages), self._style, chat(model.tokenizer)

        def build(words: int) -> list[int]:
            text = listwise(clean(asked.query, words), [clean(p, words) for p in asked.passages], LETTERS[:n], style, template)
            return encode(model.tokenizer, text, template is not None)

        return fit(build, self.words, space, f"{n} passages and the query")

    def heads(self, config: Any) -> None:
        return None

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """ids [b, t] padded on the right, labels [b, t] (-100 outside the answer); names [b, n], the identifiers' tokens, and grades
        [b, n]; a name is -1 where there is no passage."""
        most = max(len(one.passages) for one in lists)
        if most > len(LETTERS):
            raise SmeltError(f"first_token: letters name at most {len(LETTERS)} passages, and a list has {most}")
        tokens, rows = self._named(model, most), []
        joint, end = ("] > [", "]") if self._style is BRACKET else (" > ", "")
        for one in map(shuffled, lists):
            best, *others = sorted(range(len(one.passages)), key=lambda i: -one.grades[i])
            opened = self._style.ending + self._style.name.format(id=LETTERS[best])
            whole = opened + "".join(joint + LETTERS[i] for i in others) + end
            begun, written = model.tokenizer([opened, whole], add_special_tokens=False, verbose=False)["input_ids"]
            answer = [tokens[best], *written[len(begun) :]]
            prompt = self.prompt(Asked(one.query, one.passages), model, min(context, room(model)) - len(answer))
            rows.append((prompt + answer, [-100] * len(prompt) + answer, tokens[: len(one.passages)], one.grades))
        fillers = {"ids": 0, "labels": -100, "names": -1, "grades": 0.0}
        columns = zip(fillers.items(), zip(*rows, strict=True), strict=True)
        return {name: pad_sequence([torch.tensor(row) for row in column], True, filler) for (name, filler), column in columns}

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        labels, names = batch["labels"], batch["names"]
        starts = (labels != -100).int().argmax(1)  # of the answers; the row of logits before it reads them
        first = int(starts.min())
        logits = model(input_ids=batch["ids"], use_cache=False, logits_to_keep=labels.shape[1] - first + 1).logits[:, :-1].float()
        lost = cross_entropy(logits.transpose(1, 2), labels[:, first:], ignore_index=-100, reduction="none")
        text = lost.sum(1) / (labels != -100).sum(1)
        scores = logits[torch.arange(len(labels), device=labels.device), starts - first].gather(1, names.clamp(min=0))
        return text + self.ranknet * weighted_ranknet(scores, batch["grades"], names >= 0)

    @property
    def _style(self) -> Style:
        return BRACKET if self.identifiers == "bracket" else SPACE

    def _named(self, model: Any, n: int) -> list[int]:
        return named(model.tokenizer, LETTERS[:n], self._style, "first_token")
