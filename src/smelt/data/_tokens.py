"""Text to memory-mapped token ids, and ids to packed training rows.

A split becomes one flat file of ids (`uint16` when the vocabulary fits, else `uint32`), every document ended by
the end-of-text token, and one file of document offsets. Memory: one batch of documents; disk: 2 or 4 bytes per
token. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from smelt.data import Corpus, Document, Split
from smelt.data._text import clean
from smelt.spec import SmeltError

__all__ = ["Rows", "Tokens", "tokenize"]

BATCH = 64  # documents handed to the tokenizer at once
PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
LONGEST = 1 << 17  # characters; longer documents are cut at line ends so that memory stays flat


class Tokens:
    """The ids of one split: `ids` [n] memory-mapped, `starts` [documents + 1] offsets into it."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            about = json.loads((folder / "tokens.json").read_text())
            self.bytes, self.documents = about["bytes"], about["documents"]
            self.ids = np.memmap(folder / "ids.bin", dtype=about["dtype"], mode="r")
            self.starts = np.fromfile(folder / "starts.bin", dtype=np.int64)
            whole = len(self.ids) == about["tokens"] == self.starts[-1] and len(self.starts) == about["documents"] + 1
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise SmeltError(f"not a folder of token ids, or a damaged one ({error}); delete it", file=str(folder)) from error
        if not whole:
            raise SmeltError("the token ids were cut short; delete the folder", file=str(folder))

    def __len__(self) -> int:
        return len(self.ids)


def pieces(documents: Iterator[Document]) -> Iterator[Document]:
    """Documents longer than `LONGEST` characters in pieces that end at a line end where there is one."""
    for document in documents:
        text, part, at = document.text, 0, 0
        while len(text) - at > LONGEST:
            cut = text.rfind("\n", at, at + LONGEST) + 1 or at + LONGEST
            yield Document(f"{document.name}#{part}", text[at:cut])
            at, part = cut, part + 1
        yield Document(document.name if not part else f"{document.name}#{part}", text[at:])


def tokenize(corpus: Corpus, split: Split, tokenizer: Any, folder: Path, tick: Callable[[int], None] = lambda n: None) -> Tokens:
    """Write `corpus[split]` as ids into `folder`, or open it when it is there. `tick` gets bytes of text done.

    Raises SmeltError when the split is empty, the tokenizer has no end-of-text token, or the disk is full.
    """
    if (folder / "tokens.json").exists():
        return Tokens(folder)
    if tokenizer.eos_token_id is None:
        raise SmeltError("the tokenizer has no end-of-text token (eos_token), so documents cannot be told apart")
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        total, size, count, starts = 0, 0, 0, [0]
        with open(temporary / "ids.bin", "wb") as out, open(temporary / "starts.bin", "wb") as marks:
            for batch in _batches(pieces(corpus.documents(split))):
                for ids in tokenizer(batch, **PLAIN)["input_ids"]:
                    ids.append(tokenizer.eos_token_id)
                    np.asarray(ids, dtype).tofile(out)
                    total += len(ids)
                    starts.append(total)
                count += len(batch)
                done = sum(len(text.encode("utf-8", "replace")) for text in batch)
                size += done
                tick(done)
                np.asarray(starts[:-1], np.int64).tofile(marks)
                starts = starts[-1:]
            np.asarray(starts, np.int64).tofile(marks)
        if not total:
            raise SmeltError(f"the {split} split of the data is empty; give it more text, or a larger share of it")
        about = {"tokens": total, "bytes": size, "documents": count, "dtype": dtype.name}
        (temporary / "tokens.json").write_text(json.dumps(about))
        for file in temporary.iterdir():  # on the disk before the name is: a power cut leaves all or nothing
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "tokens.json").exists():  # else another process was first with the same content
                raise
    except OSError as error:
        raise SmeltError(f"the token ids cannot be written: {error}", file=str(folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Tokens(folder)


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(clean(document.text))
        size += len(document.text)
        if len(batch) == BATCH or size > 4 * LONGEST:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Rows(Dataset):
    """Packed rows for training: `input_ids` [context] and the next tokens `labels` [context], already shifted.

    Row i of epoch e is a window of the flat stream. Every epoch starts at another random offset in
    [0, context) and visits its windows in another random order, so a second epoch sees other row boundaries.
    Everything follows from (seed, i): two processes, a resumed run and another student get the same rows.

    boundaries = "cross": a row may run over document ends (the end-of-text token is between them);
    boundaries = "mask": `position_ids` start again at each document, which transformers turns into
    block-diagonal attention (slower: the fast causal path is lost).
    """

    def __init__(self, tokens: Tokens, context: int, count: int, seed: int, boundaries: str = "cross", jitter: bool = True):
        self.per_epoch = (len(tokens) - 1 - (context - 1 if jitter else 0)) // context
        if self.per_epoch < 1:
            raise SmeltError(f"the data has {len(tokens)} tokens; a row of {context} needs at least {2 * context}")
        self.tokens, self.context, self.count, self.seed = tokens, context, count, seed
        self.boundaries, self.jitter = boundaries, jitter
        self._epoch, self._offset, self._order = -1, 0, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.count

    def start(self, index: int) -> int:
        """Offset in the stream at which row `index` starts."""
        epoch, at = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            self._offset = int(random.integers(self.context)) if self.jitter else 0
            self._order, self._epoch = random.permutation(self.per_epoch), epoch
        return self._offset + int(self._order[at]) * self.context

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self.start(index)
        ids = torch.from_numpy(self.tokens.ids[start : start + self.context + 1].astype(np.int64))
        row = {"input_ids": ids[:-1], "labels": ids[1:], "row": torch.tensor(index)}
        if self.boundaries == "mask":
            first = int(np.searchsorted(self.tokens.starts, start, side="right"))
            last = int(np.searchsorted(self.tokens.starts, start + self.context, side="left"))
            inside = torch.from_numpy(self.tokens.starts[first:last] - start)  # where a document starts in this row
            at = torch.arange(self.context)
            begin = torch.cat([torch.zeros(1, dtype=torch.long), inside])
            row["position_ids"] = at - begin[torch.bucketize(at, inside, right=True)]
        return row
