"""Running recipes: stages as folders, reuse, resume after SIGKILL, lock, full disk, read-only, plain results."""

from __future__ import annotations

import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smelt import pipeline, preflight
from smelt.cli import main
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.recipe import read
from smelt.spec import SmeltError

RECIPE = """\
name: small
model: {model}
data: {data}
stages:
  - weights: minitron(layers=1)
    calibrate: {{rows: 4, context: 32}}
  - distill: [forward_kl(), cross_entropy()]
    train: {{teacher: base, tokens: 4_096, context: 32, batch: 4, save_seconds: 0.2}}
  - cache: sink_window(sinks=2, window=16)
evaluate: [perplexity(tokens=512, document=128, context=64, stride=32, prefill=8, chunk=4), memory]
expect:
  - forward_kl.bits_per_byte <= 100
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    save(tiny("llama", layers=2), tiny_tokenizer(), tmp_path / "tiny")
    words = ["def", "x", "return", "import os", "for name in", "class A:", "pass", "+ 1", "\n"]
    chance = random.Random(0)
    for n in range(40):
        (tmp_path / f"text{n}.txt").write_text(" ".join(chance.choice(words) for _ in range(400)))
    file = tmp_path / "small.yaml"
    file.write_text(RECIPE.format(model=tmp_path / "tiny", data=f"{tmp_path}/text*.txt"))
    return file


def quality(results: dict) -> dict:
    return {v["name"]: {k: m["value"] for k, m in v["metrics"].items() if k != "peak_bytes"} for v in results["variants"]}


def smelt(*arguments: str, **more) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "smelt", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def test_results_are_json_that_anyone_reads(recipe, tmp_path):
    """No NaN and no Infinity, also where a variant is compared with a model that is at zero from itself."""
    changes = {
        "stages": "[{cache: 'sink_window(sinks=2, window=16)'}]",
        "expect": "[]",
        "evaluate": "['agreement(tokens=256, document=64)']",
    }
    pipeline.run(recipe, folder=tmp_path / "runs", overrides=changes)

    def refuse(word):
        raise ValueError(word)

    results = json.loads((tmp_path / "runs" / "small" / "results.json").read_text(), parse_constant=refuse)
    assert {row["metric"] for row in results["ratios"]} >= {"top1_agreement"}


def test_a_recipe_runs_and_is_reused(recipe, tmp_path):
    first = pipeline.run(recipe, folder=tmp_path / "runs")
    root = tmp_path / "runs" / "small"
    names = [v["name"] for v in first["variants"]]
    assert names[:4] == ["base", "minitron", "forward_kl", "cross_entropy"] and len(names) == 6
    assert first["expect"][0]["held"]
    assert (root / "report.html").is_file() and (root / "model" / "README.md").is_file()
    assert not [p for p in (root / "stages").iterdir() if p.name.startswith(".")]
    written = json.loads((root / "results.json").read_text())
    assert set(written) >= {"recipe", "versions", "variants", "ratios", "machine", "git", "seed"}
    metric = written["variants"][1]["metrics"]["bits_per_byte"]
    assert set(metric) >= {"value", "unit", "better"} and metric["better"] == "lower"
    assert {"a", "b", "metric", "median", "low", "high"} <= set(written["ratios"][0])
    before = {p: p.stat().st_mtime_ns for p in (root / "stages").rglob("*.safetensors")}
    again = pipeline.run(recipe, folder=tmp_path / "runs")
    assert all(s["reused"] for s in again["stages"] if s["folder"])
    assert quality(again) == quality(first)
    assert before == {p: p.stat().st_mtime_ns for p in (root / "stages").rglob("*.safetensors")}


def test_a_changed_line_redoes_only_what_follows(recipe, tmp_path):
    pipeline.run(
        recipe,
        folder=tmp_path / "runs",
        overrides={"stages": "[{weights: minitron(layers=1)}, {train: {tokens: 256, context: 32}}]", "expect": "[]"},
    )
    changed = {"stages": "[{weights: minitron(layers=1)}, {train: {tokens: 512, context: 32}}]", "expect": "[]"}
    again = pipeline.run(recipe, folder=tmp_path / "runs", overrides=changed)
    assert [s["reused"] for s in again["stages"]] == [True, False]
    other_seed = pipeline.run(recipe, folder=tmp_path / "runs", overrides={**changed, "seed": "5"})
    assert [s["reused"] for s in other_seed["stages"]] == [False, False]


def test_the_result_is_plain(recipe, tmp_path):
    """AutoModelForCausalLM in a process that never imports smelt gives the same logits, bit for bit."""
    import torch

    from smelt.model._load import load

    pipeline.run(recipe, folder=tmp_path / "runs")
    folder = tmp_path / "runs" / "small" / "model"
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
        "m = A.from_pretrained(sys.argv[1], dtype=torch.float32).eval(); t = T.from_pretrained(sys.argv[1])\n"
        "x = torch.tensor([t('def f(x): return x')['input_ids']])\n"
        "torch.save(m(x).logits.detach(), sys.argv[2]); assert 'smelt' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "logits.pt")], check=True, capture_output=True)
    model, tokenizer, _ = load(folder)
    ids = torch.tensor([tokenizer("def f(x): return x")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, torch.load(tmp_path / "logits.pt"))


def killed(recipe: Path, tmp_path: Path, times: int, seed: int) -> None:
    chance = random.Random(seed)
    began = time.monotonic()
    process = smelt("run", str(recipe), "--folder", str(tmp_path / "whole"))
    assert process.communicate(timeout=600) and process.returncode == 0
    longest = time.monotonic() - began
    whole = json.loads((tmp_path / "whole" / "small" / "results.json").read_text())
    for _ in range(times):
        process = smelt("run", str(recipe), "--folder", str(tmp_path / "runs"))
        time.sleep(chance.uniform(0.3, 1.0) * longest)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        root = tmp_path / "runs" / "small" / "stages"
        for stage in root.glob("[!.]*"):
            assert (stage / "stage.json").is_file() and (stage / "model.safetensors").is_file()
    last = pipeline.run(recipe, folder=tmp_path / "runs")
    assert quality(last) == quality(whole)


def test_killed_runs_finish_with_the_same_figures(recipe, tmp_path):
    killed(recipe, tmp_path, 2, seed=1)


@pytest.mark.slow
def test_killed_twenty_times(recipe, tmp_path):
    killed(recipe, tmp_path, 20, seed=2)


def test_two_processes_on_one_run_folder(recipe, tmp_path):
    pair = [smelt("run", str(recipe), "--folder", str(tmp_path / "runs")) for _ in range(2)]
    ends = [p.communicate(timeout=600) for p in pair]
    assert [p.returncode for p in pair] == [0, 0], ends
    assert sum("another process is running" in err for _, err in ends) == 1
    assert sum("stages reused: 5 of" in err or "stages reused: 3 of" in err for _, err in ends) == 1


def one_line(process: subprocess.Popen) -> str:
    _, error = process.communicate(timeout=600)
    assert process.returncode == 2, error
    last = error.strip().splitlines()[-1]
    assert "Traceback" not in error
    return last


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_full_disk_is_one_line_and_loses_nothing(recipe, tmp_path):
    small = tmp_path / "small-disk"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mount is not permitted here")
    try:
        assert "disk is full" in one_line(smelt("run", str(recipe), "--folder", str(small)))
        for stage in (small / "small" / "stages").glob("[!.]*"):
            assert (stage / "stage.json").is_file()
        subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
        process = smelt("run", str(recipe), "--folder", str(small))
        assert process.communicate(timeout=600) and process.returncode == 0
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


def test_a_run_folder_that_cannot_be_made_is_one_line(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for folder in ("/proc/smelt", str(tmp_path / "file")):  # below /proc nothing can be made, even by root
        monkeypatch.setattr(sys, "argv", ["smelt", "run", str(recipe), "--folder", folder])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and folder in said[0], said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a read-only disk")
def test_a_read_only_disk_is_one_line_and_loses_nothing(recipe, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mount is not permitted here")
    try:
        pipeline.run(recipe, folder=disk)
        before = sorted(p.name for p in (disk / "small" / "stages").iterdir())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "read-only" in one_line(smelt("run", str(recipe), "--folder", str(disk), "--set", "seed=1"))
        assert before == sorted(p.name for p in (disk / "small" / "stages").iterdir())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_quantized_model_is_not_trained(recipe, tmp_path):
    stages = "[{weights: 'rtn(bits=4, group=32)'}, {train: {tokens: 256, context: 32}}]"
    with pytest.raises(SmeltError, match="quantize last"):
        pipeline.run(recipe, folder=tmp_path / "runs", overrides={"stages": stages, "expect": "[]"})


def test_seeds_give_means_and_spread(recipe, tmp_path):
    stages = "[{distill: [forward_kl(), cross_entropy()], train: {teacher: base, tokens: 512, context: 32, batch: 4}}]"
    results = pipeline.run(
        recipe, folder=tmp_path / "runs", overrides={"stages": stages, "seeds": "3", "evaluate": "[perplexity(tokens=512)]"}
    )
    metric = next(v for v in results["variants"] if v["name"] == "cross_entropy")["metrics"]["bits_per_byte"]
    assert len(metric["seeds"]) == 3 and len(set(metric["seeds"])) == 3
    assert metric["value"] == pytest.approx(sum(metric["seeds"]) / 3) and metric["spread"] > 0


def test_methods_may_name_earlier_variants(recipe, tmp_path):
    """A teacher and a draft that the recipe itself made; another teacher of the same name is another stage."""
    train = "{tokens: 512, context: 32, batch: 4, lr: 1e-2, teacher: minitron}"
    stages = f"[{{weights: 'minitron(layers=1)'}}, {{distill: forward_kl(), train: {train}}}, "
    stages += "{decode: 'speculative(draft=\"minitron\", length=2)'}]"
    changes = {"stages": stages, "expect": "[]", "evaluate": "['latency(prompt=16, new=8)']"}
    first = pipeline.run(recipe, folder=tmp_path / "runs", overrides=changes)
    drafted = next(v for v in first["variants"] if v["kind"] == "decode")["metrics"]["tokens_per_call"]["value"]
    assert drafted > 1.2  # a student that starts as its own teacher still agrees with it
    assert any("they are the same model" in text for text in first["warnings"])
    again = pipeline.run(
        recipe, folder=tmp_path / "runs", overrides=changes | {"stages": stages.replace("(layers=1)", "(layers=1, ffn=48)")}
    )
    assert [s["reused"] for s in again["stages"]] == [False] * 3
    assert pipeline.run(recipe, folder=tmp_path / "runs", overrides=changes)["stages"][1]["reused"]


def test_stages_that_measure_convert_and_train_for_a_runtime_method_leave_folders_and_are_not_done_twice(recipe, tmp_path):
    """A calibrated cache inside another one, a taught conversion with a training behind it, a judge inside a strategy."""
    lists = tmp_path / "lists.jsonl"
    rows = [{"query": f"x {i}", "positive": f"x {i} pass", "negatives": [f"def {i}", "import os"]} for i in range(12)]
    lists.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = "tokens: 256, context: 32, batch: 2"
    cache = "{cache: 'kivi(group=8, window=16, inner=eigen(rank=0.5))', calibrate: {rows: 4, context: 32}}"
    convert = f"{{attention: 'lolcats(window=8, features=4)', train: {{{short}}}}}, {{train: {{{short}}}}}"
    rank = f"{{rank: 'sliding_window(judge=pointwise(), window=3, step=1)', train: {{{short}, data: '{lists}'}}}}"
    kinds = {}
    for name, stages in (("cached", cache), ("converted", convert), ("ranked", rank)):
        changes = {
            "name": name,
            "stages": f"[{stages}]",
            "expect": "[]",
            "evaluate": "['perplexity(tokens=256, document=128, context=64, stride=32)']",
        }
        results = pipeline.run(recipe, folder=tmp_path / "runs", overrides=changes)
        again = pipeline.run(recipe, folder=tmp_path / "runs", overrides=changes)
        assert [s["reused"] for s in again["stages"]] == [True] * len(again["stages"]) and quality(again) == quality(results)
        kinds[name] = {s["kind"]: tmp_path / "runs" / name / s["folder"] for s in results["stages"]}
    assert (kinds["cached"]["cache"] / "cache.safetensors").is_file()
    assert json.loads((kinds["converted"]["distill"] / "config.json").read_text())["model_type"] == "smelt"
    assert (kinds["ranked"]["rank"] / "judge.safetensors").is_file() and (kinds["ranked"]["rank"] / "model.safetensors").is_file()
    two = rank.replace("'sliding_window", "['sliding_window").replace("step=1)'", "step=1)', 'disjoint_merge(judge=pointwise())']")
    results = pipeline.run(recipe, folder=tmp_path / "runs", overrides=changes | {"stages": f"[{two}]"})
    assert [s["reused"] for s in results["stages"] if s["kind"] == "rank"] == [True, True]  # trained once for both strategies
    assert len({s["folder"] for s in results["stages"] if s["kind"] == "rank"}) == 1 and len(results["variants"]) == 3
    with pytest.raises(SmeltError, match="what takes a 'train:' block is a judge that learns: block_rank, "):
        pipeline.run(recipe, folder=tmp_path / "runs", overrides={"stages": f"[{{rank: bm25(), train: {{{short}}}}}]"})


def test_a_trained_model_is_merged_with_the_one_before(recipe, tmp_path):
    stages = "[{train: {tokens: 512, context: 32, batch: 4, lr: 1e-2}}, {weights: 'linear(models=(\"base\",), weights=(1.0, 3.0))'}]"
    results = pipeline.run(recipe, folder=tmp_path / "runs", overrides={"stages": stages, "expect": "[]", "evaluate": "[memory]"})
    folders = [tmp_path / "tiny", *(tmp_path / "runs" / "small" / s["folder"] for s in results["stages"])]
    base, trained, merged = (load_file(folder / "model.safetensors") for folder in folders)
    assert any(not torch.equal(base[name], trained[name]) for name in base)
    for name, value in merged.items():
        torch.testing.assert_close(value, (trained[name] + 3 * base[name]) / 4)
    assert AutoModelForCausalLM.from_pretrained(folders[2]).num_parameters() == results["variants"][0]["metrics"]["parameters"]["value"]


def test_recipes_that_share_a_store_share_stages(recipe, tmp_path):
    first = pipeline.run(recipe, folder=tmp_path / "runs", store=tmp_path / "store", overrides={"evaluate": "[memory]", "expect": "[]"})
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("name: small", "name: other"))
    second = pipeline.run(other, folder=tmp_path / "runs", store=tmp_path / "store", overrides={"evaluate": "[memory]", "expect": "[]"})
    assert all(s["reused"] for s in second["stages"] if s["folder"])
    assert quality(first) == quality(second)
    for name in ("small", "other"):
        assert (tmp_path / "runs" / name / "model" / "model.safetensors").exists()
        assert not (tmp_path / "runs" / name / "stages").exists()
    folder = next(v["folder"] for v in second["variants"] if v["name"].startswith("forward_kl"))
    assert (tmp_path / "runs" / "other" / folder / "model.safetensors").exists()


def test_bench_measures_in_turns(recipe, tmp_path):
    results, root = pipeline.bench(
        str(tmp_path / "tiny"),
        {"cache": "[none, sink_window(window=32), kivi(bits=2, group=16, window=16)]"},
        "[perplexity(tokens=512), memory]",
        data=f"{tmp_path}/text*.txt",
        folder=tmp_path / "runs",
    )
    assert [v["name"] for v in results["variants"]] == ["plain", "sink_window(window=32)", "kivi(group=16, window=16)"]
    assert (root / "report.html").is_file()


@pytest.mark.parametrize(
    "choices, said",
    [
        ({"attention": "[none, lolcats()]"}, "makes another model"),
        ({"cache": "[none, eigen(rank=0.5)]"}, "has to be measured on text first"),
        ({"cache": "[none, kivi(group=16, inner=eigen(rank=0.5))]"}, "has to be measured on text first"),
        ({"rank": "[none, disjoint_merge(judge=self_calibrated())]"}, "has parameters that have to be trained"),
        ({"decode": "[none, fspad()]"}, "is a draft that has to be trained"),
        ({"cache": "[none, sink_window(window=32)]", "decode": "prompt_lookup()"}, "takes back rejected tokens"),
    ],
)
def test_bench_refuses_before_it_measures(recipe, tmp_path, choices, said):
    with pytest.raises(SmeltError, match=said):
        pipeline.bench(str(tmp_path / "tiny"), choices, folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_an_unknown_claim_names_the_nearest():
    with pytest.raises(SmeltError, match="did you mean 'kivi'"):
        pipeline.verify("kiwi")


class Answering(http.server.BaseHTTPRequestHandler):
    """A server of chat completions that counts what it is asked."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body["messages"][0]["content"])
        usage = {"prompt_tokens": 7, "completion_tokens": 3}
        answer = json.dumps(
            {"choices": [{"message": {"content": "It is one of 2 3 4 5 6 7."}, "finish_reason": "stop"}], "usage": usage}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


def test_an_endpoint_teaches_and_a_killed_run_does_not_ask_it_again(recipe, tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Answering.asked.clear()
    try:
        teacher = f"{{endpoint: 'http://127.0.0.1:{server.server_port}/v1', model: stub}}"
        train = f"{{tokens: 512, context: 64, batch: 4, teacher: {teacher}}}"
        rows = [{"input": f"{a} + {b}", "label": str(a + b)} for a in range(1, 5) for b in range(1, 4)]
        rows[0]["rationale"] = rows[4]["rationale"] = "They are added up."
        (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
        method = f'step_by_step(examples="{tmp_path}/sums.jsonl", rationales="teacher", held=0.0, new=16)'
        stages = f"[{{distill: '{method}', train: {train}}}]"
        changes = {"stages": stages, "expect": "[]", "evaluate": "[memory]"}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

            def killed(*args, **more):
                raise KeyboardInterrupt

            patch.setattr(pipeline, "save", killed)
            pipeline.run(recipe, folder=tmp_path / "runs", overrides=changes)
        count = len(Answering.asked)
        assert count >= 4
        results = pipeline.run(recipe, folder=tmp_path / "runs", overrides=changes)
        assert len(Answering.asked) == count
        assert results["stages"][0]["report"]["endpoint"]["requests"] == 0  # of this process; the first one asked
        with pytest.raises(SmeltError, match="reads the teacher's tensors, which an endpoint does not give"):
            preflight.plan(read(recipe, {"stages": f"[{{distill: forward_kl(), train: {train}}}]", "expect": "[]"}), {})
    finally:
        server.shutdown()
        server.server_close()
