"""The command line: quick to answer, one line per error, nothing heavy imported for help."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from smelt.cli import main


def smelt(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "smelt", *arguments], capture_output=True, text=True, timeout=120)


def light(*arguments: str) -> subprocess.CompletedProcess:
    """The command in a process that must not import what takes seconds."""
    code = (
        f"import sys; sys.argv = ['smelt', *{arguments!r}]\n"
        "from smelt.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code or 0\n"
        "else: code = 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'ir_measures'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


HELPS = [["--help"], ["run", "--help"], ["rank", "--help"], ["methods"], ["methods", "cache"], ["methods", "cache.kivi"]]


@pytest.mark.parametrize("arguments", HELPS)
def test_help_and_methods_import_neither_torch_nor_transformers(arguments):
    done = light(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and (arguments[0] != "rank" or "--candidates" in done.stdout)


@pytest.mark.parametrize("verb", ["run", "check", "search"])
def test_a_mistake_in_a_recipe_is_said_before_torch_is_imported(verb, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text("name: small\nmodel: embedded\nstages:\n  - weights: rtm()\n")
    done = light(verb, str(file))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"{file}:4: weights: no method 'rtm'; did you mean 'rtn'?\n"


def test_so_is_a_claim_that_there_is_not():
    done = light("verify", "kiwi")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "no claim for 'kiwi'; did you mean 'kivi'?\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "absent.yaml"], "absent.yaml: cannot be read"),
        (["run", "--set", "nonsense"], "not of the form key=value"),
        (["run", "--set", "sed=1"], "did you mean 'seed'"),
        (["check", "--model", "no/such/folder/at/all"], "no such folder"),
        (["report", "."], "no finished run"),
        (["methods", "distil"], "did you mean 'distill'"),
        (["methods", "cache.kiwi"], "did you mean 'kivi'"),
        (["verify", "kiwi"], "did you mean 'kivi'"),
        (["bench", "embedded", "chache=[none]"], "did you mean 'cache'"),
        (["bench", "cache=[none, kivi(bits=2)]"], 'smelt bench embedded "cache='),
        (["search", "--budget", "memory=<0.5"], "bounds are <= or >=; write memory<=0.5"),
        (["search"], "nothing is bounded"),
        (["search", "--budget", "latency<=0.5"], "'latency' is measured by the probe latency; add it"),
        (["bench", "embedded", "cache=[none, kivi(bit=2)]"], "did you mean 'bits'"),
        (["export", "embedded", "out.bin"], "a file that ends in .gguf"),
        (["export", "embedded", "out.gguf", "--dtype", "q8"], "did you mean 'q8_0'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["smelt", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr().err
    assert end.value.code == 2 and said in printed and len(printed.strip().splitlines()) == 1, printed
    assert not list(tmp_path.iterdir())


def test_debug_shows_where():
    done = smelt("--debug", "verify", "kiwi")
    assert "Traceback" in done.stderr and "SmeltError" in done.stderr


def test_env_names_versions():
    done = smelt("env")
    assert done.returncode == 0 and "torch" in done.stdout and "python" in done.stdout


def test_help_is_quick():
    """0.3 s is the promise on a quiet machine (median); under load we only refuse a heavy import."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        assert smelt("--help").returncode == 0
        times.append(time.perf_counter() - began)
    assert min(times) < 2.0


def test_export_writes_one_file(tmp_path):
    pytest.importorskip("gguf")
    done = smelt("export", "embedded", str(tmp_path / "out.gguf"), "--dtype", "q8_0")
    assert done.returncode == 0, done.stderr
    assert "6.56 M parameters" in done.stdout and [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--method": "sliding_windows()"}, "did you mean 'sliding_window'"),
        ({"--queries": "bad.tsv"}, "bad.tsv:2: there is no tab; a line is id<TAB>text"),
        ({"--candidates": "bad.trec"}, "bad.trec:1: the passage 'd9' is not in the corpus"),
        ({"--qrels": "bad.txt"}, "bad.txt:1: the query 'q9' is judged here and not among those asked"),
        ({"--model": "no/such/folder/at/all"}, "no such folder"),
        ({"--candidates": "c.trec", "--method": "first_token()"}, "first_token needs a decoder"),
        ({"--candidates": "c.trec", "--first": "bm25()"}, "not from both"),
    ],
)
def test_rank_errors_are_one_line_and_exit_code_2(change, said, tmp_path, monkeypatch, capsys):
    files = {"q.tsv": "q1\tone\n", "bad.tsv": "q1\tone\nq2 two\n", "d.tsv": "d1\tone\nd2\ttwo\n", "bad.trec": "q1 Q0 d9 1 1 t\n"}
    files |= {"c.trec": "q1 Q0 d1 1 2 t\nq1 Q0 d2 2 1 t\n", "bad.txt": "q9 0 d1 1\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    options = {"--method": "sliding_window()", "--queries": "q.tsv", "--corpus": "d.tsv", "--run": "o.trec"} | change
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["smelt", "rank", *(word for option in options.items() for word in option)])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr().err
    assert end.value.code == 2 and said in printed and len(printed.strip().splitlines()) == 1, printed
    assert not (tmp_path / "o.trec").exists()


def test_rank_orders_candidates_with_the_embedded_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "q.tsv").write_text("q1\tadd two numbers\n")
    (tmp_path / "d.jsonl").write_text(
        '{"_id": "a", "title": "", "text": "def add(a, b): return a + b"}\n{"_id": "b", "text": "import os"}\n'
    )
    (tmp_path / "c.trec").write_text("q1 Q0 a 1 2 t\nq1 Q0 b 2 1 t\n")
    (tmp_path / "j.txt").write_text("q1 0 a 1\n")
    files = ["--queries", "q.tsv", "--corpus", "d.jsonl", "--candidates", "c.trec", "--qrels", "j.txt", "--run", "o.trec"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["smelt", "rank", "--model", "embedded", "--method", "sliding_window()", *files])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    lines = [line.split() for line in (tmp_path / "o.trec").read_text().splitlines()]
    assert {line[2] for line in lines} == {"a", "b"} and [line[3:] for line in lines] == [
        ["1", "2", "sliding_window"],
        ["2", "1", "sliding_window"],
    ]
    printed = capsys.readouterr().out
    assert "nDCG@10" in printed and "random order" in printed and "1 judge calls" in printed
