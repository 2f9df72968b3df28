"""Files of retrieval: queries and corpora (TSV, BEIR's JSON lines), TREC runs and judgements. An error names file and line.

Lines end at a line feed; a carriage return before it, a byte order mark and empty lines are passed over. Text is UTF-8.
Identifiers are strings without blanks, as a TREC run is split at them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TextIO

from smelt.spec import SmeltError, nearest

__all__ = ["read_corpus", "read_qrels", "read_queries", "read_run", "whole", "write_jsonl", "write_run"]

JSON = (".jsonl", ".json", ".ndjson")
MANY = 2000  # names among which the nearest is still found at once


def read_queries(file: Path) -> dict[str, str]:
    """{id: text} of `id<TAB>text` lines, or of {"_id", "text"} in a file that ends in .jsonl."""
    return _texts(file, "query", ("text",))


def read_corpus(file: Path) -> dict[str, str]:
    """{id: "title text"} of {"_id", "title", "text"} in a file that ends in .jsonl, or of `id<TAB>text` lines."""
    return _texts(file, "passage", ("title", "text"))


def read_run(file: Path, corpus: Mapping[str, str]) -> dict[str, list[str]]:
    """{query: passages, best first} of `query Q0 passage rank score tag` lines, by score as in trec_eval, then by rank."""
    found: dict[str, list[tuple[float, int, str]]] = {}
    seen: dict[tuple[str, str], int] = {}
    for number, line in _lines(file):
        words = line.split()
        if len(words) != 6:
            _wrong(file, number, f"{len(words)} columns; a line of a run is 'query Q0 passage rank score tag'")
        query, _, passage, place, score, _ = words
        with contextlib.suppress(ValueError):
            entry = -float(score), int(place), passage
            if math.isfinite(entry[0]):
                if passage not in corpus:
                    _wrong(file, number, f"the passage '{_short(passage)}' is not in the corpus{_near(passage, corpus)}")
                _once(seen, (query, passage), number, file, f"the passage '{_short(passage)}' of query '{_short(query)}'")
                found.setdefault(query, []).append(entry)
                continue
        _wrong(file, number, f"rank '{_short(place)}' and score '{_short(score)}' are not a whole and a finite number")
    if not found:
        raise SmeltError("there is no candidate in it", file=str(file))
    return {query: [passage for *_, passage in sorted(entries, key=lambda e: e[:2])] for query, entries in found.items()}


def read_qrels(file: Path, queries: Collection[str]) -> dict[str, dict[str, int]]:
    """{query: {passage: grade}} of `query 0 passage grade` lines (TREC), or of three columns, a header above them (BEIR)."""
    found: dict[str, dict[str, int]] = {}
    seen: dict[tuple[str, str], int] = {}
    columns = 0
    for number, line in _lines(file):
        words = line.split()
        if not columns:
            columns = len(words)
            if columns == 3 and not _whole_number(words[2]):  # the header
                continue
        if len(words) != columns or columns not in (3, 4):
            _wrong(file, number, f"{len(words)} columns; a line is 'query 0 passage grade', or in all lines 'query passage grade'")
        query, passage, grade = words[0], words[-2], words[-1]
        if not _whole_number(grade):
            _wrong(file, number, f"the grade '{_short(grade)}' is not a whole number")
        if query not in queries:
            _wrong(file, number, f"the query '{_short(query)}' is judged here and not among those asked{_near(query, queries)}")
        _once(seen, (query, passage), number, file, f"the judgement of '{_short(passage)}' for query '{_short(query)}'")
        found.setdefault(query, {})[passage] = int(grade)
    if not found:
        raise SmeltError("there is no judgement in it", file=str(file))
    return found


def write_run(file: Path, orders: Mapping[str, Sequence[str]], tag: str) -> None:
    """A TREC run. Scores are n - place, strictly falling: trec_eval sorts by them and would break ties by name."""
    with whole(file) as out:
        for query, passages in orders.items():
            for at, passage in enumerate(passages):
                out.write(f"{query} Q0 {passage} {at + 1} {len(passages) - at} {tag}\n")


def write_jsonl(file: Path, orders: Mapping[str, Sequence[tuple[str, float | None]]], tag: str) -> None:
    """A line per query: {"query", "tag", "passages": [{"_id", "rank", "score"}, ...]}; `score`: the judge's own, or null."""
    with whole(file) as out:
        for query, passages in orders.items():
            rows = [{"_id": name, "rank": at + 1, "score": score} for at, (name, score) in enumerate(passages)]
            out.write(json.dumps({"query": query, "tag": tag, "passages": rows}, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole(file: Path) -> Iterator[TextIO]:
    """What is written in the block becomes the file, on the disk, or nothing does."""
    temporary = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
        if os.name != "nt":
            folder = os.open(file.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise SmeltError(f"cannot be written: {error.strerror}", file=str(file)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _texts(file: Path, what: str, parts: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    seen: dict[str, int] = {}
    read = _object if file.suffix.lower() in JSON else _pair
    for number, line in _lines(file):
        name, text = read(file, number, line, parts)
        if len(name.split()) != 1 or name != name.strip():
            _wrong(
                file, number, f"the id '{_short(name)}' has a blank in it, which a TREC run cannot hold" if name.strip() else "an empty id"
            )
        _once(seen, name, number, file, f"the id '{_short(name)}'")
        found[name] = text
    if not found:
        raise SmeltError(f"there is no {what} in it", file=str(file))
    return found


def _pair(file: Path, number: int, line: str, parts: tuple[str, ...]) -> tuple[str, str]:
    name, tab, text = line.partition("\t")
    if not tab:
        hint = "; JSON lines are read from a file that ends in .jsonl" if line.lstrip().startswith("{") else ""
        _wrong(file, number, f"there is no tab; a line is id<TAB>text{hint}")
    return name, text


def _object(file: Path, number: int, line: str, parts: tuple[str, ...]) -> tuple[str, str]:
    form = "{" + ", ".join(f'"{key}": "..."' for key in ("_id", *parts)) + "}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        said = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        _wrong(file, number, f"not JSON ({said}); a line is {form}")
    if not isinstance(record, dict):
        _wrong(file, number, f"not a JSON object; a line is {form}")
    for key in ("_id", "text"):
        if key not in record:
            _wrong(file, number, f"there is no '{key}' but {', '.join(map(_short, record)) or 'nothing'}; a line is {form}")
    name = record["_id"]
    if isinstance(name, bool) or not isinstance(name, str | int):
        _wrong(file, number, f"the _id is {_short(json.dumps(name))} and not a string")
    for key in parts:
        if not isinstance(record.get(key) or "", str):
            _wrong(file, number, f"the {key} is {_short(json.dumps(record[key]))} and not a string")
    return _sound(str(name)), _sound(" ".join(record.get(key) or "" for key in parts).strip())


def _sound(text: str) -> str:
    """JSON can name half of a surrogate pair, which no encoding can write; it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, line without its end) of the lines that are not empty."""
    number = 0
    try:
        with open(file, "rb") as lines:
            for number, raw in enumerate(lines, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").rstrip(b"\r\n")
                if line:
                    yield number, line.decode("utf-8")
    except OSError as error:
        raise SmeltError(f"cannot be read: {error.strerror}", file=str(file)) from error
    except UnicodeDecodeError as error:
        _wrong(file, number, f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start + 1}); save the file as UTF-8", error)


def _once(seen: dict[Any, int], key: Any, number: int, file: Path, what: str) -> None:
    if key in seen:
        _wrong(file, number, f"{what} is already in line {seen[key]}")
    seen[key] = number


def _near(name: str, names: Collection[str]) -> str:
    return nearest(name, islice(names, MANY))


def _whole_number(word: str) -> bool:
    try:
        return int(word) is not None
    except ValueError:
        return False


def _wrong(file: Path, number: int, message: str, cause: Exception | None = None) -> NoReturn:
    raise SmeltError(message, file=str(file), line=number) from cause


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
