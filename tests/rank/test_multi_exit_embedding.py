from __future__ import annotations

import argparse
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from helpers.rank import LISTS, loaded, right, taught
from smelt.journal import Journal
from smelt.model._load import Loaded, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Asked
from smelt.rank.embedding import Embedding
from smelt.rank.margin_mse import MarginMSE
from smelt.rank.multi_exit_embedding import MultiExitEmbedding
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("inner", [Embedding(), MarginMSE()])
def test_the_loss_is_the_weighted_sum_of_each_exit_alone(architecture, inner):
    """Each exit computed by the judge itself on a model read only so far."""
    model = loaded(architecture, layers=4)
    judge = MultiExitEmbedding(judge=inner, exits=(4, 1, 3))
    batch = judge.collate(LISTS, model, 200)
    with torch.no_grad():
        wanted = torch.zeros(3)
        for k, layer in enumerate((1, 3, 4), 1):
            ((q, p),) = inner.tower().pairs(model.model, batch, (layer,))
            wanted = wanted + k / 3 * inner.objective(q, p, batch)
        torch.testing.assert_close(judge.loss(model.model, None, batch), wanted, atol=1e-4, rtol=1e-4)


def test_one_exit_at_the_end_is_the_judge():
    model, judge = loaded(layers=3), MultiExitEmbedding(exits=(3,))
    batch = judge.collate(LISTS, model, 200)
    with torch.no_grad():
        torch.testing.assert_close(judge.loss(model.model, None, batch), Embedding().loss(model.model, None, batch))


@pytest.mark.parametrize("exit", [None, 1, 2, 4])
def test_it_is_read_at_its_exit_as_the_truncated_model(exit):
    model, texts = loaded(layers=4), ["import os", "x + 1", ""]
    found = MultiExitEmbedding(exits=(1, 2, 4), exit=exit).embed(texts, model)
    torch.testing.assert_close(found, Embedding(layer=exit).embed(texts, model))
    short = tiny("llama", layers=exit or 4)
    short.load_state_dict({k: v for k, v in model.model.state_dict().items() if k in short.state_dict()})
    torch.testing.assert_close(found, Embedding().embed(texts, Loaded(short, model.tokenizer, None)), atol=1e-5, rtol=1e-4)


def test_layers_behind_the_exit_are_not_computed():
    model = loaded(layers=4)
    calls = []
    for at, block in enumerate(model.model.model.layers):
        block.register_forward_hook(lambda *_, at=at: calls.append(at))
    MultiExitEmbedding(exit=2).embed(["import os"], model)
    assert calls == [0, 1]


def test_training_makes_every_exit_right():
    model = loaded(layers=4)
    judge = MultiExitEmbedding()
    assert judge.places(model.model) == (1, 2, 3, 4)
    _, losses = taught(judge, model)
    assert losses[-1] < 0.5 * losses[0]
    assert all(right(MultiExitEmbedding(exit=e), model) for e in (1, 2, 3, 4))


def test_settings_and_errors():
    method = parse("multi_exit_embedding(judge=margin_mse(), exits=(2, 4, 8), exit=4)", "rank")
    assert text(method) == "multi_exit_embedding(judge=margin_mse(), exits=(2, 4, 8), exit=4)"
    check(method)
    with pytest.raises(SmeltError, match="exit=3 is none of the exits"):
        MultiExitEmbedding(exits=(2, 4), exit=3)
    with pytest.raises(SmeltError, match="cannot be read at several depths"):
        MultiExitEmbedding(judge=MultiExitEmbedding())
    with pytest.raises(SmeltError, match="leave layer out"):
        MultiExitEmbedding(judge=Embedding(layer=2))
    with pytest.raises(SmeltError, match="after layer 9, but the model has 2"):
        MultiExitEmbedding(exits=(9,)).embed(["x"], loaded())
    with pytest.raises(SmeltError, match="exit=3, but the model has 2 layers"):
        MultiExitEmbedding(exit=3).embed(["x"], loaded())


def distilling():
    place = Path(__file__).parents[2] / "benchmarks" / "distill_embedder.py"
    spec = importlib.util.spec_from_file_location("distill_embedder", place)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_benchmark_runs(tmp_path, capsys):
    benchmark = distilling()
    assert benchmark.main(["--quick", "--json", str(tmp_path / "found.json")]) == 0
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    rows = {row["row"]: row for row in results["rows"]}
    assert set(rows) == {
        "teacher", "teacher, 24 tokens", "truncated, exit 1", "truncated, exit 2", "multi-exit, exit 1", "multi-exit, exit 2",
        "last only, exit 2", "BM25", "oracle", "random order",
    }  # fmt: skip
    trained = [name for name, row in rows.items() if len(row["rerank"]["seeds"]) == 2]
    assert trained == ["multi-exit, exit 1", "multi-exit, exit 2", "last only, exit 2"]
    assert rows["teacher"]["rerank"]["kept"] == [1.0, 1.0, 1.0]
    for row in rows.values():
        assert 0 <= row["rerank"]["ndcg10"] <= rows["oracle"]["rerank"]["ndcg10"] <= 1
        assert all(len(seed) == 4 for task in benchmark.TASKS for seed in row[task]["samples"])
    assert all(len(samples) == 2 for samples in results["passages_per_second"].values())
    assert "last only" in capsys.readouterr().out


def test_the_benchmark_grades_once(tmp_path, monkeypatch):
    benchmark = distilling()
    teacher, file = loaded("bert"), tmp_path / "lists.jsonl"
    corpus = "code_pairs(corpus=stdlib(packages=('json',)), passages=3)"
    count = benchmark.graded(teacher, corpus, 16, file)
    monkeypatch.setattr(benchmark, "ask", None)
    assert benchmark.graded(teacher, corpus, 16, file) == count > 3
    judge = parse("embedding(length=16)", "rank")
    for line in file.read_text().splitlines():
        row = json.loads(line)
        (scores,) = judge.scores([Asked(row["query"], row["passages"])], teacher)
        assert row["grades"] == pytest.approx(scores.tolist(), abs=1e-5) and len(row["passages"]) == 3


def test_the_benchmark_measures_each_exit_and_keeps_it(tmp_path, monkeypatch):
    benchmark = distilling()
    save(tiny("bert"), tiny_tokenizer(), tmp_path / "model")
    model, judge = loaded("bert")._replace(folder=tmp_path / "model"), parse("embedding(normalize=False, length=16)", "rank")
    asked, kept = argparse.Namespace(quick=True, queries=5, candidates=8), Journal(tmp_path / "kept.jsonl")
    found = benchmark.quality(judge, (1, 2), model, asked, kept)
    every, pool = benchmark.functions(), benchmark.searched(asked)
    for exit, figures in zip((1, 2), found):
        short = parse(f"embedding(normalize=False, length=16, layer={exit})", "rank")
        for at, q in enumerate(benchmark.held_out(5)):
            for task, places in (("rerank", list(benchmark.candidates(q, 8))), ("search", list(pool))):
                (scores,) = short.scores([Asked(every[q].query, [every[i].passage for i in places])], model)
                place = 1 + int((scores > scores[places.index(q)] + 1e-4).sum()) if q in places else 99
                assert figures[task][at] == pytest.approx(1 / math.log2(1 + place) if place <= 10 else 0.0)
    monkeypatch.setattr(Embedding, "layers", None)
    assert benchmark.quality(judge, (2, 1), model, asked, kept) == found[::-1]
