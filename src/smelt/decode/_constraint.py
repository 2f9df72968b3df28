"""What text may be: constraints that answer for one token at a time, on bytes, because a token may end inside a character.

A `State` stands behind some text. `allows(piece)` is one evaluation of the constraint: may the text go on with these
bytes; `after(piece)` is the state behind them. Its verdict: "viable" some continuation is valid, "complete" the text may
also end here, "final" it must. States are never changed, so particles share them.

    regular(regex), schema(text)   llguidance (MIT, Rust), over an alphabet of the 256 bytes: testing a piece advances a
                                   parser by its bytes (about 5 microseconds) and no mask over the vocabulary is made
    checked(function)              any function of the text so far -> "dead", "viable", "complete" or "final"; it
                                   sees whole characters only: inside a character it is not asked and no text is
                                   complete, so a text may begin a character that then has no way to end, and die

llguidance writes regular expressions as Rust does: no look-around, no word boundaries, `.` is no newline; the whole text must match.
"""

from __future__ import annotations

import codecs
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from smelt.spec import SmeltError, nearest

__all__ = ["State", "Verdict", "checked", "installed", "pieces", "regular", "schema"]

Verdict = Literal["viable", "complete", "final"]
VERDICTS = ("dead", "viable", "complete", "final")
END = 256  # the token behind the 256 bytes, which llguidance must have


class State(ABC):
    verdict: Verdict

    @abstractmethod
    def allows(self, piece: bytes) -> bool: ...

    @abstractmethod
    def after(self, piece: bytes) -> State:
        """The state behind `piece`, which the state allows."""


def checked(check: Callable[[str], str]) -> State:
    """A function of the text so far. Raises SmeltError when it refuses the empty text, or says another word."""
    said = _said(check, "")
    if said == "dead":
        raise SmeltError("awrs: the check says 'dead' of the empty text, so no text would satisfy it")
    return _Checked(check, "", b"", cast(Verdict, said))


def _said(check: Callable[[str], str], text: str) -> str:
    said = check(text)
    if said not in VERDICTS:
        raise SmeltError(f"awrs: the check said {said!r}{nearest(str(said), VERDICTS)}")
    return said


class _Checked(State):
    def __init__(self, check: Callable[[str], str], text: str, pending: bytes, verdict: Verdict):
        self.check, self.text, self.pending, self.verdict = check, text, pending, verdict
        self.next: dict[bytes, State | None] = {}  # the function is asked once about each text

    def allows(self, piece: bytes) -> bool:
        if piece not in self.next:
            self.next[piece] = self._next(piece)
        return self.next[piece] is not None

    def after(self, piece: bytes) -> State:
        if not self.allows(piece):
            raise SmeltError(f"awrs: {piece!r} is not allowed after {self.text!r}")
        return cast(State, self.next[piece])

    def _next(self, piece: bytes) -> State | None:
        if self.verdict == "final":
            return None
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        try:
            new = decoder.decode(self.pending + piece)
        except UnicodeDecodeError:
            return None
        pending = decoder.getstate()[0]
        if not new:  # inside a character: nothing to ask
            return _Checked(self.check, self.text, pending, "viable")
        said = _said(self.check, self.text + new)
        if said == "dead" or (pending and said == "final"):
            return None
        return _Checked(self.check, self.text + new, pending, "viable" if pending else cast(Verdict, said))


def installed() -> bool:
    return importlib.util.find_spec("llguidance") is not None


@cache
def _bytes() -> tuple[Any, Any]:
    """(llguidance, a tokenizer whose tokens are the bytes)."""
    try:
        import llguidance
    except ImportError as error:
        raise SmeltError(f"awrs: regex and schema need {error.name}, which is not installed: pip install 'smelt[grammar]'") from error

    class Alphabet:
        eos_token_id, bos_token_id, special_token_ids = END, None, (255, END)
        tokens = (*(bytes([i]) for i in range(255)), b"\xff\xff", b"\xff<end>")  # 0xff, in no UTF-8 text, marks special tokens there

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    return llguidance, llguidance.LLTokenizer(llguidance.TokenizerWrapper(Alphabet()), eos_token=END, slices=[])


def regular(regex: str) -> State:
    """Text that matches `regex` from its first to its last byte."""
    library, _ = _bytes()
    return _parsed(library.LLMatcher.grammar_from_regex(regex), f"the regular expression {regex!r}")


def schema(text: str) -> State:
    """JSON that is valid under a schema: a file, or the schema itself when the text begins with '{'.

    Space between its parts is free; `"x-guidance": {"whitespace_flexible": false}` in the schema makes it fixed.
    """
    inline = text.lstrip().startswith("{")
    try:
        given = json.loads(text if inline else Path(text).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SmeltError(f"awrs: the schema '{text}' cannot be read: {error}; write a file, or the schema beginning with '{{'") from None
    except ValueError as error:
        raise SmeltError(f"awrs: the schema {'given' if inline else text} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise SmeltError(f"awrs: the schema {text} is a {type(given).__name__}; a JSON schema is an object")
    library, _ = _bytes()
    try:
        grammar = library.LLMatcher.grammar_from_json_schema(json.dumps(given))
    except ValueError as error:
        raise SmeltError(f"awrs: the schema cannot be used: {error}") from None
    return _parsed(grammar, "the schema")


def _parsed(grammar: str, name: str) -> State:
    library, alphabet = _bytes()
    matcher = library.LLMatcher(alphabet, grammar, log_level=0)
    if matcher.is_error():
        raise SmeltError(f"awrs: {name} cannot be used: {matcher.get_error()[:300]}")
    state = _Parsed(matcher)
    if state.verdict == "viable" and matcher.validate_tokens([]) == 0 and not any(matcher.validate_tokens([i]) for i in range(255)):
        raise SmeltError(f"awrs: no text satisfies {name}")
    return state


class _Parsed(State):
    """A matcher of llguidance, copied before it goes on."""

    def __init__(self, matcher: Any):
        self.matcher = matcher
        self.verdict = ("final" if matcher.is_stopped() else "complete") if matcher.is_accepting() else "viable"

    def allows(self, piece: bytes) -> bool:
        if self.verdict == "final" or 255 in piece:
            return False
        return self.matcher.validate_tokens(list(piece)) == len(piece)

    def after(self, piece: bytes) -> State:
        matcher = self.matcher.deep_copy()
        if not matcher.consume_tokens(list(piece)) or matcher.is_error():
            raise SmeltError(f"awrs: the constraint could not go on with {piece!r}: {matcher.get_error()[:300]}")
        return _Parsed(matcher)


def pieces(tokenizer: Any, vocab: int) -> list[bytes | None]:
    """The bytes each of `vocab` ids adds to a text; None for special tokens and ids that name no token.

    Byte-level BPE and SentencePiece-like tokenizers, told by their decoder. Raises SmeltError for others (WordPiece):
    what a token of theirs adds depends on its neighbours.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        raise SmeltError("awrs: this tokenizer does not say which bytes a token is; it needs byte-level BPE or SentencePiece")
    decoder = json.loads(backend.decoder.__getstate__())
    steps = {step["type"] for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps:
        table = _byte_level()
        spell: Callable[[str], bytes] = lambda word: bytes(table[letter] for letter in word)  # noqa: E731
    elif steps & {"ByteFallback", "Metaspace"}:
        spell = _sentencepiece
    else:
        raise SmeltError(
            f"awrs: tokens of a {' and '.join(sorted(steps))} decoder are no fixed bytes; it needs byte-level BPE or SentencePiece"
        )
    added = backend.get_added_tokens_decoder()
    special = set(tokenizer.all_special_ids)
    found: list[bytes | None] = [None] * vocab
    for word, at in backend.get_vocab(with_added_tokens=True).items():
        if at >= vocab or at in special or (at in added and added[at].special):
            continue
        found[at] = (word.encode() if at in added else spell(word)) or None
    return found


def _byte_level() -> dict[str, int]:
    """The letter each byte is written as in byte-level vocabularies: itself where it can be seen, else the next from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [i for i in range(256) if i not in seen]
    return {chr(i): i for i in seen} | {chr(256 + at): i for at, i in enumerate(hidden)}


def _sentencepiece(word: str) -> bytes:
    if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
        return bytes([int(word[3:5], 16)])
    return word.replace("▁", " ").encode()
