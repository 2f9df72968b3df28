import itertools
import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models

from smelt.decode import _constraint
from smelt.decode._constraint import checked, pieces, regular, schema
from smelt.model._tiny import tiny_tokenizer
from smelt.spec import SmeltError

LETTERS = "abé"


def needs_library():
    pytest.importorskip("llguidance")


def pattern(random_: random.Random, depth: int) -> tuple[str, set[str]]:
    """(a regular expression, every text it matches)."""
    kind = random_.choice(["letter", "letter", "or", "and", "and", "times", "maybe"]) if depth else "letter"
    if kind == "letter":
        letter = random_.choice(LETTERS)
        return letter, {letter}
    a, said = pattern(random_, depth - 1)
    if kind == "maybe":
        return f"({a})?", said | {""}
    if kind == "times":
        return f"({a}){{1,2}}", said | {x + y for x in said for y in said}
    b, other = pattern(random_, depth - 1)
    return (f"({a}|{b})", said | other) if kind == "or" else (f"({a})({b})", {x + y for x in said for y in other})


def expected(language: set[bytes], text: bytes) -> str:
    if not any(word.startswith(text) for word in language):
        return "dead"
    if text not in language:
        return "viable"
    return "complete" if any(word.startswith(text) and word != text for word in language) else "final"


def function(language: set[str]):
    def check(text: str) -> str:
        return expected({word.encode() for word in language}, text.encode())

    return check


def walk(state, text: bytes, cuts: list[int]) -> str:
    """The verdict behind `text`, read in pieces."""
    for start, stop in itertools.pairwise([0, *cuts, len(text)]):
        if start < stop:
            if not state.allows(text[start:stop]):
                return "dead"
            state = state.after(text[start:stop])
    return state.verdict


def unasked(language: set[bytes], text: bytes) -> str:
    """What a function can tell: inside a character it is not asked, so what is whole decides."""
    whole = text.decode(errors="ignore").encode()
    half = text.startswith(whole) and text[len(whole) :] == b"\xc3"
    return expected(language, text) if not half else "viable" if expected(language, whole) in ("viable", "complete") else "dead"


def compare(make, expected, tries: int) -> None:
    random_ = random.Random(5)
    seen = set()
    for _ in range(tries):
        regex, said = pattern(random_, 4)
        language = {word.encode() for word in said}
        state = make(regex, said)
        texts = {word[:i] for word in random_.sample(sorted(language), min(6, len(language))) for i in range(len(word) + 1)}
        texts |= {text + more for text in list(texts)[:10] for more in (b"a", "é".encode(), b"\xc3", b"\xa9", b"\xff", b"c")}
        for text in texts:
            cuts = sorted(random_.sample(range(len(text) + 1), min(2, len(text))))
            seen.add(expected(language, text))
            assert walk(state, text, cuts) == expected(language, text), (regex, text, cuts)
    assert seen == {"dead", "viable", "complete", "final"}


def test_regular_expressions_against_every_text_they_match():
    needs_library()
    compare(lambda regex, said: regular(f"({regex})"), expected, 60)


def test_a_function_against_every_text_it_allows():
    compare(lambda regex, said: checked(function(said)), unasked, 60)


def test_a_function_sees_whole_characters_once():
    asked: list[str] = []

    def check(text: str) -> str:
        asked.append(text)
        return "complete"

    state = checked(check)
    half = state.after("é".encode()[:1])
    assert state.verdict == "complete" and half.verdict == "viable" and asked == [""]
    assert not half.allows(b"a") and half.allows("é".encode()[1:] + b"a") and not state.allows(b"\xa9")
    assert half.after("é".encode()[1:] + b"a").verdict == "complete"
    assert asked == ["", "éa"]


def test_states_are_not_changed():
    needs_library()
    state = regular("ab|ac")
    first = state.after(b"a")
    assert first.after(b"b").verdict == first.after(b"c").verdict == "final"
    assert state.verdict == first.verdict == "viable" and state.allows(b"ab") and not first.allows(b"ab")


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize("where", ["inline", "file"])
def test_schema(where, tmp_path):
    needs_library()
    given = json.dumps(SCHEMA)
    if where == "file":
        (tmp_path / "s.json").write_text(given)
        given = str(tmp_path / "s.json")
    state = schema(given)
    assert state.verdict == "viable"
    for text, verdict in {
        '{"n": 12}': "final",
        '{ "n":-1 }': "final",
        '{"n": 1': "viable",
        '{"m"': "dead",
        '{"n": "': "dead",
        "[": "dead",
    }.items():
        assert walk(state, text.encode(), [1, 3]) == verdict, text


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(SmeltError, match="cannot be read"):
        schema(str(tmp_path / "none.json"))
    with pytest.raises(SmeltError, match="is not JSON"):
        schema('{"type":')
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(SmeltError, match="is a list"):
        schema(str(tmp_path / "list.json"))
    with pytest.raises(SmeltError, match="empty text"):
        checked(lambda text: "dead")
    with pytest.raises(SmeltError, match="did you mean 'viable'"):
        checked(lambda text: "viabel")
    with pytest.raises(SmeltError, match="not allowed"):
        checked(function({"ab"})).after(b"b")


def test_what_the_library_refuses():
    needs_library()
    for make, given in ((regular, "[0-9"), (regular, "(?=a)b"), (schema, '{"type": "objec"}')):
        with pytest.raises(SmeltError, match="cannot be used"):
            make(given)
    with pytest.raises(SmeltError, match="no text satisfies"):
        regular(r"a[^\s\S]b")


def test_without_the_library(monkeypatch):
    import sys

    _constraint._bytes.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    try:
        with pytest.raises(SmeltError, match=r"smelt\[grammar\]"):
            regular("a")
    finally:
        _constraint._bytes.cache_clear()


TEXT = "def f(x):\n\treturn 'né €😀' + \"\x00\x7f\xad\" # ¡¢\r\n"


def test_pieces_spell_the_text():
    tokenizer = tiny_tokenizer()
    found = pieces(tokenizer, 320)
    ids = tokenizer(TEXT)["input_ids"]
    assert b"".join(found[i] for i in ids) == TEXT.encode()
    assert len(found) == 320 and found[tokenizer.eos_token_id] is None and set(found[len(tokenizer) :]) == {None}
    assert {bytes([i]) for i in range(256)} <= set(found)


class Wrapped:
    """What `pieces` reads of a tokenizer."""

    all_special_ids = (0,)

    def __init__(self, vocab: dict[str, int], decoder):
        self.backend_tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
        if decoder is not None:
            self.backend_tokenizer.decoder = decoder
            self.backend_tokenizer.add_tokens(["<é>"])


def test_sentencepiece():
    words = {"<s>": 0, "▁a": 1, "b▁": 2, "<0x0A>": 3, "<0xC3>": 4, "é": 5}
    steps = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert pieces(Wrapped(words, steps), 8) == [None, b" a", b"b ", b"\n", b"\xc3", "é".encode(), "<é>".encode(), None]


def test_tokens_that_are_no_bytes_are_refused():
    with pytest.raises(SmeltError, match="WordPiece"):
        pieces(Wrapped({"<s>": 0}, decoders.WordPiece()), 2)
    for tokenizer in (None, Wrapped({"<s>": 0}, None)):
        with pytest.raises(SmeltError, match="which bytes"):
            pieces(tokenizer, 2)
