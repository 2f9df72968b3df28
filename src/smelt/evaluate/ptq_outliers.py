"""How large the outliers of a model's activations are, and what the choice of calibration text changes."""

from __future__ import annotations

import ast
import copy
import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from smelt._compress_walk import calibrated
from smelt.compress import compress
from smelt.data import Corpus
from smelt.data.stdlib import Stdlib
from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder
from smelt.evaluate._text import CHARACTERS, corpus_of, encode, room
from smelt.evaluate.perplexity import Perplexity
from smelt.spec import Paper, SmeltError
from smelt.weights import PerMatrix, Scaled
from smelt.weights.awq import AWQ
from smelt.weights.gptq import GPTQ
from smelt.weights.rtn import RTN

__all__ = ["PTQOutliers"]

Source = Literal["own", "shuffled", "uniform", "prose"]
SOURCES: tuple[Source, ...] = ("own", "shuffled", "uniform", "prose")
POOL = 4  # documents looked at for each row wanted, as some are short and some have no docstring
_pools: dict[tuple[Any, ...], list[str]] = {}  # so that k variants read the corpus once


@dataclass(frozen=True)
class PTQOutliers(Probe):
    """outlier_ratio = max|x| / median|x|, outlier_kurtosis = E x^4 / (E x^2)^2, over the inputs x of each linear map.

    One row each per kind of map, named after the first that reads that input (q_proj stands for k_proj and v_proj too):
    the mean over the layers, `samples` by layer. Gaussian inputs have a kurtosis of 3.

    Then a copy of the model is compressed with `method` once per calibration source and seed, and read like perplexity:
    own       windows of documents of the train split (of `corpus`, else of the variant's data), `rows` * `context` tokens
    shuffled  those very tokens in random order: what comes of counts alone
    uniform   ids drawn evenly from the vocabulary, special ones left out
    prose     the docstrings of such documents; left out where there are too few for one row
    ptq_before is bits per byte untouched, ptq_<source> the mean over the seeds, `samples` by seed; ptq_source_sd is the standard
    deviation (n - 1) of the means of the sources, what the choice of the text does, and ptq_seed_sd the root of the mean
    variance over the seeds inside a source, what chance does: only a source_sd well above it says anything. A method that
    measures nothing, such as rtn, has 0 for both. Other methods or bits: another run, with another `method`.

    Cost: sources * seeds * (2 passes over the calibration tokens, the method, `tokens` of evaluation), a copy of the model in
    memory. The variant's model is left as it was; a bound cache is not used (attention is). Raises SmeltError for a method that
    needs more than one matrix at a time, a model that is quantized already, and text too short for one row.
    Differs from the paper: it calibrates models of 6.7B to 35B parameters with web text, tasks, other languages and random
    punctuation, and compares perplexities and tasks; the sources, the kurtosis and the two deviations here are a reconstruction.
    """

    paper: ClassVar = Paper(
        "Outliers and Calibration Sets have Diminishing Effect on Quantization of Modern LLMs",
        "arXiv:2405.20835",
        "calibration sets of other content",
    )
    method: Any = field(default_factory=lambda: GPTQ(grid=RTN(bits=3)))  # PerMatrix or Scaled
    corpus: Corpus | None = None  # calibration text; None: the variant's data
    sources: tuple[Source, ...] = SOURCES
    seeds: Annotated[int, Ge(1)] = 3
    rows: Annotated[int, Ge(1)] = 16
    context: Annotated[int, Ge(2)] = 256
    tokens: Annotated[int, Ge(1)] = 8192  # of evaluation
    document: Annotated[int, Ge(1)] = 512

    def __post_init__(self) -> None:
        if not isinstance(self.method, (PerMatrix, Scaled)):
            raise SmeltError(f"ptq_outliers: method is {self.method!r}; it takes a method for single matrices, as gptq(grid=rtn(bits=3))")
        if not self.sources or len(set(self.sources)) < len(self.sources):
            raise SmeltError(f"ptq_outliers: sources={list(self.sources)} should name one or more of {', '.join(SOURCES)}, each once")

    @classmethod
    def example(cls) -> Self:
        small = {"rows": 2, "context": 16, "tokens": 200, "document": 100}
        return cls(AWQ(quantizer=RTN(bits=3, group=32), steps=2), Stdlib(), ("own", "uniform"), seeds=1, **small)

    def __call__(self, variant: Variant) -> list[Metric]:
        decoder(variant, "ptq_outliers")
        before = self._bits(variant, variant.model)
        batches = {source: [self._rows(variant, source, seed) for seed in range(self.seeds)] for source in self.sources}
        found = {source: [self._compressed(variant, rows) for rows in made] for source, made in batches.items() if all(made)}
        if not found:
            raise SmeltError(f"ptq_outliers: the text of {' and '.join(self.sources)} is too short for a row of {self.context} tokens")
        own = batches.get("own") or [self._rows(variant, "own", 0)]
        means = [float(np.mean(bits)) for bits in found.values()]
        chance = float(np.sqrt(np.mean([np.var(bits, ddof=1) for bits in found.values()]))) if self.seeds > 1 else 0.0
        metrics = self._outliers(variant, own[0] or next(made[0] for made in batches.values() if all(made)))
        metrics.append(Metric("ptq_before", before, "bits per byte", "lower"))
        metrics += [_mean(f"ptq_{source}", bits, "bits per byte") for source, bits in found.items()]
        metrics.append(Metric("ptq_source_sd", float(np.std(means, ddof=1)) if len(means) > 1 else 0.0, "bits per byte", "lower"))
        return [*metrics, Metric("ptq_seed_sd", chance, "bits per byte", "lower")]

    # the study

    def _bits(self, variant: Variant, model: Any) -> float:
        probe = Perplexity(tokens=self.tokens, document=self.document)
        return probe(Variant(variant.name, model, variant.tokenizer, data=variant.data))[0].value

    def _compressed(self, variant: Variant, rows: list[dict[str, Tensor]]) -> float:
        model, _ = compress(copy.deepcopy(variant.model), variant.tokenizer, self.method, rows, progress=None)
        return self._bits(variant, model)

    def _outliers(self, variant: Variant, rows: list[dict[str, Tensor]]) -> list[Metric]:
        ratios: dict[str, list[float]] = {}
        peaks: dict[str, list[float]] = {}
        with torch.no_grad():
            for todo in calibrated(variant.model, rows, ("inputs",), "ptq_outliers"):
                seen: set[int] = set()  # maps that read one input share their sums
                for name, _, sums in todo:
                    if sums is None or id(sums) in seen:
                        continue
                    seen.add(id(sums))
                    x = sums.values(("inputs",), torch.float64)[0].abs()
                    kind = name.rpartition(".")[2]
                    middle = x.flatten().kthvalue((x.numel() + 1) // 2).values
                    ratios.setdefault(kind, []).append((x.max() / middle.clamp(min=1e-300)).item())
                    peaks.setdefault(kind, []).append((x.pow(4).mean() / x.square().mean().square().clamp(min=1e-300)).item())
        metrics = [_mean(f"outlier_ratio_{kind}", parts, "max / median") for kind, parts in ratios.items()]
        return metrics + [_mean(f"outlier_kurtosis_{kind}", parts, "3 for a normal law") for kind, parts in peaks.items()]

    # the calibration text

    def _rows(self, variant: Variant, source: Source, seed: int) -> list[dict[str, Tensor]]:
        """Rows of one length; none when the text is too short for one."""
        context = room(variant.model, self.context)
        draw = np.random.default_rng([seed, SOURCES.index(source)])
        if source == "uniform":
            ids = draw.choice(sorted(set(range(len(variant.tokenizer))) - set(variant.tokenizer.all_special_ids)), self.rows * context)
        else:
            ids = np.array(self._ids(variant, source == "prose", seed, context), dtype=np.int64)
            ids = draw.permutation(ids) if source == "shuffled" else ids
        count = len(ids) // context
        rows = torch.from_numpy(ids[: count * context].astype(np.int64)).view(count, context)
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(8)] if count else []

    def _ids(self, variant: Variant, prose: bool, seed: int, context: int) -> list[int]:
        """At most rows * context tokens, at most `context` from one document, each piece from a random place of it."""
        ids: list[int] = []
        corpus = corpus_of(variant) if self.corpus is None else self.corpus
        for at, text in enumerate(pool(corpus, POOL * self.rows, seed)):
            text = "\n".join(docstrings(text)) if prose else text
            size = 4 * CHARACTERS * context
            start = int(np.random.default_rng([seed, at]).integers(max(1, len(text) - size + 1)))
            ids += encode(variant.tokenizer, text[start : start + size]).ids[:context] if text.strip() else []
            if len(ids) >= self.rows * context:
                break
        return ids[: self.rows * context]


def pool(corpus: Corpus, count: int, seed: int) -> list[str]:
    """`count` documents of the train split in an order drawn by `seed`: those whose names hash lowest. O(count) memory."""
    key = (type(corpus).__qualname__, repr(corpus), corpus.digest(), count, seed)
    if key not in _pools:
        while len(_pools) >= 8:
            _pools.pop(next(iter(_pools)))
        hashed = ((hashlib.sha256(f"{seed} {name}".encode()).digest(), text) for name, text in corpus.documents("train"))
        _pools[key] = [text for _, text in heapq.nsmallest(count, hashed)]
    return _pools[key]


def docstrings(text: str) -> Iterator[str]:
    """Of a Python file, in its order; none of other text."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from filter(None, [ast.get_docstring(node)])


def _mean(name: str, parts: list[float], unit: str) -> Metric:
    return Metric(name, sum(parts) / len(parts), unit, "lower", tuple(parts), (1.0,) * len(parts))
