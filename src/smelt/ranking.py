"""The verb `rank`: a few passages in Python, files of queries and passages on the command line, and what an order is worth.

    smelt.rank("embedded", "add two numbers", passages)                     [Ranked(place, score, text), ...], best first
    ranking.rank_files("q.tsv", "docs.jsonl", "out.trec", model="embedded", method="first_token()")     as `smelt rank`

A retriever searches the corpus, or a run gives the candidates; a method reorders them. Every answer is in a journal
beside the run file before the next question, so a run that was killed asks nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from ir_measures import RR, Qrel, R, ScoredDoc, iter_calc, nDCG
from rich.console import Group
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from smelt import registry
from smelt._ranking_files import read_corpus, read_qrels, read_queries, read_run, write_jsonl, write_run
from smelt.journal import Journal
from smelt.model._files import identity
from smelt.model._load import Loaded, load, locate, vocabulary
from smelt.progress import track
from smelt.rank import Asked, Judge, Retriever, Strategy
from smelt.rank._order import ask, order
from smelt.rank._repair import counting
from smelt.rank._training import FILE
from smelt.spec import SmeltError

__all__ = ["Compared", "Outcome", "Ranked", "default_method", "evaluate", "rank", "rank_files", "rank_queries", "table"]

ORACLE, CHANCE = "oracle", "random order"  # of the first stage's candidates
LIKELIHOOD, VECTORS = "pointwise()", "embedding()"  # what a decoder, and an encoder, is asked with when nothing is said
MEASURES = ("nDCG@10", "RR@10", "Recall@100")
SEARCHED = 64  # queries of one call of a retriever
Ordered = list[tuple[int, float | None]]  # (place in what was given, the judge's score), best first
Run = dict[str, list[tuple[str, float | None]]]  # {query: (passage, score), best first}
Chosen = Judge | Strategy


class Ranked(NamedTuple):
    place: int  # in the list that was given
    score: float | None  # of a judge that scores; strategies only order
    text: str


class Compared(NamedTuple):
    """One measure of one order, and its mean paired difference to the first stage with a 95 % interval. p: two-sided."""

    system: str
    measure: str
    value: float
    values: tuple[float, ...]  # of each judged query
    difference: float
    low: float
    high: float
    p: float


class Outcome(NamedTuple):
    file: Path
    method: str
    queries: int
    empty: int  # queries without candidates
    passages: int  # candidates of all queries
    asked: int  # different questions put to the method now; the others were in the journal
    calls: int  # of the judge, for all queries
    chain: int  # calls that had to wait for each other, of the query with most
    seconds: float
    compared: list[Compared]
    written: dict[str, int]  # how the answers came out of a judge that writes them, asked now: ok, wrong_format, repetition, missing


# Python


def rank(model: Any, query: str, passages: Sequence[str], method: Any = None) -> list[Ranked]:
    """The passages, best first. `model`: Loaded (as `smelt.load` returns it), a name for it, or None for methods that need none.

    `method`: a method of the rank family or its text; left out, what the model was trained for, `embedding()` for an
    encoder, `pointwise()` for a decoder, `pointwise(read='head')` for a cross-encoder.
    """
    return rank_queries(model, [(query, passages)], method)[0]


def rank_queries(
    model: Any,
    asked: Sequence[tuple[str, Sequence[str]]],
    method: Any = None,
    *,
    batch: int = 8,
    journal: str | Path | None = None,
) -> list[list[Ranked]]:
    """`rank` of many (query, passages), `batch` at once. With `journal`, a file, nothing is asked that it answers; it is kept."""
    questions = [_question(query, passages) for query, passages in asked]
    if batch < 1:
        raise SmeltError(f"rank: batch={batch} should be at least 1")
    loaded = _loaded(model)
    chosen = _method(method) if method is not None else default_method(loaded)
    kept, keys = None, [str(i) for i in range(len(questions))]
    if journal is not None:
        kept, about = Journal(Path(journal)), _about(_weights(loaded), chosen)
        keys = [_digest(about, q.query, *q.passages) for q in questions]
    found, _ = _answers(lambda todo: _ordered(chosen, [questions[i] for i in todo], loaded), keys, batch, kept, "rank")
    return [[Ranked(i, score, q.passages[i]) for i, score in one] for one, q in zip(found, questions, strict=True)]


def default_method(model: Loaded | None) -> Chosen:
    """What a model is asked with when nothing is said: the judge it was trained as, else one that suits its architecture.

    A trained judge that reads few passages at once is put into a sliding window. A decoder that nobody taught to rank is asked
    how likely a passage makes the query: listwise prompts get no more than a random order out of a small one.
    """
    if model is None:
        raise SmeltError("rank: without a model a method must be named; bm25() needs no model")
    file = Path(model.folder) / FILE if model.folder is not None else None
    if file is None or not (file.is_file() and file.with_name("config.json").is_file()):
        if type(model.model).__name__.endswith("ForSequenceClassification"):
            return _method("pointwise(read='head')")
        return _method(LIKELIHOOD if model.model.can_generate() else VECTORS)
    try:
        with safe_open(file, "pt") as opened:
            text = json.loads((opened.metadata() or {})["smelt"])["text"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SmeltError(f"it does not say which judge it is of; name the method ({type(error).__name__})", file=str(file)) from error
    chosen = _method(text)
    if isinstance(chosen, Judge) and chosen.limit is not None:
        window = min(20, chosen.limit)
        chosen = _method(f"sliding_window(judge={text}, window={window}, step={max(1, window // 2)})")
    return chosen


# Files


def rank_files(
    queries: str | Path,
    corpus: str | Path,
    out: str | Path,
    *,
    model: Any = None,
    method: Any = None,
    first: Any = None,
    candidates: str | Path | None = None,
    qrels: str | Path | None = None,
    top: int = 100,
    batch: int = 8,
    relevant: int = 1,
    tag: str | None = None,
    fresh: bool = False,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Outcome:
    """Writes the run `out`: JSON lines where its name ends in .jsonl, else TREC's format.

    The `top` candidates of a query come from the run `candidates` or from the retriever `first` (bm25()); a `method`
    that is a retriever itself searches the corpus when neither is said. The journal lies beside `out` until that is
    whole; `fresh` forgets it. Raises SmeltError for what is wrong in a file or an option, before a model is read.
    """
    began = time.monotonic()
    out = Path(out)
    _options(out, [queries, corpus, candidates, qrels], first, candidates, top, batch, relevant, tag)
    if method is None and model is None:
        raise SmeltError("rank: name a model or a method; bm25() needs no model")
    trust: dict[str, Any] = {"trust_pickle": trust_pickle, "trust_remote_code": trust_remote_code}
    chosen = _method(method) if method is not None else None
    folder = locate(str(model), **trust) if isinstance(model, str | Path) else None
    searcher = _method(first) if first is not None else None
    if searcher is not None and not isinstance(searcher, Retriever):
        raise SmeltError(f"rank: {registry.text(searcher)} does not search a corpus; a first stage is a retriever such as bm25()")
    asked, passages = read_queries(Path(queries)), read_corpus(Path(corpus))
    given = read_run(Path(candidates), passages) if candidates is not None else None
    judged = read_qrels(Path(qrels), asked) if qrels is not None else None
    if given is not None and not given.keys() & asked.keys():
        raise SmeltError(f"none of its queries is in {queries}", file=str(candidates))
    loaded = load(str(model), **trust) if folder is not None else _loaded(model)
    chosen = chosen if chosen is not None else default_method(loaded)
    direct = isinstance(chosen, Retriever) and given is None and searcher is None
    if given is None and searcher is None:
        searcher = chosen if direct else _method("bm25()")
    for one in (searcher, chosen):  # what this model cannot do shows before a corpus is searched, and nothing is left behind
        if one is not None:
            (one.judge if isinstance(one, Strategy) else one).answers([], loaded)
    who = identity(folder) if folder is not None else _weights(loaded)
    written: dict[str, int] = {}
    with _alone(out):
        file = _journal(out)
        if fresh:
            file.unlink(missing_ok=True)
        journal = Journal(file)
        if given is not None:
            start: Run = {q: [(name, None) for name in given.get(q, [])[:top]] for q in asked}
            done = 0
        else:
            start, done = _searched(searcher, asked, passages, top, loaded, who, journal)
        orders = start
        if not direct:
            with counting() as written:
                orders, done = _reordered(chosen, asked, passages, start, loaded, who, batch, journal)
        name = registry.name_of(chosen)[1] if tag is None else tag
        if out.suffix == ".jsonl":
            write_jsonl(out, orders, name)
        else:
            write_run(out, {q: [n for n, _ in found] for q, found in orders.items()}, name)
        file.unlink()
    counts = [len(found) for found in orders.values()]
    text = registry.text(chosen)
    compared = []
    if judged is not None:
        method_name = registry.name_of(chosen)[1]
        first_stage = method_name if direct else "first stage"
        runs = {first_stage: start} | {method_name: orders}
        names = {system: {q: [n for n, _ in found] for q, found in run.items()} for system, run in runs.items()}
        compared = evaluate(judged, names, first_stage, relevant=relevant)
    strategy = chosen if isinstance(chosen, Strategy) else None
    calls = sum(strategy.calls(n) for n in counts) if strategy else sum(n > 0 for n in counts)
    chain = max(strategy.chain(n) for n in counts) if strategy else int(any(counts))
    return Outcome(
        out, text, len(asked), counts.count(0), sum(counts), done, calls, chain, time.monotonic() - began, compared, dict(written)
    )


def table(outcome: Outcome) -> Any:
    """A rich renderable of what was asked, and of what the orders are worth where judgements were given."""
    parts: list[Any] = []
    if outcome.compared:
        out = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        out.add_column("measure", no_wrap=True)
        out.add_column("order", overflow="fold")
        for title in ("value", "to first stage", "95 % interval", "p"):
            out.add_column(title, justify="right", no_wrap=True)
        last = ""
        base = outcome.compared[0].system
        for row in outcome.compared:
            beside = [f"{row.difference:+.4f}", f"[{row.low:+.4f}, {row.high:+.4f}]", f"{row.p:.4f}"] if row.system != base else [""] * 3
            out.add_row(row.measure if row.measure != last else "", Text(row.system), f"{row.value:.4f}", *beside)
            last = row.measure
        parts += [out, Text(f"{len(outcome.compared[0].values)} judged queries; paired bootstrap and sign flips over queries")]
    kept = f" ({outcome.asked} asked now, the rest known)" if outcome.asked < outcome.queries else ""
    kept += f", {outcome.empty} without candidates" if outcome.empty else ""
    parts.append(
        Text(
            f"{outcome.method}: {outcome.queries} queries{kept}, {outcome.passages} passages, {outcome.calls} judge calls, "
            f"longest chain {outcome.chain}, {outcome.seconds:.1f} s"
        )
    )
    if outcome.written:
        said = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(outcome.written.items()))
        parts.append(
            Text(f"Answers as they were written: {said}; what is not ok was repaired, and ranks like the first stage where much is")
        )
    return Group(*parts, Text(f"Run: {outcome.file}", overflow="fold"))


# What an order is worth


def evaluate(
    qrels: Mapping[str, Mapping[str, int]],
    runs: Mapping[str, Mapping[str, Sequence[str]]],
    first: str,
    *,
    relevant: int = 1,
    draws: int = 10_000,
    seed: int = 0,
) -> list[Compared]:
    """nDCG@10, RR@10, Recall@100 of each run {query: passages, best first}, of the oracle and of a random order, beside run `first`.

    Means over all judged queries; one that a run lacks counts 0. Gain = grade, 0 where it is negative or there is no
    judgement; the ideal DCG is over all judged passages. `relevant`: lowest grade that RR and Recall call relevant (2 for
    TREC DL). oracle: the candidates of `first` by grade; random order: the exact expectation over all orders of them.
    Differences to `first` are paired by query: percentile interval of `draws` bootstraps over queries; p of `draws` sign
    flips (Fisher's randomisation, two-sided, the observed one counted), Holm-corrected over the runs beside `first`.
    Pure: the same arguments, the same figures.
    """
    if not qrels:
        raise SmeltError("rank: there is no judgement to measure by")
    if first not in runs:
        raise SmeltError(f"rank: there is no run '{first}' to compare with")
    held = {q: runs[first].get(q, ()) for q in qrels}
    best = {q: sorted(found, key=lambda name: -grades[name]) for q, found in held.items() for grades in [_grades(qrels[q], found)]}
    chance = [_by_chance(list(_grades(qrels[q], found).values()), qrels[q], relevant) for q, found in held.items()]
    others = [(name, _measured(qrels, run, relevant)) for name, run in runs.items() if name != first]
    systems = [(first, _measured(qrels, held, relevant)), *others, (ORACLE, _measured(qrels, best, relevant)), (CHANCE, np.array(chance))]
    differences = np.stack([values - systems[0][1] for _, values in systems], 1)  # [queries, systems, measures]
    low, high, p = _resampled(differences, draws, seed)
    for column in p[1 : 1 + len(others)].T:
        column[:] = _holm(column)
    return [
        Compared(
            name,
            measure,
            float(values[:, m].mean()),
            tuple(values[:, m].tolist()),
            float(differences[:, s, m].mean()),
            float(low[s, m]),
            float(high[s, m]),
            float(p[s, m]),
        )
        for m, measure in enumerate(MEASURES)
        for s, (name, values) in enumerate(systems)
    ]


def _measured(qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Sequence[str]], relevant: int) -> np.ndarray:
    """[judged queries, measures]"""
    measures = [nDCG @ 10, RR(rel=relevant) @ 10, R(rel=relevant) @ 100]
    judged = [Qrel(q, name, grade) for q, grades in qrels.items() for name, grade in grades.items()]
    scored = [ScoredDoc(q, n, float(len(found) - at)) for q, found in run.items() for at, n in enumerate(found)]
    values = {(m.query_id, m.measure): m.value for m in iter_calc(measures, judged, scored)}
    return np.array([[values.get((q, m), 0.0) for m in measures] for q in qrels], np.float64)


def _grades(judged: Mapping[str, int], found: Sequence[str]) -> dict[str, int]:
    return {name: judged.get(name, 0) for name in found}


def _by_chance(grades: Sequence[int], judged: Mapping[str, int], relevant: int) -> list[float]:
    """The measures, expected over all orders of candidates with these grades."""
    n, hits = len(grades), sum(g >= relevant for g in grades)
    discount = [1 / math.log2(place + 2) for place in range(10)]
    ideal = sum(d * max(g, 0) for d, g in zip(discount, sorted(judged.values(), reverse=True)))
    gain = sum(max(g, 0) for g in grades) / n * sum(discount[:n]) if n else 0.0
    reciprocal, none = 0.0, 1.0  # none: nothing relevant so far
    for place in range(min(n, 10)):
        reciprocal += none * hits / (n - place) / (place + 1)
        none *= 1 - hits / (n - place)
        if none <= 0:
            break
    everything = sum(g >= relevant for g in judged.values())
    return [gain / ideal if ideal else 0.0, reciprocal, hits * min(1.0, 100 / n) / everything if hits else 0.0]


def _resampled(differences: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(low, high, p) of the mean over the first dimension. Memory: about 64 MB, whatever the number of queries."""
    n, shape = len(differences), differences.shape[1:]
    flat, random = differences.reshape(n, -1), np.random.default_rng(seed)
    seen, means, extreme = np.abs(flat.mean(0)), [], np.zeros(flat.shape[1])
    step = max(1, (1 << 22) // n)
    for at in range(0, draws, step):
        count = min(step, draws - at)
        means.append(random.multinomial(n, np.full(n, 1 / n), size=count) @ flat / n)
        signs = 2.0 * random.integers(0, 2, (count, n)) - 1.0
        extreme += (np.abs(signs @ flat / n) >= seen - 1e-12).sum(0)
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
    return low.reshape(shape), high.reshape(shape), ((1 + extreme) / (1 + draws)).reshape(shape)


def _holm(p: np.ndarray) -> np.ndarray:
    """Adjusted values of a family of tests: the k-th smallest of m times m - k + 1, never below the one before."""
    by = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(p[by] * np.arange(len(p), 0, -1)))
    out = np.empty_like(p)
    out[by] = adjusted
    return out


# Asking


def _searched(
    method: Any, asked: dict[str, str], passages: dict[str, str], top: int, model: Any, who: str, journal: Journal
) -> tuple[Run, int]:
    names, queries = list(passages), list(asked.values())
    everything = hashlib.sha256()
    for name, text in passages.items():
        everything.update(f"{len(name)} {len(text)} {name}{text}".encode())
    about = _about(who, method)
    keys = [_digest("search", about, everything.hexdigest(), top, query) for query in queries]
    index: list[Any] = []

    def search(todo: list[int]) -> list[Ordered]:
        if not index:  # the whole corpus is read once, and only when something is left to ask
            index.append(method.index(list(passages.values()), model))
        found = method.search(index[0], [queries[i] for i in todo], top, model)
        places = [[place for place, _ in one] for one in found]
        if len(found) != len(todo) or any(len(set(p)) != len(p) or len(p) > top or not set(p) <= set(range(len(names))) for p in places):
            raise SmeltError(f"{type(method).__name__} did not find {top} passages or fewer for each query, none of them twice")
        return [[(int(place), float(score)) for place, score in one] for one in found]

    found, done = _answers(search, keys, SEARCHED, journal, "search")
    return {q: [(names[i], score) for i, score in one] for q, one in zip(asked, found, strict=True)}, done


def _reordered(
    method: Chosen,
    asked: dict[str, str],
    passages: dict[str, str],
    start: Run,
    model: Any,
    who: str,
    batch: int,
    journal: Journal,
) -> tuple[Run, int]:
    names = [[name for name, _ in start[q]] for q in asked]
    questions = [Asked(query, [passages[n] for n in some]) for query, some in zip(asked.values(), names, strict=True)]
    about = _about(who, method)
    keys = [_digest("order", about, q.query, *some, *q.passages) for q, some in zip(questions, names, strict=True)]
    found, done = _answers(lambda todo: _ordered(method, [questions[i] for i in todo], model), keys, batch, journal, "rank")
    return {q: [(some[i], score) for i, score in one] for q, some, one in zip(asked, names, found, strict=True)}, done


def _answers(
    work: Callable[[list[int]], list[Ordered]], keys: list[str], batch: int, journal: Journal | None, label: str
) -> tuple[list[Ordered], int]:
    """Of every key its answer, and how many were asked for now. Equal keys are one question."""
    held: dict[str, Any] = {key: journal[key] for key in keys if key in journal} if journal is not None else {}
    todo = list({key: i for i, key in reversed(list(enumerate(keys))) if key not in held}.values())[::-1]
    with track(label, len(held) + len(todo), "queries", len(held)) as bar:
        for at in range(0, len(todo), batch):
            now = todo[at : at + batch]
            for i, one in zip(now, work(now), strict=True):
                if journal is not None:
                    journal.put(keys[i], one)
                held[keys[i]] = one
            bar.advance(len(now))
    return [[(place, score) for place, score in held[key]] for key in keys], len(todo)


def _ordered(method: Chosen, asked: list[Asked], model: Any) -> list[Ordered]:
    if isinstance(method, Strategy):
        return [[(i, None) for i in one] for one in order(method, asked, model)]
    said = iter(ask(method, [a for a in asked if a.passages], model))
    answers = [next(said) if a.passages else None for a in asked]
    return [[(i, None if a.scores is None else float(a.scores[i])) for i in a.order] if a is not None else [] for a in answers]


# What was said


def _method(said: Any) -> Chosen:
    found = registry.parse(said, "rank") if isinstance(said, str) else said
    if isinstance(found, list | tuple):
        raise SmeltError(f"rank: one method orders, '{said}' are {len(found)}")
    if not isinstance(found, Judge | Strategy):
        raise SmeltError(f"rank: {found!r} is not a method of rank; one is sliding_window(judge=first_token())")
    registry.check(found)
    return found


def _loaded(model: Any) -> Loaded | None:
    if model is None or isinstance(model, Loaded):
        return model
    if isinstance(model, str | Path):
        return load(str(model))
    raise SmeltError(f"rank: a model is a name, a folder or what smelt.load returns, and not a {type(model).__name__}")


def _question(query: Any, passages: Any) -> Asked:
    if not isinstance(query, str):
        raise SmeltError(f"rank: the query is a {type(query).__name__} and not a text")
    texts = [passages] if isinstance(passages, str) else list(passages)
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if isinstance(passages, str) or wrong is not None:
        kind = "one text" if wrong is None else f"not texts, passage {wrong} is a {type(texts[wrong]).__name__}"
        raise SmeltError(f"rank: the passages are {kind}; they should be a list of texts")
    return Asked(query, texts)


def _options(out: Path, inputs: list[Any], first: Any, candidates: Any, top: int, batch: int, relevant: int, tag: str | None) -> None:
    if first is not None and candidates is not None:
        raise SmeltError("rank: the candidates come from --first or from --candidates, not from both")
    for name, value in (("top", top), ("batch", batch), ("relevant", relevant)):
        if value < 1:
            raise SmeltError(f"rank: {name}={value} should be at least 1")
    if tag is not None and (len(tag.split()) != 1 or tag != tag.strip()):
        raise SmeltError(f"rank: the tag '{tag}' must be one word, as a TREC run is split at blanks")
    if out.is_dir():
        raise SmeltError("the run would be written here, and this is a folder; name a file such as out.trec", file=str(out))
    if any(place is not None and Path(place).resolve() == out.resolve() for place in inputs):
        raise SmeltError("the run would be written over a file that is read; name another one", file=str(out))


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process writes a journal: a second one would damage it."""
    place = out.with_name(f".{out.name}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place)
        lock.acquire(timeout=0)
    except Timeout:
        raise SmeltError("another process is writing this run", file=str(out)) from None
    except OSError as error:
        raise SmeltError(f"cannot be written: {error.strerror}", file=str(out)) from error
    try:
        yield
    finally:
        with suppress(OSError):
            if not (journal := _journal(out)).stat().st_size:  # nothing was answered
                journal.unlink()
        with suppress(OSError):  # an open file cannot be removed everywhere
            place.unlink()
        lock.release()


def _journal(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).hexdigest()


def _about(who: str, method: Any) -> str:
    """All that an answer follows from beside the question: the model, the method, its source, and folders that it names."""
    values = [getattr(part, field.name) for part in registry.held(method) for field in fields(part)]  # type: ignore[arg-type]
    words = [Path(v) for v in values if isinstance(v, str) and v and len(v) < 1000]
    folders = [identity(p) for p in words if (p / "config.json").is_file() or (p / FILE).is_file()]
    return _digest(who, registry.text(method), registry.source_digest(method), *folders)


def _weights(model: Loaded | None) -> str:
    """Of a model in memory, whatever its folder says: its configuration, its weights, what its ids mean."""
    if model is None:
        return "none"
    digest = hashlib.sha256((model.model.config.to_json_string() + vocabulary(model.tokenizer)).encode())
    for name, value in model.model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
