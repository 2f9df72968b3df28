"""The command line: quick to answer, one line per error, nothing heavy imported for help."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest


def smelt(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "smelt", *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["methods"], ["methods", "cache"], ["methods", "cache.kivi"]])
def test_help_and_methods_import_neither_torch_nor_transformers(arguments):
    code = (
        f"import sys; sys.argv = ['smelt', *{arguments!r}]\n"
        "from smelt.cli import app\n"
        "try: app()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


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
        (["search", "--budget", "memory=<0.5"], "bounds are <= or >=; write memory<=0.5"),
        (["search"], "nothing is bounded"),
        (["search", "--budget", "latency<=0.5"], "'latency' is measured by the probe latency; add it"),
        (["bench", "embedded", "cache=[none, kivi(bit=2)]"], "did you mean 'bits'"),
        (["export", "embedded", "out.bin"], "a file that ends in .gguf"),
        (["export", "embedded", "out.gguf", "--dtype", "q8"], "did you mean 'q8_0'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, said, tmp_path):
    done = subprocess.run([sys.executable, "-m", "smelt", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
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
