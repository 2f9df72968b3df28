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
from smelt.rank._training import Labelled, shuffled
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


# learning

LISTS = [
    Labelled("times three", PASSAGES[:4], [1.0, 3.0, 0.0, 2.0]),
    Labelled("alpha", ["a b", "c", "d e f"], [5.0, 1.0, 2.0]),
    Labelled("beta", ["x", "y y", "z", "w"], [1.0, 0.0, 0.0, 0.5]),
]


@pytest.fixture(scope="module")
def both():
    """A tokenizer that has " A" as a token, so that both styles can be read."""
    return Loaded(tiny("qwen3", context=1024), byte_level_bpe(["Order: A B C D E F Passage A: x\n"] * 50, 320, 256), None)


@pytest.mark.parametrize("identifiers", ["bracket", "space"])
@pytest.mark.parametrize("ranknet", [0.0, 10.0])
def test_the_loss_is_that_of_the_written_order_and_of_the_letters_that_are_read(both, identifiers, ranknet):
    """Each list by hand: the prompt and the answer as one text, token by token, and the scores that reading gives."""
    judge = FirstToken(identifiers=identifiers, ranknet=ranknet)
    lost = judge.loss(both.model, None, judge.collate(LISTS, both, 600))
    assert lost.shape == (3,) and lost.dtype == torch.float32 and judge.heads(both.model.config) is None
    for found, one in zip(lost, map(shuffled, LISTS), strict=True):
        asked = Asked(one.query, one.passages)
        prompt, n = judge.prompt(asked, both, 1024), len(one.passages)
        best = sorted(range(n), key=lambda i: -one.grades[i])
        written = "] > [".join("ABCDEF"[i] for i in best) + "]" if identifiers == "bracket" else " > ".join("ABCDEF"[i] for i in best)
        answer = both.tokenizer(written if identifiers == "bracket" else " " + written)["input_ids"]
        logits = both.model(torch.tensor([prompt + answer])).logits[0].float()
        expected = -sum(logits[len(prompt) - 1 + t].log_softmax(-1)[token] for t, token in enumerate(answer)) / len(answer)
        scores = judge.scores([asked], both)[0]
        for i in range(n):
            for j in range(n):
                if one.grades[i] > one.grades[j]:
                    weight = ranknet * 2 / (n * (n - 1)) / (best.index(i) + best.index(j) + 2)
                    expected = expected + weight * torch.log1p((scores[j] - scores[i]).exp())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("identifiers", ["bracket", "space"])
@pytest.mark.parametrize("ranknet", [0.0, 10.0])
def test_thirty_steps_teach_the_order_of_the_trained_lists(both, identifiers, ranknet):
    """The whole order with RankNet; the text alone teaches the first place at least."""
    loaded, judge = both._replace(model=tiny("qwen3", context=1024)), FirstToken(identifiers=identifiers, ranknet=ranknet)
    batch = judge.collate(LISTS, loaded, 600)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=5e-3)
    loaded.model.train()
    losses = []
    for _ in range(30):
        loss = judge.loss(loaded.model, None, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    loaded.model.eval()
    assert losses[-1] < 0.3 * losses[0], losses
    shown = [shuffled(one) for one in LISTS]
    found = order(judge, [Asked(one.query, one.passages) for one in shown], loaded)
    best = [sorted(range(len(one.grades)), key=lambda i: -one.grades[i]) for one in shown]
    assert [f[0] for f in found] == [b[0] for b in best]
    if ranknet:
        places = zip(found, shown, strict=True)
        assert all([one.grades[i] for i in f] == sorted(one.grades, reverse=True) for f, one in places)


def test_training_keeps_to_the_context_and_to_the_letters(small):
    long = [Labelled("q " * 50, ["word " * 300] * 4, [3.0, 2.0, 1.0, 0.0])]
    assert 250 < FirstToken().collate(long, small, 300)["ids"].shape[1] <= 300
    with pytest.raises(SmeltError, match="take a smaller window"):
        FirstToken().collate(long, small, 60)
    with pytest.raises(SmeltError, match="letters name at most 26 passages, and a list has 27"):
        FirstToken().collate([Labelled("q", ["p"] * 27, [0.0] * 27)], small, 1024)


def test_recipe_text_and_ranges():
    assert text(parse("first_token(words=40)", "rank")) == "first_token(words=40)"
    check(FirstToken())
    for bad in ("first_token(words=0)", "first_token(identifiers='brackets')", "first_token(ranknet=-1.0)"):
        with pytest.raises(SmeltError):
            parse(bad, "rank")
