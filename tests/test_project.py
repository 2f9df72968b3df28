"""The shape of the project, held by short checks: ranks, one file per method, one test per file, claims, recipes, docs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smelt import preflight, recipe, registry
from smelt.spec import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TESTS, CLAIMS, RECIPES, DOCS = ROOT / "src" / "smelt", ROOT / "tests", ROOT / "claims", ROOT / "recipes", ROOT / "docs"
FILES = sorted(SOURCE.rglob("*.py"))
METHODS = [(family, name) for family in FAMILIES for name in registry.names(family)]
CLAIMED = ("distill", "align", "weights", "attention", "cache", "decode", "rank")  # what a recipe's stage can be

# Imports inside functions. Files that must stay light for `smelt --help` and `smelt methods`, and packages that may be
# absent or are slow to import and needed on one path only.
LAZY_FILES = {"cli.py", "registry.py", "progress.py", "report.py"}
LAZY_PACKAGES = {"huggingface_hub", "datasets", "pyarrow", "lm_eval", "compressed_tensors", "psutil", "peft", "llguidance"}
LAZY_PACKAGES |= {"smelt._train_loop"}  # transformers' Trainer
# Files without a test file of their own, and what covers them.
COVERED = {
    "__main__.py": "two lines; tests/test_cli.py runs `python -m smelt`",
    "data/_read.py": "tests/data/test_files.py reads every kind of file through the corpus",
}
# Methods without a claim, and why.
UNCLAIMED = {"distill/cross_entropy": "the baseline in the claims of the others"}


def where(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def method_file(family: str, name: str) -> Path | None:
    path = SOURCE / family / f"{name}.py"
    return path if path.is_file() else None  # None: it comes from an installed plugin


OWN = [(family, name) for family, name in METHODS if method_file(family, name)]

# ranks


def ranks() -> dict[str, int]:
    """{file or folder: rank} from the layout in docs/design.md."""
    found = re.findall(r"^  (\w+)(?:\.py|/) +(\d)  ", (DOCS / "design.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {name: int(rank) for name, rank in found}


RANKS = ranks()


def part(path: Path) -> str:
    """The line of the layout a file belongs to; a helper `_report_plots.py` belongs to `report.py`."""
    return part_of(path.relative_to(SOURCE).parts[0].removesuffix(".py"))


def part_of(top: str) -> str:
    return top if top in RANKS else top.strip("_").split("_")[0]


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """(statement, module) of every import, those inside functions too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path)}:{node.lineno}: relative import"
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield node, full if (SOURCE.parent / full.replace(".", "/")).with_suffix(".py").exists() else node.module or ""


def test_every_file_has_a_rank():
    assert len(RANKS) >= 15
    for path in FILES:
        if where(path) not in ("__init__.py", "__main__.py"):
            assert part(path) in RANKS, f"{where(path)} is not in the layout of docs/design.md"


def test_imports_point_one_way():
    wrong = []
    for path in FILES:
        if where(path) in ("__init__.py", "__main__.py", "cli.py"):
            continue
        for node, module in imports(path):
            words = module.split(".")
            if words[0] != "smelt":
                continue
            other = part_of(words[1]) if len(words) > 1 else ""
            if other not in ("", "spec", part(path)) and RANKS[other] >= RANKS[part(path)]:
                wrong.append(f"{where(path)}:{node.lineno}: rank {RANKS[part(path)]} imports {module}, rank {RANKS[other]}")
    assert not wrong, "\n".join(wrong)


def test_families_never_import_each_other():
    wrong = [
        f"{where(path)}: {module}"
        for path in FILES
        if part(path) in FAMILIES and RANKS[part(path)] == 2
        for _, module in imports(path)
        if module.startswith("smelt.") and module.split(".")[1] in FAMILIES and module.split(".")[1] != part(path)
        if RANKS[module.split(".")[1]] == 2
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_inside_functions_are_few_and_known():
    wrong = []
    for path in FILES:
        if where(path) in LAZY_FILES or path.name == "__init__.py" or (path.parent == SOURCE and f"{part(path)}.py" in LAZY_FILES):
            continue
        inside = {
            (node.lineno, name)
            for function in ast.walk(tree_of(path))
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            for node in ast.walk(function)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names])
        }
        wrong += [f"{where(path)}:{line}: {name}" for line, name in sorted(inside) if not {name, name.split(".")[0]} & LAZY_PACKAGES]
    assert not wrong, "imports inside functions:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "command",
    [
        "import smelt",
        "import smelt.registry, smelt.spec",
        "import sys, smelt.cli; sys.argv = ['smelt', '--help']\ntry: smelt.cli.main()\nexcept SystemExit: pass",
    ],
)
def test_starts_light(command):
    script = command + "\nimport sys; print(sorted({'torch', 'transformers', 'numpy', 'datasets', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# one method, one file


@pytest.mark.parametrize("family, name", OWN)
def test_a_method_is_one_short_file_with_one_class(family, name):
    path = method_file(family, name)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200, f"{len(lines)} lines"
    cls = registry.load(family, name)  # raises unless __all__ is one frozen dataclass
    assert cls.__module__ == f"smelt.{family}.{name}"
    wrapped = [base.__name__ for base in cls.__mro__[1:] if "paper" in vars(base)]
    assert not wrapped, f"a method holds another method, it does not derive from one: {wrapped}"


@pytest.mark.parametrize("family, name", OWN)
def test_a_method_says_its_rule_and_its_paper(family, name):
    about = registry.about(family, name)
    assert about.title and re.match(r"arXiv:\d{4}\.\d{4,5}$|arXiv:[a-z-]+/\d{7}$|doi:10\.|https://", about.link), about.link
    assert re.search(r"[=<>≤≥~|*/+^(){}`∈]|\biff\b", about.summary), f"the docstring opens with the equation or rule: {about.summary!r}"


def test_files_stay_short():
    for path in FILES:
        most = 400 if path.name.startswith("_") else 700  # helpers; the spine
        assert len(path.read_text(encoding="utf-8").splitlines()) <= most, where(path)
    for family in FAMILIES:
        contract = SOURCE / family / "__init__.py"
        assert len(contract.read_text(encoding="utf-8").splitlines()) <= 90, where(contract)
        own = [module for _, module in imports(contract) if module.startswith(f"smelt.{family}.")]
        assert all(module.split(".")[2].startswith("_") for module in own), f"{where(contract)} imports a method"


# every file its test, every method its claim


def test_every_file_has_its_test():
    missing = []
    for path in FILES:
        if path.name == "__init__.py" or where(path) in COVERED:
            continue
        names = {f"test_{path.name}", f"test_{path.name.lstrip('_')}"}
        names |= {f"test_{part(path)}.py"} if path.parent == SOURCE else set()  # _report_plots.py: tests/test_report.py
        if not any((TESTS / path.relative_to(SOURCE).parent / name).exists() for name in names):
            missing.append(f"{where(path)}: no {(TESTS / path.relative_to(SOURCE).parent / f'test_{path.name}').relative_to(ROOT)}")
    assert not missing, "\n".join(missing)


def test_every_test_has_its_file():
    loose = {"test_laws", "test_project", "test_plugin", "test_mutants"}
    strays = []
    for path in TESTS.rglob("test_*.py"):
        folder, name = SOURCE / path.relative_to(TESTS).parent, path.stem.removeprefix("test_")
        if path.stem not in loose and not any((folder / source).exists() for source in (f"{name}.py", f"_{name}.py", name)):
            strays.append(path.relative_to(ROOT).as_posix())
    assert not strays, strays


@pytest.mark.parametrize("family", [f for f in FAMILIES if any(o == f for o, _ in OWN) and f in {*CLAIMED, "data"}])
def test_a_family_has_laws_that_name_no_method(family):
    laws = TESTS / family / "test_laws.py"
    text = laws.read_text(encoding="utf-8")
    assert "registry.names" in text
    assert f"smelt.{family}." not in re.sub(rf"smelt\.{family}\._\w+", "", text), "laws run on whatever the registry lists"


@pytest.mark.parametrize("family, name", [(f, n) for f, n in OWN if f in CLAIMED and f"{f}/{n}" not in UNCLAIMED])
def test_a_method_has_its_claim(family, name):
    path = CLAIMS / family / f"{name}.yaml"
    assert path.is_file(), f"no claims/{family}/{name}.yaml"
    found = recipe.read(path)
    assert found.expect, "a claim expects something"
    used = {registry.name_of(part) for stage in found.stages for method in stage.methods for part in registry.held(method)}
    held = [part for stage in found.stages if stage.train for part in (stage.train.data, stage.train.adapter) if part is not None]
    used |= {registry.name_of(part) for block in held for part in registry.held(block)}
    assert (family, name) in used, f"the claim of {name} does not use it"


@pytest.mark.parametrize("path", sorted([*RECIPES.glob("*.yaml"), *CLAIMS.rglob("*.yaml")]), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_shipped_recipes_read(path):
    found = recipe.read(path)
    if path.stem not in ("hub", "search"):  # a set that is not on this machine; choices that `smelt search` makes
        preflight.plan(found, {})
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, "a recipe is a screen at most"
    if path.is_relative_to(CLAIMS):
        assert registry.about(path.parent.name, path.stem)


def test_ledger_lines_are_json():
    ledger = CLAIMS / "ledger.jsonl"
    for line in ledger.read_text(encoding="utf-8").splitlines() if ledger.exists() else []:
        entry = json.loads(line)
        assert entry["name"] in registry.names(entry["family"]) and isinstance(entry["held"], bool)


# what people read


def test_nothing_is_left_to_do():
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX")) + r")\b")
    folders = [SOURCE, TESTS, CLAIMS, RECIPES, DOCS, ROOT / "benchmarks"]
    texts = [p for f in folders for p in f.rglob("*") if p.suffix in (".py", ".yaml", ".md", ".css", ".js")]
    found = [
        p.relative_to(ROOT).as_posix()
        for p in [*texts, *ROOT.glob("*.md"), ROOT / "Makefile"]
        if marks.search(p.read_text(encoding="utf-8"))
    ]
    assert not found, found


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def commands(path: Path) -> list[str]:
    """Lines of the shell blocks of a page."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    return [line.split("#")[0].strip().removeprefix("$ ") for block in blocks for line in block.splitlines() if line.strip()]


def test_commands_in_the_docs_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    help_text = subprocess.run([sys.executable, "-m", "smelt", "--help"], capture_output=True, text=True, check=True).stdout
    verbs = set(re.findall(r"^\W*([a-z]+)  ", help_text, re.MULTILINE))
    assert {"run", "check", "bench", "verify", "methods", "report", "env"} <= verbs
    for page in pages():
        for line in commands(page):
            words = line.replace("torchrun", "smelt", 1).split()
            if words[:1] == ["make"]:
                assert words[1] in targets, f"{page.name}: {line}"
            elif "-m" in words and words[0] == "smelt":
                assert words[words.index("-m") + 1] == "smelt" and words[words.index("-m") + 2] in verbs, f"{page.name}: {line}"
            elif words[:1] == ["smelt"]:
                assert words[1] in verbs, f"{page.name}: {line}"
    assert {"make run", "make test"} <= set(commands(ROOT / "README.md"))


def test_the_table_of_methods_is_true():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {(family, name) for family, cells in rows for name in re.findall(r"`(\w+)`", cells)}
    assert len(rows) >= 9 and named <= set(OWN), named - set(OWN)  # examples: a new method need not be among them


def test_links_between_pages_lead_somewhere():
    dead = []
    for page in pages():
        text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            target = target.strip("<>")
            if not target.startswith(("http://", "https://", "mailto:")) and not (page.parent / target).exists():
                dead.append(f"{page.name}: {target}")
    assert not dead, dead


def test_recipes_in_the_docs_read():
    for page in pages():
        for index, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
            if "stages:" in block and "my_objective" not in block:
                recipe.read(f"{page.name}-{index}", text=block)


def test_the_training_block_is_documented():
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    for settings in (recipe.Training, recipe.Calibration):
        for name in settings.__dataclass_fields__:
            assert f"| `{name}` |" in page, f"docs/recipes.md does not explain {settings.__name__}.{name}"


def test_every_dependency_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.split(r"[=;]", line)[0].lower().replace("_", "-") for line in lines if line and not line.startswith("#")}
    needed = project["build-system"]["requires"] + project["project"]["dependencies"] + project["project"]["optional-dependencies"]["test"]
    names = {re.split(r"[^\w.-]", need)[0].lower().replace("_", "-") for need in needed}
    assert names <= pinned, names - pinned
    assert "torch==2.13.0" in lines
