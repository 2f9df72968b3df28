from __future__ import annotations

import pytest
import torch

from helpers.rank import loaded
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Asked
from smelt.rank.adapt_llm import AdaptLLM, Question, Reply
from smelt.rank.bm25 import BM25
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

PASSAGES = ["class A: pass", "import os", "return x + 1", "print(name)"]
QUESTIONS = [  # what is known, and what is not
    Question("f or g", ["f"], "class f"),
    Question("import what", ["os", "sys"], "import os"),
    Question("which name", ["name"], "print(name)"),
]


def test_the_rows_of_the_recipe():
    """Known: the answer alone. Unknown: the mark, and the answer from the passage. The first known answer is taught."""
    judge = AdaptLLM()
    known, asks, reads, again = judge.rows([*QUESTIONS[:2], QUESTIONS[1]], ["it is F, I think", "re", "SYS"])[:4]
    assert known == {"prompt": "Question: f or g\nAnswer:", "response": " f"}
    assert asks == {"prompt": "Question: import what\nAnswer:", "response": " <RET>"}
    assert reads == {"prompt": "Text: import os\nQuestion: import what\nAnswer:", "response": " os"}
    assert again == {"prompt": asks["prompt"], "response": " os"}
    assert len(judge.rows(QUESTIONS, ["", "", ""])) == 6 and judge.rows([], []) == []


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_mark_has_the_probability_of_its_tokens(architecture):
    model, judge = loaded(architecture), AdaptLLM(mark="os.x")
    queries = ["import what", "f", "a much longer question than the others are"]
    for query, found in zip(queries, judge.wants(queries, model).tolist(), strict=True):
        ids = model.tokenizer(judge.prompt(query, None), add_special_tokens=False)["input_ids"]
        expected = 1.0
        for token in model.tokenizer(" os.x", add_special_tokens=False)["input_ids"]:
            expected *= float(model.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)[token])
            ids = [*ids, token]
        assert found == pytest.approx(expected, rel=1e-3)
    assert judge.wants([], model).shape == (0,)


def test_the_threshold_decides_query_by_query_and_the_retriever_orders():
    model, queries = loaded(), ["import os", "print(name) f", "class A"]
    chances = AdaptLLM().wants(queries, model).tolist()
    index = AdaptLLM().index(PASSAGES, model)
    plain = BM25().search(index, queries, 2, None)
    for threshold in (0.0, *chances, 1.0):
        found = AdaptLLM(threshold=threshold).search(index, queries, 2, model)
        assert found == [best if p > threshold else [] for p, best in zip(chances, plain, strict=True)]
    asked = [Asked(q, PASSAGES) for q in queries]
    for mine, its in zip(AdaptLLM(threshold=1.0).answers(asked, model), BM25().answers(asked, None), strict=True):
        assert mine.order == its.order


@torch.no_grad()
def test_answers_are_greedy_and_in_company_the_same():
    model, judge = loaded(), AdaptLLM(tokens=6)
    queries, passages = ["import what", "f", "which of all the names"], ["import os", None, "x " * 50]
    for query, passage, found in zip(queries, passages, judge.written(queries, passages, model), strict=True):
        ids = model.tokenizer(judge.prompt(query, passage and " ".join(passage.split())), add_special_tokens=False)["input_ids"]
        said = []
        while len(said) < 6 and (not said or said[-1] != model.tokenizer.eos_token_id):
            said.append(int(model.model(torch.tensor([ids + said])).logits[0, -1].argmax()))
        assert found == model.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_a_model_trained_on_the_rows_asks_for_what_it_did_not_know():
    """The whole recipe: rows from what was said, cross-entropy on the response, then both steps of `reply`."""
    model, judge = loaded(), AdaptLLM(tokens=3)
    passages = [q.passage for q in QUESTIONS]
    rows = judge.rows(QUESTIONS, ["f", "no", "no"])
    model.model.train()
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        for row in rows:
            before, after = (model.tokenizer(row[part], add_special_tokens=False)["input_ids"] for part in ("prompt", "response"))
            ids = torch.tensor([[*before, *after, model.tokenizer.eos_token_id]])
            labels = ids.clone()
            labels[:, : len(before)] = -100
            model.model(ids, labels=labels).loss.backward()
        optimizer.step()
    model.model.eval()
    wanted = judge.wants([q.query for q in QUESTIONS], model)
    assert (wanted > 0.9).tolist() == [False, True, True] and wanted[0] < 0.1
    found = judge.reply([q.query for q in QUESTIONS], passages, model)
    assert found == [Reply("f", None), Reply("os", 1), Reply("name", 2)]
    assert [r.place for r in AdaptLLM(threshold=1.0, tokens=3).reply([q.query for q in QUESTIONS], passages, model)] == [None] * 3


def test_what_is_said_to_be_wrong():
    with pytest.raises(SmeltError, match="searches nothing"):
        AdaptLLM(retriever=3)
    with pytest.raises(SmeltError, match="mark is empty"):
        AdaptLLM(mark=" ")
    with pytest.raises(SmeltError, match="needs a decoder"):
        AdaptLLM().wants(["q"], Loaded(tiny("bert"), tiny_tokenizer(), None))
    with pytest.raises(SmeltError, match="the model reads"):
        AdaptLLM(tokens=20).written(["q"], ["p"], loaded(context=24))
    model = loaded()
    with torch.no_grad():
        model.model.lm_head.weight[5] = torch.nan
    with pytest.raises(SmeltError, match="not finite"):
        AdaptLLM().wants(["q"], model)
    method = parse("adapt_llm(retriever=bm25(split='words'), threshold=0.3)", "rank")
    check(method)
    assert method == AdaptLLM(BM25(split="words"), threshold=0.3) and parse(text(method), "rank") == method
