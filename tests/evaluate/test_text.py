from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smelt.data.stdlib import Stdlib
from smelt.evaluate._text import CHARACTERS, choose, encode, prompt, room
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError

TEXT = "def naïve(数学):\n    return '🙂'  # x\n"


def test_a_token_of_a_byte_level_tokenizer_has_as_many_bytes_as_it_writes(tokenizer):
    found = encode(tokenizer, TEXT)
    alphabet = {**{c: c for c in range(33, 127)}, **{c: c for c in range(161, 173)}, **{c: c for c in range(174, 256)}}
    others = [b for b in range(256) if b not in alphabet]
    written = {chr(c): b for c, b in alphabet.items()} | {chr(256 + i): b for i, b in enumerate(others)}
    raw = [bytes(written[c] for c in token) for token in tokenizer.convert_ids_to_tokens(found.ids[1:])]
    assert b"".join(raw).decode() == TEXT
    assert found.bytes.tolist() == [0, *map(len, raw)]
    assert found.start == 1 and found.ids[0] == tokenizer.bos_token_id


def test_other_tokenizers_share_out_all_bytes_by_where_tokens_end():
    vocabulary = {"[UNK]": 0, **{word: i for i, word in enumerate(TEXT.split(), 1)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = encode(PreTrainedTokenizerFast(tokenizer_object=words), TEXT)
    assert found.start == 0 and len(found.ids) == len(TEXT.split())
    assert found.bytes.sum() == len(TEXT.encode())
    assert found.bytes.tolist()[:3] == [3, len(" naïve(数学):".encode()), len("\n    return")]


def test_the_whole_of_stdlib_is_counted_exactly(tokenizer):
    for document in choose(Stdlib(), 20_000, 1_000):
        assert encode(tokenizer, document.text).bytes.sum() == len(document.text.encode())


def test_a_tokenizer_without_offsets_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(SmeltError, match="fast tokenizer"):
        encode(Slow(), "x")


@pytest.mark.parametrize("tokens, document", [(50, 20), (200, 60), (333, 1000), (10_000, 40)])
def test_a_choice_keeps_its_budget_and_its_line_ends(made, tokens, document):
    corpus = made(count=40)
    chosen = choose(corpus, tokens, document)
    whole = dict(corpus.documents("test"))
    sizes = [len(d.text) for d in chosen]
    assert sum(sizes) <= CHARACTERS * tokens and max(sizes) <= CHARACTERS * document
    for d in chosen:
        assert whole[d.name].startswith(d.text)
        assert d.text.endswith("\n") or len(d.text) == min(CHARACTERS * document, CHARACTERS * tokens) or d is chosen[-1]
    assert len({d.name for d in chosen}) == len(chosen)
    available = sum(min(len(t), CHARACTERS * document) for t in whole.values())
    longest_line = max(len(line) for t in whole.values() for line in t.splitlines(True))
    assert sum(sizes) >= min(CHARACTERS * tokens, available - 40 * longest_line) - longest_line


def test_a_choice_spreads_and_does_not_depend_on_the_order(made):
    names = [d.name for d in choose(made(count=200), 1000, 50)]
    places = sorted(int(n.removesuffix(".py")) for n in names)
    assert len(places) >= 20 and places[0] < 40 and places[-1] >= 160 and np.mean(np.diff(places)) > 2
    assert names == [d.name for d in choose(made(count=200, backwards=True), 1000, 50)]
    assert {n for n in names if int(n.removesuffix(".py")) < 100} <= {d.name for d in choose(made(count=100), 1000, 50)}


def test_the_corpus_is_read_once_for_all_variants(made):
    read = []

    class Counted(made):
        def documents(self, split):
            read.append(split)
            return super().documents(split)

    corpus = Counted(seed=7)
    assert choose(corpus, 100, 50) is choose(corpus, 100, 50)
    assert read == ["test"]


def test_an_empty_split_is_refused(made):
    with pytest.raises(SmeltError, match="test split"):
        choose(made(count=0), 10, 10)


def test_a_prompt_is_real_text_of_the_length_asked_for(variant, made):
    ids = prompt(variant, 300)
    assert len(ids) == 300 and ids == prompt(variant, 400)[:300]
    text = variant.tokenizer.decode(ids[1:60]).rstrip("\ufffd")
    assert len(text) > 50 and any(d.text.startswith(text) for d in made().documents("test"))
    variant.data = made(count=1, lines=1)
    with pytest.raises(SmeltError, match="a prompt of 500"):
        prompt(variant, 500)


def test_room_ends_with_the_positions_of_the_model():
    model = tiny("llama", context=64)
    assert [room(model, n) for n in (8, 64, 65)] == [8, 64, 64]
    assert tiny_tokenizer().is_fast
