from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Asked
from smelt.rank._training import Labelled
from smelt.rank.pointwise import Pointwise, binary, softmax
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

ASKED = [Asked("import os", ["os.listdir('.')", "", "x + 1", "word " * 400]), Asked("def f(x):", ["return x"]), Asked("", ["a", "b"])]
LISTS = [
    Labelled("import os", ["os.listdir('.')", "x + 1"], [1, 0]),
    Labelled("def f(x):", ["return x + 1", "print(name)", "pass"], [1, 0, 0]),
    Labelled("class A:", ["pass # A", "import os"], [1, 0]),
]
YES_NO = Pointwise(read="yes_no", yes="+", no="-", length=200)


def loaded(**more):
    return Loaded(tiny("llama", context=512, **more), tiny_tokenizer(), None)


def cross_encoder(labels=1, architecture="bert"):
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 256, "initializer_range": 0.1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    config = (BertConfig if architecture == "bert" else LlamaConfig)(**sizes, num_labels=labels)
    torch.manual_seed(0)
    return Loaded(AutoModelForSequenceClassification.from_config(config).eval(), tiny_tokenizer(), None)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_likelihood_is_a_loop_over_the_query(architecture):
    model = Loaded(tiny(architecture, context=512), tiny_tokenizer(), None)
    judge, tokenizer = Pointwise(length=300, bridge=" # "), tiny_tokenizer()
    for asked, scores in zip(ASKED, judge.scores(ASKED, model), strict=True):
        for passage, score in zip(asked.passages, scores, strict=True):
            query, between = tokenizer(asked.query)["input_ids"], tokenizer(" # ")["input_ids"]
            left = 300 - 1 - len(between) - len(query)
            head = [tokenizer.bos_token_id, *tokenizer(passage)["input_ids"][:left], *between]
            with torch.no_grad():
                said = model.model(torch.tensor([head + query])).logits[0].double().log_softmax(-1)
            each = [float(said[len(head) + i - 1, token]) for i, token in enumerate(query)]
            assert float(score) == pytest.approx(sum(each) / max(1, len(each)), abs=1e-4)


def test_yes_no_is_the_log_odds_at_the_end_of_the_question():
    model, tokenizer = loaded(), tiny_tokenizer()
    (scores,) = YES_NO.scores([Asked("import os", ["x + 1", "os"])], model)
    yes, no = tokenizer("+")["input_ids"][0], tokenizer("-")["input_ids"][0]
    for passage, score in zip(["x + 1", "os"], scores, strict=True):
        prompt = ["Passage: ", passage, "\nQuery: ", "import os", "\nDoes the passage answer the query?\nAnswer:"]
        ids = [i for part in prompt for i in tokenizer(part)["input_ids"]]
        with torch.no_grad():
            said = model.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        assert float(score) == pytest.approx(float(said[yes] - said[no]), abs=1e-4)


def test_a_long_passage_leaves_the_query_and_the_question_whole():
    model, tokenizer = loaded(), tiny_tokenizer()
    (row,), _ = YES_NO.rows([("import os", "word " * 900)], model, 200)
    assert len(row.ids) == 200 and tokenizer.decode(row.ids).endswith("\nQuery: import os\nDoes the passage answer the query?\nAnswer:")
    (row,), _ = Pointwise().rows([("q " * 900, "word " * 900)], model, 101)
    assert len(row.ids) == 101 and row.stop - row.first == len(tokenizer("q " * 49 + " q")["input_ids"][:49])


def test_a_chat_template_is_used_when_there_is_one():
    plain = tiny_tokenizer()
    tokenizer = type(plain)(tokenizer_object=plain.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}<it>{% endif %}"
    (row,), _ = YES_NO.rows([("\ue000 ask", "tell \ue001")], Loaded(loaded().model, tokenizer, None), 200)
    assert tokenizer.decode(row.ids) == "<Passage: tell \ue001\nQuery: \ue000 ask\nDoes the passage answer the query?><it>Answer:"


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("labels", [1, 2])
def test_the_head_of_a_cross_encoder_reads_the_pair(architecture, labels):
    model, judge = cross_encoder(labels, architecture), Pointwise(read="head", length=64)
    for asked, scores in zip(ASKED[:2], judge.scores(ASKED[:2], model), strict=True):
        for passage, score in zip(asked.passages, scores, strict=True):
            given = tiny_tokenizer()(asked.query, passage, truncation="longest_first", max_length=64, return_tensors="pt")
            with torch.no_grad():
                logits = model.model(input_ids=given["input_ids"]).logits[0]
            assert float(score) == pytest.approx(float(logits[0] if labels == 1 else logits[1] - logits[0]), abs=1e-4)
    with pytest.raises(SmeltError, match="3 labels; one or two are a score"):
        judge.scores(ASKED[:1], cross_encoder(3))


def test_the_segments_of_a_pair_are_read():
    model = cross_encoder()

    class Pairs:
        eos_token_id, unk_token_id = 0, None

        def __call__(self, first, second, truncation, max_length, verbose):
            parts = [(tiny_tokenizer()(a)["input_ids"], tiny_tokenizer()(b)["input_ids"]) for a, b in zip(first, second, strict=True)]
            return {"input_ids": [a + b for a, b in parts], "token_type_ids": [[0] * len(a) + [1] * len(b) for a, b in parts]}

    pair = Loaded(model.model, Pairs(), None)
    (found,) = Pointwise(read="head").scores([Asked("x + 1", ["import os", "y"])], pair)
    a, b = tiny_tokenizer()("x + 1")["input_ids"], tiny_tokenizer()("import os")["input_ids"]
    with torch.no_grad():
        wanted = model.model(input_ids=torch.tensor([a + b]), token_type_ids=torch.tensor([[0] * len(a) + [1] * len(b)])).logits[0, 0]
    assert float(found[0]) == pytest.approx(float(wanted), abs=1e-5)


def test_losses_are_loops():
    scores = torch.randn(5, 4)
    keep, good = torch.rand(5, 4) > 0.3, torch.rand(5, 4) > 0.5
    keep[:, 0] = good[:, 0] = True
    good &= keep
    for row in range(5):
        s = [float(x) for x in scores[row]]
        inside = [i for i in range(4) if keep[row, i]]
        total = sum(math.exp(s[i]) for i in inside)
        wanted = -math.log(sum(math.exp(s[i]) for i in inside if good[row, i]) / total)
        assert float(softmax(scores, good, keep)[row]) == pytest.approx(wanted, abs=1e-5)
        each = [-math.log(1 / (1 + math.exp(-s[i] if good[row, i] else s[i]))) for i in inside]
        assert float(binary(scores, good, keep)[row]) == pytest.approx(sum(each) / len(each), abs=1e-5)


@pytest.mark.parametrize(
    "judge",
    [Pointwise(), Pointwise(objective="binary", read="yes_no", yes="+", no="-"), YES_NO, Pointwise(read="head", objective="binary")],
    ids=["likelihood", "yes_no binary", "yes_no", "head"],
)
def test_training_makes_the_loss_fall_and_the_lists_right(judge):
    model = cross_encoder() if judge.read == "head" else loaded()
    batch = judge.collate(LISTS, model, 600)
    assert batch["ids"].shape[0] == 9 and batch["words"].shape == (9, 2)
    model.model.train()
    optimizer, losses = torch.optim.AdamW(model.model.parameters(), lr=1e-3), []
    for _ in range(30):
        loss = judge.loss(model.model, None, batch)
        assert loss.shape == (3,) and loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    model.model.eval()
    assert losses[-1] < 0.5 * losses[0]
    assert [a.order[0] for a in judge.answers([Asked(one.query, one.passages) for one in LISTS], model)] == [0, 0, 0]


def test_a_trained_score_is_the_one_asked_for():
    """collate and loss read what scores reads: the softmax of the scores is the loss."""
    for judge, model in ((Pointwise(), loaded()), (YES_NO, loaded()), (Pointwise(read="head"), cross_encoder())):
        scores = judge.scores([Asked(one.query, one.passages) for one in LISTS], model)
        with torch.no_grad():
            found = judge.loss(model.model, None, judge.collate(LISTS, model, 1000))
        torch.testing.assert_close(found, torch.stack([-s.log_softmax(-1)[0] for s in scores]), atol=1e-4, rtol=1e-4)


def test_errors():
    with pytest.raises(SmeltError, match=r"' yes' is not one token of its own .* yes=' True'"):
        Pointwise(read="yes_no").scores([Asked("x", ["y"])], loaded())
    with pytest.raises(SmeltError, match="not one token of its own"):
        Pointwise(read="yes_no", yes="+", no="+").scores([Asked("x", ["y"])], loaded())
    with pytest.raises(SmeltError, match="needs a decoder"):
        Pointwise().scores([Asked("x", ["y"])], Loaded(tiny("bert"), tiny_tokenizer(), None))
    with pytest.raises(SmeltError, match="needs a sequence-classification model and was given LlamaForCausalLM"):
        Pointwise(read="head").scores([Asked("x", ["y"])], loaded())
    method = parse("pointwise(read='yes_no', objective='binary', yes=' True', no=' False')", "rank")
    assert text(method) == "pointwise(read='yes_no', objective='binary', yes=' True', no=' False')"
    check(method)
