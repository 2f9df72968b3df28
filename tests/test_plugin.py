"""Adding a method is one source file, one test file and one claim, in smelt or in a package of one's own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import smelt

PACKAGE = Path(smelt.__file__).parent
LAWS = Path(__file__).parent / "distill" / "test_laws.py"

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "add-a-method.md").read_text(encoding="utf-8")
SOURCE, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(CLAIM,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
((ENTRY, TARGET),) = re.findall(r'"(distill\.\w+)" = "(.*?)"', PAGE)

LOOK = """
import json, sys
from smelt import registry
from smelt.spec import SmeltError

seen = {"names": registry.names("distill")}
seen["about"] = registry.about("distill", "my_objective").summary
seen["torch"] = "torch" in sys.modules
method = registry.parse("my_objective(scale=2.0)", "distill")
seen["text"] = registry.text(method)
seen["name"] = registry.name_of(type(method)())
seen["same"] = registry.load("distill", "my_objective") is type(method)
seen["digest"] = registry.source_digest(method)
try:
    registry.parse("my_objective(scale=-1.0)", "distill")
except SmeltError as error:
    seen["wrong"] = str(error)
import smelt
seen["smelt"] = smelt.__file__
print(json.dumps(seen))
"""


def install(folder: Path, entries: str, name: str = "my-objectives") -> None:
    """What pip leaves of a package: a dist-info folder on sys.path."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[smelt.methods]\n{entries}\n")


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    package = tmp_path / "my_objectives"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "my_objective.py").write_text(SOURCE)
    (tmp_path / "test_my_objective.py").write_text(TEST)
    (tmp_path / "my_objective.yaml").write_text(CLAIM)
    return tmp_path


def python(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=path, capture_output=True, text=True)


def failure(path: Path, line: str) -> str:
    """The one line a person sees."""
    script = f"from smelt import registry\nfrom smelt.spec import SmeltError\ntry: {line}\nexcept SmeltError as error: print(error)"
    done = python(path, "-c", script)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return done.stdout.strip()


def fingerprint(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def look(path: Path) -> dict:
    done = python(path, "-c", LOOK)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert "my_objective" in seen["names"] and "cross_entropy" in seen["names"]
    assert seen["about"].startswith("loss = scale * KL(p || q)") and seen["torch"] is False
    assert seen["text"] == "my_objective(scale=2.0)" and seen["name"] == ["distill", "my_objective"] and seen["same"]
    assert seen["wrong"] == "distill: my_objective: scale is -1.0; it should be greater than 0" and len(seen["digest"]) == 64
    return seen


def test_an_entry_point_adds_a_method(plugin):
    before = fingerprint(PACKAGE)
    install(plugin, f"{ENTRY} = {TARGET}")
    seen = look(plugin)
    assert Path(seen["smelt"]).parent == PACKAGE and fingerprint(PACKAGE) == before


def test_its_test_its_claim_and_the_laws_of_the_family_run(plugin):
    install(plugin, f"{ENTRY} = {TARGET}")
    (plugin / "test_claim_of_my_objective.py").write_text(
        "from smelt import recipe\n\ndef test_it_reads():\n"
        "    assert str(recipe.read('my_objective.yaml').stages[1].methods[0]) == 'MyObjective(scale=2.0)'\n"
    )
    options = ["-p", "no:cacheprovider", "-c", str(LAWS.parents[2] / "pyproject.toml"), "-k", "my_objective", "-rA"]
    done = python(plugin, "-m", "pytest", *options, "test_my_objective.py", "test_claim_of_my_objective.py", str(LAWS))
    assert done.returncode == 0, done.stdout
    for name in ("::test_sums_over_the_vocabulary", "::test_it_reads", "test_laws.py::"):
        assert any(line.startswith("PASSED") and name in line for line in done.stdout.splitlines()), done.stdout


def test_a_file_in_a_familys_folder_is_all_it_takes(plugin, tmp_path_factory):
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, root / "smelt", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    before = fingerprint(root)
    shutil.copy(plugin / "my_objectives" / "my_objective.py", root / "smelt" / "distill" / "my_objective.py")
    assert Path(look(root)["smelt"]).parent == root / "smelt"
    after = fingerprint(root)
    assert set(after) - set(before) == {"smelt/distill/my_objective.py"}
    assert {name: after[name] for name in before} == before


def test_a_name_taken_twice_names_both(plugin):
    install(plugin, "distill.cross_entropy = my_objectives.my_objective:MyObjective")
    said = failure(plugin, "registry.names('distill')")
    assert said == (
        "distill: the method 'cross_entropy' is defined twice: smelt.distill.cross_entropy"
        " and my_objectives.my_objective:MyObjective (my-objectives)"
    )


def test_two_packages_with_one_name(plugin):
    install(plugin, f"{ENTRY} = {TARGET}")
    install(plugin, "distill.my_objective = elsewhere:Other", "others")
    said = failure(plugin, "registry.names('distill')")
    assert "my_objectives.my_objective:MyObjective (my-objectives)" in said and "elsewhere:Other (others)" in said


def test_the_same_package_found_twice_is_one(plugin):
    entry = f"{ENTRY} = {TARGET}"
    install(plugin, entry)
    install(plugin, entry, "my-objectives-editable")
    script = "from smelt import registry; print(registry.names('distill').count('my_objective'))"
    assert python(plugin, "-c", script).stdout.strip() == "1"


@pytest.mark.parametrize("line", ["registry.load('distill', 'my_objective')", "registry.about('distill', 'my_objective')"])
@pytest.mark.parametrize("module", ["nowhere", "nowhere.deep", "my_objectives.nowhere"])
def test_an_entry_point_to_nothing(plugin, line, module):
    install(plugin, f"distill.my_objective = {module}:MyObjective")
    said = failure(plugin, line)
    assert said.startswith("distill: ") and "'my_objective'" in said and module in said


def test_about_a_module_without_a_file(plugin):
    install(plugin, "distill.my_objective = __main__:MyObjective")
    assert "which is not installed" in failure(plugin, "registry.about('distill', 'my_objective')")


@pytest.mark.parametrize(
    "entry, said",
    [
        ("distil.my_objective = m:C", "no family 'distil'; did you mean 'distill'?"),
        ("my_objective = m:C", "must be named family.name"),
        ("distill.my-objective = m:C", "must read family.name = package.module:Class"),
        ("distill.my_objective = m;C", "must read family.name = package.module:Class"),
    ],
)
def test_an_entry_point_named_wrongly(plugin, entry, said):
    install(plugin, entry)
    line = failure(plugin, "registry.names('distill')")
    assert line.startswith("my-objectives: the entry point ") and said in line


@pytest.mark.parametrize(
    "source, said",
    [
        ("1 / 0", "cannot be loaded from broken: ZeroDivisionError: division by zero"),
        ("def", "cannot be loaded from broken: SyntaxError"),
        ("class MyObjective: pass", "broken.MyObjective is not a frozen dataclass"),
        ("", "broken.MyObjective is not a frozen dataclass"),
    ],
)
def test_a_broken_file_is_one_line(plugin, source, said):
    (plugin / "broken.py").write_text(source)
    install(plugin, "distill.my_objective = broken:MyObjective")
    assert said in failure(plugin, "registry.load('distill', 'my_objective')")
