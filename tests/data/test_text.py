"""clean, fingerprint and split_of."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.data._text import CHUNK, clean, fingerprint, split_of

ANY = st.text(st.characters(), max_size=50)  # lone surrogates among them


@given(ANY)
def test_clean_text_encodes_and_good_text_stays(text):
    clean(text).encode()
    good = text.encode("utf-8", "ignore").decode()
    assert clean(good) == good
    assert len(clean("a" + text + "b")) <= len(text) + 2


def test_a_pair_of_surrogates_becomes_its_character():
    assert clean("\ud83d\ude42 \ud800") == "🙂 \ufffd"


@given(ANY)
@settings(max_examples=50)
def test_fingerprint_is_64_bits_of_blake2b(text):
    expected = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    assert fingerprint(text) == int.from_bytes(expected, "little")
    assert fingerprint(text, spaces=False) == fingerprint("".join(text.split()))


@pytest.mark.parametrize("gap", [CHUNK - 1, CHUNK, CHUNK + 1])
def test_whitespace_is_left_out_across_chunks(gap):
    text = "word " * (gap // 5) + "x" * (gap % 5) + " \n\t tail"
    assert fingerprint(text, spaces=False) == fingerprint("".join(text.split()))
    assert fingerprint(text) != fingerprint(text + " ")


def test_shares_are_met_and_copies_never_part():
    n, validation, test = 20_000, 0.1, 0.03
    found = [split_of(f"document {i}", validation, test) for i in range(n)]
    for split, share in (("validation", validation), ("test", test)):
        spread = (share * (1 - share) / n) ** 0.5
        assert abs(found.count(split) / n - share) < 5 * spread
    assert found == [split_of(f" document\n{i}\t", validation, test) for i in range(n)]


def test_a_larger_share_only_adds():
    texts = [f"document {i}" for i in range(2000)]
    small, large = ({t for t in texts if split_of(t, 0.0, share) == "test"} for share in (0.02, 0.1))
    assert small and small < large
