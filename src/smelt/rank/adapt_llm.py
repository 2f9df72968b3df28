"""Searching only for what the model does not know: it says itself when it wants text, and is trained on what it got wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from smelt.rank import Answer, Asked, Retriever
from smelt.rank._order import sort
from smelt.rank._prompt import chat, encode, fit
from smelt.rank._reading import at_once, batches, needs_decoder, room
from smelt.rank._vectors import Row, pad
from smelt.rank.bm25 import BM25
from smelt.rank.pointwise import Pointwise
from smelt.spec import Paper, SmeltError

__all__ = ["AdaptLLM"]


class Question(NamedTuple):
    query: str
    answers: list[str]  # each of them is right
    passage: str  # from which it can be answered


class Reply(NamedTuple):
    text: str
    place: int | None  # of the passage that was read, None where the model answered alone


@dataclass(frozen=True)
class AdaptLLM(Retriever):
    """search(q) = that of `retriever` if p(mark | q) > threshold, else nothing: the model needs no text to answer q.

    p(mark | q) is the probability of all tokens of `mark` where the answer to q would begin. `reply` is the two-step
    inference: the answer alone, or, where the mark is wanted, a second prompt with the first passage found. As a judge
    of passages that are already there it has nothing to decide and gives the order of `retriever`, which reads the same model.

    `rows` is the data recipe, no new loss: a question that the untrained model answers right gives (question, answer);
    one that it gets wrong gives (question, mark) and (question with its passage, answer). Right is an answer that contains
    one of the known ones, in lower case. They are rows to fine-tune on (`prompt` and `response`), before which
    the mark means nothing to a model: then p is about 0, `search` finds nothing and `reply` answers alone.

    Cost: one forward over the query for the mark; `reply` writes up to `tokens` tokens from one prompt. threshold=0 always
    retrieves, 1 never does. Scores are the retriever's, and are not said to compare.

    Raises SmeltError for a model that is no decoder, a retriever that is none, an empty mark, prompts that do not fit
    and probabilities that are not finite.

    Differs from the paper: the released code compares the first token of the mark; here a mark may be several tokens, all
    of them count, so no tokenizer has to be changed. The prompts' wording is ours, and so is the threshold: for a mark of one
    token 0.5 is reached only where greedy decoding writes it.
    """

    paper: ClassVar = Paper(
        "When to Retrieve: Teaching LLMs to Utilize Information Retrieval Effectively", "arXiv:2404.19705", "training data and inference"
    )
    retriever: Any = field(default_factory=BM25)
    mark: str = "<RET>"
    threshold: Annotated[float, Interval(ge=0, le=1)] = 0.5
    tokens: Annotated[int, Ge(1)] = 32  # of an answer, at most
    words: Annotated[int, Ge(1)] = 300  # kept of the query and of a passage in a prompt

    def __post_init__(self) -> None:
        if not isinstance(self.retriever, Retriever):
            raise SmeltError(f"adapt_llm: retriever={self.retriever!r} searches nothing; one is bm25(), another embedding()")
        if not self.mark.strip():
            raise SmeltError("adapt_llm: mark is empty; give a word that no answer begins with, such as '<RET>'")

    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        return sort(self.scores(asked, model))

    def scores(self, asked: Sequence[Asked], model: Any) -> list[Tensor]:
        return self.retriever.scores(asked, model)

    def index(self, passages: Sequence[str], model: Any) -> Any:
        return self.retriever.index(passages, model)

    def search(self, index: Any, queries: Sequence[str], k: int, model: Any) -> list[list[tuple[int, float]]]:
        wanted = [i for i, p in enumerate(self.wants(queries, model).tolist()) if p > self.threshold]
        found: list[list[tuple[int, float]]] = [[] for _ in queries]
        if wanted:
            for i, best in zip(wanted, self.retriever.search(index, [queries[i] for i in wanted], k, model), strict=True):
                found[i] = best
        return found

    @torch.no_grad()
    def wants(self, queries: Sequence[str], model: Any) -> Tensor:
        """p(mark | q) of each, [n] float64 on CPU."""
        needs_decoder(model, "adapt_llm")
        said = list(model.tokenizer(" " + self.mark, add_special_tokens=False, verbose=False)["input_ids"])
        prompts = [self._fitted(query, None, model, len(said)) for query in queries]
        rows, found, device = [Row(p + said, len(p), len(p) + len(said)) for p in prompts], torch.zeros(len(prompts)), model.model.device
        for batch in batches([len(row.ids) for row in rows], at_once(model)):
            ids, mask = (x.to(device) for x in pad([rows[r] for r in batch]))
            found[batch] = len(said) * Pointwise().marks(model.model, ids, mask, ids, ids).cpu()
        if not torch.isfinite(found).all():
            raise SmeltError("adapt_llm: the model's probabilities are not finite")
        return found.double().exp()

    def reply(self, queries: Sequence[str], passages: Sequence[str], model: Any, index: Any = None) -> list[Reply]:
        """Each query answered, alone or with the first passage that its search finds. `index`: that of `passages`, when there is one."""
        index = self.index(passages, model) if index is None else index
        places = [best[0][0] if best else None for best in self.search(index, queries, 1, model)]
        read = [None if place is None else passages[place] for place in places]
        return [Reply(text, place) for text, place in zip(self.written(queries, read, model), places, strict=True)]

    @torch.no_grad()
    def written(self, queries: Sequence[str], passages: Sequence[str | None], model: Any) -> list[str]:
        """The greedy answer to each query, read after its passage where there is one; no mark is looked for."""
        needs_decoder(model, "adapt_llm")
        prompts = [self._fitted(q, p, model, self.tokens) for q, p in zip(queries, passages, strict=True)]
        found, ends = [""] * len(prompts), model.tokenizer.pad_token_id
        for batch in batches([len(p) + self.tokens for p in prompts]):
            width = max(len(prompts[r]) for r in batch)  # padding on the left, so that answers begin at one place
            ids = torch.tensor([[0] * (width - len(prompts[r])) + prompts[r] for r in batch], device=model.model.device)
            mask = torch.tensor([[0] * (width - len(prompts[r])) + [1] * len(prompts[r]) for r in batch], device=model.model.device)
            options = {
                "max_new_tokens": self.tokens,
                "do_sample": False,
                "pad_token_id": model.tokenizer.eos_token_id if ends is None else ends,
            }
            out = model.model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:]
            for r, text in zip(batch, model.tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
                found[r] = text.strip()
        return found

    def rows(self, questions: Sequence[Question], said: Sequence[str]) -> list[dict[str, str]]:
        """What to fine-tune on; `said` is what the untrained model answered (`written` without passages)."""
        found = []
        for question, answer in zip(questions, said, strict=True):
            alone, gold = self.prompt(question.query, None), " " + question.answers[0]
            if any(known.lower() in answer.lower() for known in question.answers):
                found.append({"prompt": alone, "response": gold})
            else:
                found.append({"prompt": alone, "response": " " + self.mark})
                found.append({"prompt": self.prompt(question.query, question.passage), "response": gold})
        return found

    def prompt(self, query: str, passage: str | None) -> str:
        before = "" if passage is None else f"Text: {passage}\n"
        return f"{before}Question: {query}\nAnswer:"

    def _fitted(self, query: str, passage: str | None, model: Any, more: int) -> list[int]:
        """Ids of the prompt, its texts cut to as many words as leave room for `more` tokens."""
        template = chat(model.tokenizer)

        def build(words: int) -> list[int]:
            cut = [None if text is None else " ".join(text.split()[:words]) for text in (query, passage)]
            request, ending = self.prompt(cut[0] or "", cut[1]).rsplit("\n", 1)
            text = f"{request}\n{ending}" if template is None else template(request) + ending
            return encode(model.tokenizer, text, template is not None)

        return fit(build, self.words, room(model) - more, "a question and its passage")
