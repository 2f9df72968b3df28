"""Reranking in the shape of Jina and Cohere, embeddings in OpenAI's shape.

Requests of one kind that wait together are asked together, so that a judge reads the windows of all of them in one
batch and an embedder all their texts. When such a call fails, each request is asked alone: what is wrong with one is
not told to the others. A call nobody waits for any more ends at the model's next forward.

A judge's own scores are passed on as they are, on the judge's scale. Where there are none (a strategy has only an
order) the place p = 0, 1, ... of n documents has the score (n - p) / n.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from smelt import registry
from smelt._serve_engine import Done, Failed, Job, Refused, Served
from smelt._serve_openai import IGNORED, wait
from smelt.model._load import Loaded
from smelt.rank import Asked, Embedder, Judge, Strategy
from smelt.rank._order import ask, order
from smelt.ranking import LIKELIHOOD, VECTORS, default_method
from smelt.spec import SmeltError

__all__ = ["Question", "Ranked", "Ranking", "ranking", "router"]

log = logging.getLogger("smelt.serve")

DOCUMENTS = 1000  # of one request
INPUTS = 2048  # texts of one request for embeddings, as many as OpenAI takes
TOGETHER = 1 << 16  # tokens of the requests asked about at once; those behind them are answered after

Words = Annotated[str, Field(min_length=1)]
Scored = list[tuple[int, float]]  # documents by their place in the request, best first


@dataclass(frozen=True)
class Ranking:
    """What ranks and embeds. `loaded` belongs to the engine's thread: how a tokenizer cuts is its state, so it holds a copy of it."""

    method: Judge | Strategy
    loaded: Loaded

    def embedder(self) -> Embedder:
        judge = self.method.judge if isinstance(self.method, Strategy) else self.method
        return judge if isinstance(judge, Embedder) else registry.parse(VECTORS, "rank")

    def ranked(self, asked: list[Asked]) -> list[Scored]:
        if isinstance(self.method, Strategy):
            orders = order(self.method, asked, self.loaded)
            return [[(i, (len(o) - place) / len(o)) for place, i in enumerate(o)] for o in orders]
        found: list[Scored] = []
        for answer in ask(self.method, asked, self.loaded):
            n = len(answer.order)
            scores = [(n - place) / n for place in range(n)] if answer.scores is None else answer.scores[answer.order].tolist()
            found.append(list(zip(answer.order, scores, strict=True)))
        return found

    def embedded(self, query: bool, asked: list[list[str]]) -> list[Tensor]:
        vectors = self.embedder().embed([text for texts in asked for text in texts], self.loaded, query)
        if not torch.isfinite(vectors).all():
            raise SmeltError("the embeddings are not finite")
        return list(vectors.float().split([len(texts) for texts in asked]))


@dataclass(frozen=True)
class Ranked(Served):
    ranking: Ranking


def ranking(loaded: Loaded, rank: Any = None) -> Ranking:
    """The method named (recipe text or object), else what suits the model; tried on two words unless it is a decoder's default.

    Raises SmeltError where it is none, or cannot work with this model.
    """
    method = default_method(loaded) if rank is None else registry.parse(rank, "rank") if isinstance(rank, str) else rank
    if not isinstance(method, (Judge, Strategy)):
        raise SmeltError(f"{rank!r} does not rank; write one judge or strategy, such as '{LIKELIHOOD}'")
    found = Ranking(method, loaded._replace(tokenizer=copy.deepcopy(loaded.tokenizer)))
    try:
        if rank is not None or method != registry.parse(LIKELIHOOD, "rank"):  # a decoder that cannot rank may still write
            found.ranked([Asked("a", ["b", "c"])])
    except SmeltError as error:
        if rank is not None or loaded.model.can_generate():
            raise
        kind = type(loaded.model).__name__
        raise SmeltError(f"{kind} has no language head, so it can only rank and embed, and does not: {error}") from error
    return found


class _Nobody(Exception):
    """Nobody waits for any answer of this call."""


class Question(Job):
    """One request. Those with equal `answer` that wait together are asked in one call of it."""

    def __init__(self, answer: Callable[[list[Any]], list[Any]], what: Any, tokens: int, seconds: float):
        super().__init__(seconds, answer)
        self.answer, self.what, self.tokens = answer, what, tokens

    def run(self, model: Any, jobs: Sequence[Job], join: Callable[[int], Sequence[Job]]) -> None:
        for group in _groups([job for job in jobs if isinstance(job, Question)]):
            _ask(model, group)


def _groups(jobs: Sequence[Question]) -> Iterator[list[Question]]:
    """In the order they came, at most TOGETHER tokens, at least one."""
    group: list[Question] = []
    for job in jobs:
        if group and sum(one.tokens for one in group) + job.tokens > TOGETHER:
            yield group
            group = []
        group.append(job)
    yield group


def _ask(model: Any, jobs: Sequence[Question]) -> None:
    """Every job gets its answer, or what was wrong with it alone."""
    jobs = [job for job in jobs if not job.over]
    if not jobs:
        return

    def awaited(*_: Any) -> None:
        if all(job.over for job in jobs):
            raise _Nobody

    watch = model.get_input_embeddings().register_forward_pre_hook(awaited)
    try:
        with torch.no_grad():
            said = jobs[0].answer([job.what for job in jobs])
    except _Nobody:
        return
    except Exception as error:
        if len(jobs) == 1:
            jobs[0].deliver(_failure(error))
            return
        said = None
    finally:
        watch.remove()
    if said is None:
        for job in jobs:
            _ask(model, [job])
        return
    for job, answer in zip(jobs, said, strict=True):
        job.deliver(answer)
        job.deliver(Done("stop", job.tokens, 0))


def _failure(error: Exception) -> Failed:
    """As the engine tells it: messages other than ours may quote the request."""
    if isinstance(error, SmeltError):
        return Failed(400, str(error))
    log.error("%s while one request ran", type(error).__name__)
    return Failed(500, f"internal error: {type(error).__name__}")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}  # known fields that are not supported, and what asks for nothing

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _kept(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {name: value for name, value in data.items() if name not in IGNORED}
        for name, values in cls.neutral.items():
            value = kept.pop(name, None)
            if value is not None and not any(type(value) is type(free) and value == free for free in values):
                raise ValueError(f"'{name}' is not supported" + (f", only {values[0]!r}" if values else ""))
        return kept


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    text: str


class Rerank(_Body):
    neutral = {"rank_fields": (["text"],), "max_chunks_per_doc": (), "truncation": (True,), "priority": (0,)}

    query: Words
    documents: Annotated[list[str | _Document], Field(min_length=1, max_length=DOCUMENTS)]
    top_n: Annotated[int | None, Field(ge=1)] = None
    max_tokens_per_doc: Annotated[int | None, Field(ge=1)] = None
    return_documents: bool | None = None


class Embeddings(_Body):
    input: Words | Annotated[list[Words], Field(min_length=1, max_length=INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, Field(ge=1)] = None
    input_type: Literal["document", "query"] | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _text(cls, given: Any) -> Any:
        if isinstance(given, list) and given and isinstance(given[0], (int, list)):
            raise ValueError("token ids are not supported, they may be another tokenizer's; send text")
        return given


def router(served: Ranked) -> APIRouter:
    routes = APIRouter()
    method, tokenizer, limits = served.ranking.method, served.tokenizer, served.limits
    most = method.limit if isinstance(method, Judge) else None
    embedding = {query: partial(served.ranking.embedded, query) for query in (False, True)}
    reading = threading.Lock()  # a tokenizer serves one thread at a time

    def tokens(texts: list[str], param: str, special: bool = False, **options: Any) -> Any:
        with reading:
            try:
                return tokenizer(texts, add_special_tokens=special, truncation=False, padding=False, verbose=False, **options)
            except (UnicodeError, TypeError) as error:
                raise Refused(400, "the text is not valid Unicode (a lone surrogate)", param=param) from error

    def cut(texts: list[str], keep: int | None) -> tuple[list[str], int]:
        """Each text up to its `keep`-th token, and the tokens of all that is left."""
        if keep is not None and not tokenizer.is_fast:
            message = "this model's tokenizer does not say where its tokens are in a text, so nothing can be cut"
            raise Refused(400, message, param="max_tokens_per_doc")
        read = tokens(texts, "documents", return_offsets_mapping=keep is not None)
        if keep is None:
            return texts, sum(map(len, read["input_ids"]))
        places = read["offset_mapping"]
        left = [text[: ends[keep - 1][1]] if len(ends) > keep else text for text, ends in zip(texts, places, strict=True)]
        return left, sum(min(len(ends), keep) for ends in places)

    def length(texts: list[str]) -> int:
        """Tokens of texts that have to fit in the model's context each."""
        counts = [len(ids) for ids in tokens(texts, "input", special=True)["input_ids"]]
        if max(counts) > served.context:
            text = f"input {counts.index(max(counts))} has {max(counts)} tokens; the model's context is {served.context} tokens"
            raise Refused(400, text, "context_length_exceeded", "input")
        return sum(counts)

    def named(asked: _Body) -> None:
        if asked.model is not None and asked.model != served.name:
            raise Refused(404, f"the model '{asked.model[:80]}' does not exist; there is '{served.name}'", "model_not_found", "model")
        if served.engine.stopping:
            raise Refused(503, "the server is stopping", "stopping")

    async def answered(request: Request, question: Question) -> Any:
        request.scope["smelt"]["prompt"] = question.tokens
        said: list[Any] = []
        served.engine.submit(question)
        try:
            await wait(request, question, said.append)
        finally:
            served.engine.give_up(question)
        return said[0]

    @routes.post("/v1/rerank")
    async def rerank(request: Request, asked: Rerank) -> Any:
        named(asked)
        given = [one if isinstance(one, str) else one.text for one in asked.documents]
        if most is not None and len(given) > most:
            message = f"the judge reads at most {most} documents at once, not {len(given)}; --rank 'sliding_window(judge=...)' takes more"
            raise Refused(400, message, param="documents")
        texts, count = await asyncio.to_thread(cut, given, asked.max_tokens_per_doc)
        count += len((await asyncio.to_thread(tokens, [asked.query], "query"))["input_ids"][0])
        found = await answered(request, Question(served.ranking.ranked, Asked(asked.query, texts), count, limits.seconds))
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": score} for i, score in found[: asked.top_n]]
        if asked.return_documents:
            results = [result | {"document": {"text": given[result["index"]]}} for result in results]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"id": "rerank-" + uuid.uuid4().hex, "model": served.name, "results": results, "usage": usage})

    @routes.post("/v1/embeddings")
    async def embeddings(request: Request, asked: Embeddings) -> Any:
        named(asked)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        count = await asyncio.to_thread(length, texts)
        question = Question(embedding[asked.input_type == "query"], texts, count, limits.seconds)
        vectors = _shortened(await answered(request, question), asked.dimensions)

        def response() -> JSONResponse:
            rows = [_coded(row) for row in vectors] if asked.encoding_format == "base64" else vectors.tolist()
            data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
            usage = {"prompt_tokens": count, "total_tokens": count}
            return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})

        return await asyncio.to_thread(response)  # millions of numbers would hold up every stream

    if not served.engine.model.can_generate():  # this router comes before that of the completions
        kind = type(served.engine.model).__name__

        async def silent() -> Any:
            message = f"{kind} has no language head, so it writes nothing; there is /v1/rerank and /v1/embeddings"
            raise Refused(400, message, "unsupported", "model")

        for path in ("/v1/completions", "/v1/chat/completions"):
            routes.add_api_route(path, silent, methods=["POST"])

    return routes


def _shortened(vectors: Tensor, dimensions: int | None) -> Tensor:
    """[n, width] -> [n, dimensions], of length 1 again where something was left off."""
    width = vectors.shape[1]
    if dimensions is None or dimensions == width:
        return vectors
    if dimensions > width:
        raise Refused(400, f"the embeddings have {width} dimensions, not {dimensions}", param="dimensions")
    return torch.nn.functional.normalize(vectors[:, :dimensions], dim=1)


def _coded(row: Tensor) -> str:
    """Little-endian float32 in base64."""
    return base64.b64encode(row.contiguous().numpy().astype("<f4").tobytes()).decode("ascii")
