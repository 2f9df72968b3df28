"""The helper smelt/rank/_prompt.py."""

import pytest

from smelt.model._tiny import tiny_tokenizer
from smelt.rank._prompt import BRACKET, SPACE, WRITTEN, chat, clean, encode, fit, listwise
from smelt.spec import SmeltError


def test_clean():
    assert clean("  a\n b\t[B] x[12] [AB] ", 99) == "a b (B) x(12) [AB]"
    assert clean("a b c d", 2) == "a b"
    assert clean("", 3) == ""


@pytest.mark.parametrize("style", [BRACKET, SPACE, WRITTEN])
def test_prompt_names_every_passage_once_and_the_query_twice(style):
    text = listwise("the-query", ["one", "two", "three"], "ABC", style, None)
    assert text.count("the-query") == 2
    assert text.index("the-query") < text.index("one") < text.index("three") < text.rindex("the-query")
    for name, passage in zip("ABC", ["one", "two", "three"], strict=True):
        assert text.count(style.line.format(id=name, text=passage) + "\n") == 1
    assert text.endswith(style.ending) and style.form in text


def test_a_chat_template_is_used_when_there_is_one():
    tokenizer = tiny_tokenizer()
    assert chat(tokenizer) is None
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    text = listwise("q", ["p"], "A", BRACKET, chat(tokenizer))
    assert text.startswith("<user>Below") and text.endswith("</><assistant>Order: [")


def test_encode_drops_what_the_tokenizer_closes_with():
    tokenizer = tiny_tokenizer()

    class Closing:
        all_special_ids = tokenizer.all_special_ids

        def __call__(self, text, add_special_tokens, verbose):
            ids = tokenizer(text)["input_ids"]
            return {"input_ids": [0, *ids, 0] if add_special_tokens else ids}

    plain = tokenizer("Order: [")["input_ids"]
    assert encode(Closing(), "Order: [", False) == [0, *plain]
    assert encode(Closing(), "Order: [", True) == plain


def test_fit_keeps_the_most_words_there_is_room_for():
    def build(words):
        return [0] * (10 + 3 * words)

    for room in range(13, 60):
        assert len(fit(build, 12, room, "texts")) == max(10 + 3 * w for w in range(1, 13) if 10 + 3 * w <= room)
    with pytest.raises(SmeltError, match=r"need 13 tokens .* reads 12; take a smaller window"):
        fit(build, 12, 12, "texts")
