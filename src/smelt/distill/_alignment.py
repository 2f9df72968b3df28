"""Two vocabularies and two token sequences of one text: what the tokens spell, how far apart they are, which belong together."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["distances", "nearest", "pieces", "ranked", "shared", "spans", "warped"]

END = b"\xff\xff"  # the end of a text: no token of UTF-8 text is spelled so
LONGEST = 64  # bytes of a token that count for a distance: one machine word


def pieces(tokenizer: Any, width: int) -> list[bytes]:
    """The bytes that each id below `width` spells; b"" for ids without a token and for special tokens but the end of text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the byte-level alphabet: these are themselves
    others = [byte for byte in range(256) if byte not in printable]  # and these are shifted above 255
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
    special, added = set(tokenizer.all_special_ids), tokenizer.get_added_vocab()
    table = {token: at for token, at in tokenizer.get_vocab().items() if at < width and at not in special}
    byte_level = all(char in alphabet for token in table if token not in added for char in token)
    made = [b""] * width
    for token, at in table.items():
        if byte_level and token not in added:
            made[at] = bytes(alphabet[char] for char in token)
        elif byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
            made[at] = bytes.fromhex(byte[1])
        else:
            made[at] = token.replace("\u2581", " ").encode("utf-8", "replace")
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id < width:
        made[tokenizer.eos_token_id] = END
    return made


def shared(teacher: list[bytes], student: list[bytes]) -> Tensor:
    """For each id of the teacher the student's id that spells the same bytes, -1 where there is none. [v_t] int64"""
    known = {piece: at for at, piece in reversed(list(enumerate(student))) if piece}
    return torch.tensor([known.get(piece, -1) for piece in teacher])


def distances(left: list[bytes], right: list[bytes]) -> np.ndarray:
    """Edit distances of bytes, [left, right] int32: Myers' bit-parallel columns (1999) over the first 64 bytes of each.

    About 12 word operations a pair and byte of `left`, for all of `right` at once.
    """
    left, right = [piece[:LONGEST] for piece in left], [piece[:LONGEST] for piece in right]
    count, one = len(right), np.uint64(1)
    found = np.empty((len(left), count), np.int32)
    size = np.array([len(piece) for piece in right], np.int32)
    last = one << np.maximum(size - 1, 0).astype(np.uint64)
    matches = np.zeros((256, count), np.uint64)  # bit i of [c, r]: byte i of right[r] is c
    for at, piece in enumerate(right):
        for place, byte in enumerate(piece):
            matches[byte, at] |= one << np.uint64(place)
    lengths = np.array([len(piece) for piece in left], np.int64)
    for length in np.unique(lengths).tolist():
        members = np.flatnonzero(lengths == length)
        for part in np.array_split(members, 1 + len(members) * count // (1 << 18)):
            text = np.frombuffer(b"".join(left[at] for at in part), np.uint8).reshape(len(part), length)
            plus, minus = np.full((len(part), count), ~np.uint64(0)), np.zeros((len(part), count), np.uint64)
            score = np.tile(size, (len(part), 1))
            for column in range(length):
                equal = matches[text[:, column]]
                vertical = equal | minus
                horizontal = (((equal & plus) + plus) ^ plus) | equal
                up, down = minus | ~(horizontal | plus), plus & horizontal
                score += (up & last) != 0
                score -= (down & last) != 0
                up, down = (up << one) | one, down << one
                plus, minus = down | ~(vertical | up), up & vertical
            found[part] = np.where(size > 0, score, length)
    return found


def nearest(teacher: list[bytes], student: list[bytes]) -> Tensor:
    """For each id of the teacher the student's id of minimal edit distance, the lowest of equals; -1 for ids without bytes.

    Tokens that both have are looked up; the rest cost `distances`: 0.5 s for 4,096 by 1,024 tokens, minutes for 10^5 by 10^5.
    """
    found = shared(teacher, student)
    left = [at for at in torch.nonzero(found < 0).flatten().tolist() if teacher[at]]
    right = np.array([at for at, piece in enumerate(student) if piece and piece != END], np.int64)
    step = max(1, (1 << 26) // max(1, len(right)))
    for at in range(0, len(left), step) if len(right) else ():
        part = left[at : at + step]
        best = distances([teacher[i] for i in part], [student[i] for i in right]).argmin(1)
        found[torch.tensor(part)] = torch.from_numpy(right[best])
    return found


def spans(ids: Tensor, lengths: Tensor) -> Tensor:
    """[b, t] ids that are read -> where in the bytes of its row the next token starts."""
    return lengths[ids].cumsum(-1)


def ranked(keep: Tensor, other: Tensor) -> Tensor:
    """[b, t], [b, s] -> [b, t]: the k-th kept position of a row gets the other side's k-th kept position, or -1."""
    order = torch.argsort((~other).to(torch.uint8), dim=-1, stable=True)
    rank = keep.cumsum(-1) - 1
    there = keep & (rank < other.sum(-1, keepdim=True))
    return torch.where(there, order.gather(-1, torch.where(there, rank, 0)), -1)


def warped(cost: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Dynamic time warping of a batch: the cheapest monotone path from (0, 0) to (rows - 1, columns - 1).

    cost [b, n, m]; of row b the corner rows[b], columns[b] counts. Returns [b, n]: the column that position i is matched
    with, -1 where there are several or i is beyond the row. Of equally cheap steps the diagonal is taken, then the one
    that moves i. Cost: n + m vector steps each way; 4 b n m bytes.
    """
    batch, n, m = cost.shape
    wide, far = m + 1, np.int32(1 << 28)
    total = np.full(((n + 1) * wide, batch), far, np.int32)
    total[0] = 0
    local = np.zeros((n + 1, wide, batch), np.int32)
    local[1:, 1:] = cost.transpose(1, 2, 0)
    local = local.reshape(-1, batch)
    for diagonal in range(2, n + m + 1):  # i + j: flat places m apart
        first, end = max(1, diagonal - m), min(n, diagonal - 1)
        here = slice(first * m + diagonal, end * m + diagonal + 1, m)
        before = [total[here.start - back : here.stop - back : m] for back in (wide + 1, wide, 1)]
        total[here] = local[here] + np.minimum(np.minimum(before[0], before[1]), before[2])
    match, visits = np.full((batch, n + 1), -1), np.zeros((batch, n + 1), np.int32)
    i, j = rows.astype(np.int64), columns.astype(np.int64)
    i, j, every = np.where(j > 0, i, 0), np.where(i > 0, j, 0), np.arange(batch)
    while (i > 0).any():
        match[every, i] = j - 1
        visits[every, i] += 1
        at = i * wide + j
        steps = np.stack([total[np.maximum(at - back, 0), every] for back in (wide + 1, wide, 1)])
        taken = steps.argmin(0)
        active = i > 0
        i, j = i - (active & (taken != 2)), j - (active & (taken != 1))
        j = np.where(i > 0, j, 0)
    return np.where(visits == 1, match, -1)[:, 1:]
