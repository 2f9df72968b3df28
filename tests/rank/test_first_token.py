from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model.mistral import byte_level_bpe
from smelt.rank import Asked
from smelt.rank._order import order
from smelt.rank.first_token import FirstToken
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


def ranked(judge, query, passages, model):
    return order(judge, [Asked(query, passages)], model)[0]


PASSAGES = [f"def function_{i}(x):\n    return x * {i}\n" for i in range(6)]


@pytest.fixture(scope="module")
def small():
    return Loaded(tiny("llama", context=1024), tiny_tokenizer(), None)


@pytest.mark.parametrize("identifiers", ["bracket", "space"])
def test_scores_are_the_logits_of_the_letters_after_the_whole_prompt(identifiers):
    """By hand: write the prompt out, run the model on all of it, look the letters up."""
    tokenizer = byte_level_bpe(["Order: A B C D E F Passage A: x\n"] * 50, 320, 256)  # has " A" as one token
    model = tiny("qwen3", context=1024)
    lines = {"bracket": "[{}] {}", "space": "Passage {}: {}"}[identifiers]
    collapsed = [f"def function_{i}(x): return x * {i}" for i in range(6)]
    prompt = "Below are 6 passages, each with its identifier. Query: times three\n\n"
    prompt += "\n".join(lines.format("ABCDEF"[i], collapsed[i]) for i in range(6))
    prompt += "\n\nQuery: times three\nOrder the 6 passages by how well they answer the query, the best first, by identifier alone.\n"
    prompt += {"bracket": "Order: [", "space": "Order:"}[identifiers]
    row = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    lead = " " if identifiers == "space" else ""
    tokens = [tokenizer(lead + letter)["input_ids"] for letter in "ABCDEF"]
    assert all(len(t) == 1 for t in tokens)
    expected = torch.stack([row[t[0]] for t in tokens])

    judge, loaded = FirstToken(identifiers=identifiers), Loaded(model, tokenizer, None)
    assert torch.allclose(judge.scores([Asked("times three", PASSAGES)], loaded)[0], expected, atol=1e-5)
    assert ranked(judge, "times  three\n", PASSAGES, loaded) == sorted(range(6), key=lambda i: -expected[i].item())


class Fixed(torch.nn.Module):
    """A decoder whose every row of logits is `row`."""

    def __init__(self, row):
        super().__init__()
        self.row, self.device, self.reads = row, torch.device("cpu"), []
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=400))

    def can_generate(self):
        return True

    def forward(self, input_ids, **_):
        self.reads.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.row.expand(1, 1, -1))


def fixed(wanted):
    row = torch.full((320,), 9.0)
    for letter, score in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", wanted, strict=False):
        row[tiny_tokenizer()(letter)["input_ids"][0]] = score
    return Loaded(Fixed(row), tiny_tokenizer(), None)


def test_order_is_that_of_the_logits_and_ties_stay_as_given():
    assert ranked(FirstToken(), "q", ["p"] * 5, fixed([0.0, 2.0, 1.0, 2.0, -3.0])) == [1, 3, 2, 0, 4]
    assert ranked(FirstToken(), "q", ["p"] * 26, fixed([1.0] * 26)) == list(range(26))


def test_nothing_to_order_asks_nothing():
    model = fixed([0.0])
    assert ranked(FirstToken(), "q", [], model) == [] and ranked(FirstToken(), "q", ["p"], None) == [0]
    assert model.model.reads == []


def test_long_passages_are_cut_to_fill_the_context():
    model = fixed([0.0, 1.0])
    assert ranked(FirstToken(), "q", ["x " * 290, "y " * 290], model) == [1, 0]
    assert 380 < model.model.reads[0] <= 400
    with pytest.raises(SmeltError, match=r"2 passages and the query need .* and the model reads 400"):
        ranked(FirstToken(), "q", ["x" * 3000, "y"], model)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(SmeltError, match="not finite"):
        ranked(FirstToken(), "q", ["a", "b"], fixed([0.0, float("nan")]))


def test_a_tokenizer_that_joins_bracket_and_letter_is_refused_by_name(small):
    joined = Tokenizer(models.BPE(*_merges("[", "C"), unk_token="?"))
    joined.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joined, unk_token="?")
    with pytest.raises(SmeltError, match=r"'C' after 'Order: \[' is not one token of its own .* try first_token\(identifiers='space'\)"):
        ranked(FirstToken(), "q", PASSAGES, small._replace(tokenizer=tokenizer))
    assert sorted(ranked(FirstToken(), "q", PASSAGES[:2], small._replace(tokenizer=tokenizer))) == [0, 1]  # A and B are in order


def test_a_tokenizer_that_does_not_tell_letters_apart_is_refused_by_name(small):
    words = Tokenizer(models.WordLevel({"?": 0, "A": 1, "[": 2, "Order": 3, ":": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Punctuation()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    with pytest.raises(SmeltError, match=r"'B' after 'Order: .' is not one token of its own"):
        ranked(FirstToken(), "q", PASSAGES[:2], small._replace(tokenizer=tokenizer))


def _merges(left, right):
    letters = ["?", *map(chr, range(33, 127)), left + right]
    return {letter: i for i, letter in enumerate(letters)}, [(left, right)]


def test_a_model_that_is_not_a_decoder_is_refused(small):
    with pytest.raises(SmeltError, match="needs a decoder as its model and was given BertModel"):
        ranked(FirstToken(), "q", PASSAGES, small._replace(model=tiny("bert")))
    with pytest.raises(SmeltError, match="was given none"):
        ranked(FirstToken(), "q", PASSAGES, None)


def test_recipe_text_and_ranges():
    assert text(parse("first_token(words=40)", "rank")) == "first_token(words=40)"
    check(FirstToken())
    for bad in ("first_token(words=0)", "first_token(identifiers='brackets')"):
        with pytest.raises(SmeltError):
            parse(bad, "rank")
