import pytest

from smelt.data import Document
from smelt.decode._given import corpus_of, rows_of
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError

MODEL, TOKENIZER = tiny("llama", context=64), tiny_tokenizer()


class Texts:
    def __init__(self, *texts: str):
        self.texts = texts

    def documents(self, split):
        assert split == "train"
        yield from (Document(str(i), text) for i, text in enumerate(self.texts))


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_rows_are_beginnings_of_documents_up_to_the_budget():
    long, short, middle = "import os\n" * 300, "", "class A:\n    pass\n" * 2
    for budget in (2, 50, 64, 65, 66, 70, 10_000):
        rows = [row[0].tolist() for row in rows_of(Texts(long, short, middle), MODEL, TOKENIZER, budget, "m")]
        left, wanted = budget, []
        for text in (long, short, middle):
            row = ids(text)[: min(64, left)]
            if len(row) >= 2:
                wanted.append(row)
                left -= len(row)
        assert rows == wanted and sum(map(len, rows)) <= budget


def test_what_cannot_be_read_is_said():
    with pytest.raises(SmeltError, match="m: the train split of the data has no document of two tokens"):
        list(rows_of(Texts("", ""), MODEL, TOKENIZER, 9, "m"))
    with pytest.raises(SmeltError, match="m: measuring on text needs the model's tokenizer"):
        list(rows_of(Texts("a b"), MODEL, None, 9, "m"))
    with pytest.raises(SmeltError, match="with 8 tokens, has not"):
        list(rows_of(Texts("import os"), tiny("llama", vocab=8), TOKENIZER, 9, "m"))


def test_a_corpus_by_any_name():
    texts = Texts("a")
    assert corpus_of(texts, "m") is texts
    assert type(corpus_of(None, "m")).__name__ == "Stdlib" == type(corpus_of("stdlib", "m")).__name__
    for bad in (3, Texts, ["stdlib"]):
        with pytest.raises(SmeltError, match=r"m: data: .* is not a corpus"):
            corpus_of(bad, "m")
