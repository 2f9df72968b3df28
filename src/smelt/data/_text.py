"""What corpora share: readable text, short fingerprints, and splits that follow from the text itself."""

from __future__ import annotations

import hashlib

from smelt.data import Split

__all__ = ["clean", "fingerprint", "split_of"]

CHUNK = 1 << 16  # characters normalised at once, so that a long document is not split into words all at once


def clean(text: str) -> str:
    """The text with lone surrogates (JSON may hold them) replaced, so that every tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def fingerprint(text: str, *, spaces: bool = True, purpose: bytes = b"") -> int:
    """64 bits of BLAKE2b of the text; without `spaces` all whitespace is left out first.

    Two different texts among n share one with probability about n^2 / 2^65: 3e-8 for a million, 3e-4 for 1e8.
    """
    digest = hashlib.blake2b(digest_size=8, person=purpose)
    for at in range(0, len(text), CHUNK):
        part = text[at : at + CHUNK]
        digest.update((part if spaces else "".join(part.split())).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little")


def split_of(text: str, validation: float, test: float) -> Split:
    """test if h < test, validation if h < test + validation, else train; h in [0, 1) hashes the text without whitespace.

    A text keeps its split wherever it lies and whatever lies beside it, and copies of it never part.
    """
    h = fingerprint(text, spaces=False, purpose=b"split") / 2**64
    return "test" if h < test else "validation" if h < test + validation else "train"
