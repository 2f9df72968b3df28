from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from helpers.rank import LISTS, loaded, right, taught
from smelt.model._load import Loaded, load, save
from smelt.model._tiny import tiny, tiny_tokenizer
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
    trained = [
        f"{loss}, {arm}" for loss in ("margins", "vectors") for arm in ("multi-exit, exit 1", "multi-exit, exit 2", "last only, exit 2")
    ]
    trained.append("vectors, last only, exit 2, asked by the teacher")
    assert trained == [name for name, row in rows.items() if len(row["rerank"]["seeds"]) == 2]
    means = [name.replace(", exit", ", mean weights, exit") for name in trained]
    assert set(rows) == {
        "teacher", "teacher, 24 tokens", "untrained, exit 1", "untrained, exit 2", *trained, *means, "BM25", "oracle", "random order",
    }  # fmt: skip
    assert rows["teacher"]["rerank"]["kept"] == [1.0, 1.0, 1.0]
    for row in rows.values():
        assert 0 <= row["rerank"]["ndcg10"] <= rows["oracle"]["rerank"]["ndcg10"] <= 1
        assert all(len(seed) == 4 for task in benchmark.TASKS for seed in row[task]["samples"])
    assert all(len(samples) == 2 for samples in results["passages_per_second"].values())
    assert "last only" in capsys.readouterr().out


def test_the_mean_of_the_seeds_is_that_of_each_tensor(tmp_path):
    places = [tmp_path / str(seed) for seed in range(3)]
    for seed, place in enumerate(places):
        save(tiny("bert", seed=seed), tiny_tokenizer(), place)
    folder = distilling().averaged(places, tmp_path)
    assert folder == distilling().averaged(places, tmp_path)
    parts = [load(place).model.state_dict() for place in places]
    for name, value in load(folder).model.state_dict().items():
        torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).mean(0))


def test_the_benchmarks_student_is_the_teachers_layers(tmp_path):
    benchmark, teacher = distilling(), loaded("bert", layers=4)
    student = load(benchmark.cut(teacher, (0, 3), tmp_path / "student"))
    assert student.model.config.num_hidden_layers == 2 and teacher.model.config.num_hidden_layers == 4
    kept = teacher.model.encoder.layer
    for mine, its in zip(student.model.encoder.layer, (kept[0], kept[3]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), its.parameters(), strict=True))
    first = [parse("embedding(layer=1)", "rank").embed(["x = 1"], one) for one in (teacher, student)]
    torch.testing.assert_close(*first)


def test_the_benchmarks_student_keeps_the_neurons_that_write_most(tmp_path):
    """With the other neurons' outputs made zero the student is the teacher; and those are the ones it leaves out."""
    benchmark, teacher = distilling(), loaded("bert", layers=4)
    layers, drop = [teacher.model.encoder.layer[at] for at in (0, 3)], torch.arange(0, teacher.model.config.intermediate_size, 4)
    with torch.no_grad():
        for layer in layers:
            layer.output.dense.weight[:, drop] = 0
    texts = ["import os", "def f(x):\n    return x + 1", "class A: pass"]
    student = load(benchmark.cut(teacher, (0, 3), tmp_path / "student", 0.75, texts))
    same = load(benchmark.cut(teacher, (0, 3), tmp_path / "whole"))
    assert student.model.config.intermediate_size * 4 == teacher.model.config.intermediate_size * 3
    torch.testing.assert_close(*[Embedding().embed(texts, one) for one in (student, same)])
