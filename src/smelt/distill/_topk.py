"""A teacher's likeliest tokens, kept on disk: one pass of the teacher, read by as many trainings as follow."""

from __future__ import annotations

import ast
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from smelt.distill._divergence import wide
from smelt.distill.forward_kl import ForwardKL
from smelt.progress import track
from smelt.registry import build, text
from smelt.spec import SmeltError

__all__ = ["Cached", "TopK", "fill", "parse", "unpack"]

LEAST = 2e-7  # the smallest tail that float32 tells apart from rounding in 1 - (sum of the kept)


@dataclass(frozen=True)
class TopK:
    """log p~_v = the teacher's log p_v for its k likeliest tokens; the rest of its mass, tail = 1 - kept, is shared by the others.

    tail="student": they share it as the student does, p~_v = tail q_v / (1 - sum_kept q), without gradient. Any divergence of
    p~ and q is then that of k tokens and one bucket: with forward KL exactly sum_kept p log(p / q) + tail log(tail / q_tail),
    less than the whole by tail KL(p_tail || q_tail), which is not taught. The student is told how much lies in the tail and
    nothing false about where. tail="uniform": p~_v = tail / (V - k), which pulls the student's tail flat. tail="sampled":
    p~_v = tail c_v / n, c_v how often token v is among n = `draws` tokens drawn from the teacher's tail, so E p~ = p, and with it
    the gradient of forward KL, q - p~, is that of the whole distribution in the mean (importance sampling, as Sparse Logit
    Sampling, arXiv:2503.16870, has it; a reconstruction from its abstract: keeping the likeliest exactly and drawing the rest
    systematically, at (u + i) / n of the tail's mass, u from the row's ids, is ours, for less variance). What is not drawn
    has p~_v = 0: a divergence that is infinite there (reverse KL) or not linear in p takes "student".

    On disk, for each position: k ids (uint16 up to 65,536 tokens, else uint32), k log-probabilities and the log of the
    tail (float16): k (2 + 2) + 2 bytes per token, or k (4 + 2) + 2, and 2 n or 4 n for the ids drawn; and 4 bytes a row, a
    checksum of the row's ids. Error of a uniform tail: KL(p || p~) <= tail log(V - k), plus rounding: float16 has 11 bits,
    so a log-probability between -8 and -16 is off by at most 2^-8. `Cached.stats` has what both came to on a sample of the rows.
    """

    k: Annotated[int, Ge(1)] = 64
    tail: Literal["student", "uniform", "sampled"] = "student"
    draws: Annotated[int, Ge(1)] = 32  # of a sampled tail

    @property
    def drawn(self) -> int:
        return self.draws if self.tail == "sampled" else 0

    def fits(self, objective: Any, reading: Sequence[str]) -> None:
        """Raises SmeltError for a sampled tail and an objective that is infinite where the teacher says nothing."""
        if self.drawn and set(reading) == {"student", "teacher"}:
            some, none = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -torch.inf]])
            if not torch.isfinite(objective(student=some, teacher=none)).all():
                raise SmeltError(
                    f"teacher: cache: {text(objective)} is infinite where a teacher says nothing, "
                    "as it does beside the draws of tail='sampled'; write tail='student'"
                )

    def bytes_per_token(self, vocab: int) -> int:
        return min(self.k, vocab) * (np.dtype(_ids(vocab)).itemsize + 2) + 2 + self.drawn * np.dtype(_ids(vocab)).itemsize

    def bytes(self, rows: int, context: int, vocab: int) -> int:
        """Of the whole cache, its description (a few hundred bytes) not counted."""
        return rows * (context * self.bytes_per_token(vocab) + 4)

    def pack(self, logits: Tensor, start: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
        """[..., v] -> ids [..., k + n], and float16 [..., k + 1]: the log-probabilities of the first k, then the log of the tail.

        The n last ids, rising, are the draws of a sampled tail; `start` [...] in [0, 1) is the u they begin at.
        """
        vocab = logits.shape[-1]
        all_p = wide(logits).log_softmax(-1)
        kept = all_p.topk(min(self.k, vocab), dim=-1)
        tail = (1 - kept.values.exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()
        log_p, ids = torch.cat([kept.values, tail], -1).clamp(min=torch.finfo(torch.float16).min), kept.indices
        if self.drawn:
            mass = all_p.exp().double().scatter_(-1, ids, 0.0).cumsum(-1)
            begin = torch.zeros(mass.shape[:-1]) if start is None else start
            at = (begin.to(mass)[..., None] + torch.arange(self.drawn).to(mass)) / self.drawn
            ids = torch.cat([ids, torch.searchsorted(mass, at * mass[..., -1:], right=True).clamp_(max=vocab - 1)], -1)
        return ids.cpu().numpy().astype(_ids(vocab)), log_p.half().cpu().numpy()


def unpack(ids: Tensor, log_p: Tensor, vocab: int, student: Tensor | None = None) -> Tensor:
    """The inverse of `pack`, as far as there is one: [..., k + n], [..., k + 1] -> log-probabilities [..., v], float32.

    Draws (n > 0) share the tail; else it has the shape of the student's logits [..., v], where they are given, or is flat.
    """
    k, ids = log_p.shape[-1] - 1, ids.long()
    best, drawn, rest = ids[..., :k], ids[..., k:], log_p[..., k:]
    if drawn.shape[-1]:
        count = (drawn[..., None] == drawn[..., None, :]).sum(-1)
        dense = torch.full((*ids.shape[:-1], vocab), -torch.inf, device=ids.device)
        dense.scatter_(-1, drawn, rest.float() + (count / drawn.shape[-1]).log())  # one token drawn twice writes the same twice
    elif student is None:
        flat = rest.float() - np.log(max(vocab - k, 1))
        dense = flat.expand(*flat.shape[:-1], vocab).clone()
    else:
        dense = student.detach().to(wide(student[..., :0]).dtype, copy=True, memory_format=torch.contiguous_format)
        for part, own, tail in _slices(dense.view(-1, vocab), best.reshape(-1, k), rest.reshape(-1, 1)):
            part.scatter_(-1, own, -torch.inf)
            part += tail.to(part.dtype) - part.logsumexp(-1, keepdim=True)
    return dense.scatter_(-1, best, log_p[..., :k].to(dense.dtype))


def _slices(dense: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """As many rows at a time as stay in a CPU's cache (1 MiB of float32) through all that is done to them."""
    step = max(1, (1 << 20 if dense.device.type == "cpu" else 1 << 26) // (4 * dense.shape[-1]))
    return zip(*(x.split(step) for x in (dense, *others)), strict=True)


def _ids(vocab: int) -> str:
    return "uint16" if vocab <= 1 << 16 else "uint32"


class Cached:
    """A finished cache, memory-mapped. `cached(inputs)` -> log-probabilities [b, t, v] for the rows `inputs["row"]`.

    The tail is shared as `inputs["student"]` (logits [b, t, v]) does, where they are given and `tail` says so.
    """

    def __init__(self, folder: Path, tail: str = "student"):
        self.folder, self.about, self.tail = folder, _about(folder), tail
        rows, context, k, draws = (self.about[name] for name in ("rows", "context", "k", "draws"))
        self.ids = np.memmap(folder / "ids.bin", self.about["ids"], "r", shape=(rows, context, k + draws))
        self.log_p = np.memmap(folder / "log_p.bin", np.float16, "r", shape=(rows, context, k + 1))
        self.sums = np.fromfile(folder / "sums.bin", np.uint32)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Raises SmeltError for a row the cache was not made from, which would teach the wrong text without a word."""
        if "row" not in inputs:
            raise SmeltError("a cached teacher needs rows that say their number (inputs['row'])")
        at = inputs["row"].tolist()
        for row, ids in zip(at, inputs["input_ids"], strict=True):
            if row >= len(self.sums) or _sum(ids) != self.sums[row]:
                raise SmeltError(f"the cached teacher in {self.folder} was made from other rows (row {row} differs); remove it")
        device = inputs["input_ids"].device
        ids, log_p = torch.from_numpy(self.ids[at].astype(np.int32)), torch.from_numpy(self.log_p[at])
        student = inputs.get("student") if self.tail == "student" else None
        return unpack(ids.to(device), log_p.to(device), self.about["vocab"], student)

    def stats(self) -> dict[str, float]:
        """What the cache takes and what it loses: `kl` KL(p || p~) of a uniform tail, and `tail`, means over `measured` positions."""
        about = self.about
        positions = max(1, about["measured"])
        return {
            "bytes_per_token": sum(file.dtype.itemsize * file.shape[-1] for file in (self.ids, self.log_p)),
            "bytes": sum((self.folder / name).stat().st_size for name in ("ids.bin", "log_p.bin", "sums.bin")),
            "kl": about["kl"] / positions,
            "tail": about["tail"] / positions,
            "measured": about["measured"],
        }


def _about(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "about.json").read_text())
    except (OSError, ValueError):
        return {}


def _sum(ids: Tensor) -> int:
    return zlib.crc32(ids.cpu().numpy().astype("<i4").tobytes())


def fill(
    cache: TopK,
    online: Callable[[dict[str, Tensor]], dict[str, Any]],
    rows: Dataset,
    folder: Path,
    *,
    vocab: int,
    key: str = "",
    batch: int = 0,
    device: Any = "cpu",
    mark_seconds: float = 5.0,
) -> Cached:
    """One pass of the teacher over `rows` in order, written into `folder`; what is there already is not done again.

    `online(inputs)["teacher"]` are its logits [b, t, vocab]. `key` names the teacher and the rows: a folder with another
    key is begun anew. After a kill the pass goes on from the last mark, at most `mark_seconds` of work back. Of several
    processes the first writes and the others wait. Cost: 2 N operations per token. Memory: `batch` rows of logits
    (0: as many as make 256 MiB). Raises SmeltError when the disk is full or closed.
    """
    count, first = len(rows), rows[0]["input_ids"]  # type: ignore[arg-type]
    fixed = {"key": key, "rows": count, "context": len(first), "vocab": vocab, "k": min(cache.k, vocab), "draws": cache.drawn}
    fixed["ids"] = _ids(vocab)
    about = _about(folder)
    while int(os.environ.get("RANK", "0")) and not (_same(about, fixed) and about["done"] == count):
        time.sleep(0.2)
        about = _about(folder)
    try:
        if not _same(about, fixed):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            about = fixed | {"done": 0, "kl": 0.0, "tail": 0.0, "measured": 0}
        if about["done"] < count:
            _write(cache, online, rows, folder, about, batch or max(1, (1 << 28) // (len(first) * vocab * 4)), device, mark_seconds)
    except OSError as error:
        raise SmeltError(f"the teacher's cache cannot be written ({error.strerror}): {folder}") from error
    return Cached(folder, cache.tail)


def _same(about: dict[str, Any], fixed: dict[str, Any]) -> bool:
    return all(about.get(name) == value for name, value in fixed.items())


def _write(
    cache: TopK, online: Callable, rows: Any, folder: Path, about: dict[str, Any], batch: int, device: Any, mark_seconds: float
) -> None:
    k = about["k"]
    sizes = {"ids.bin": np.dtype(about["ids"]).itemsize * (k + about["draws"]), "log_p.bin": 2 * (k + 1)}
    sizes = {name: size * about["context"] for name, size in sizes.items()} | {"sums.bin": 4}
    files = {name: open(folder / name, "ab") for name in sizes}  # noqa: SIM115
    marked = time.monotonic()
    try:
        for name, file in files.items():
            file.truncate(about["done"] * sizes[name])
        with track("teacher", about["rows"] * about["context"], "tokens", about["done"] * about["context"]) as bar:
            while about["done"] < about["rows"]:
                at = range(about["done"], min(about["done"] + batch, about["rows"]))
                inputs = {name: value.to(device) for name, value in default_collate([rows[i] for i in at]).items()}
                logits = online(inputs)["teacher"]
                sums = [_sum(row) for row in inputs["input_ids"]]
                start = torch.stack([torch.rand(about["context"], generator=torch.Generator().manual_seed(s)) for s in sums])
                ids, log_p = cache.pack(logits, start)
                ids.tofile(files["ids.bin"])
                log_p.tofile(files["log_p.bin"])
                np.array(sums, np.uint32).tofile(files["sums.bin"])
                again = unpack(torch.from_numpy(ids[0, :, :k].astype(np.int32)), torch.from_numpy(log_p[0]), about["vocab"])
                about["kl"] += ForwardKL()(again, logits[0].cpu()).sum().item()  # KL(p || p~), p~ in the student's place
                about["tail"] += float(np.exp(log_p[0, :, -1].astype(np.float64)).sum())
                about["measured"] += len(again)
                about["done"] = at.stop
                bar.advance(len(at) * about["context"])
                if time.monotonic() - marked > mark_seconds or at.stop == about["rows"]:
                    for file in files.values():
                        file.flush()
                        os.fsync(file.fileno())
                    (folder / "about.new").write_text(json.dumps(about))
                    os.replace(folder / "about.new", folder / "about.json")
                    marked = time.monotonic()
    finally:
        for file in files.values():
            file.close()


def parse(text: str) -> TopK:
    """`topk(k=64)`, `topk(k=32, tail="sampled", draws=32)`, or the bare name for the defaults."""
    if text.strip() == "topk":
        return TopK()
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name) or call.func.id != "topk":
            raise ValueError
        values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise SmeltError(f"teacher: cache: '{text[:80]}' is not a cache; write topk(k=64)") from None
    unknown = [name for name in values if name not in ("k", "tail", "draws")]
    if unknown:
        raise SmeltError(f"teacher: cache: topk has no parameter '{unknown[0]}'; there are k, tail and draws")
    return build(TopK, values, "teacher: cache: topk")
