from __future__ import annotations

import ast
import pickle
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import smelt.spec
from smelt.spec import FAMILIES, Paper, SmeltError, nearest


@pytest.mark.parametrize(
    "link, url",
    [
        ("arXiv:2402.03898", "https://arxiv.org/abs/2402.03898"),
        ("doi:10.1145/3298689", "https://doi.org/10.1145/3298689"),
        ("https://jmlr.org/a.html", "https://jmlr.org/a.html"),
    ],
)
def test_paper_address(link, url):
    assert Paper("title", link).url == url


def test_error_says_where():
    assert str(SmeltError("wrong")) == "wrong"
    assert str(SmeltError("wrong", file="a.yaml")) == "a.yaml: wrong"
    assert str(SmeltError("wrong", file="a.yaml", line=3)) == "a.yaml:3: wrong"


def test_the_first_place_is_kept():
    placed = SmeltError("wrong").at("a.yaml", 3)
    assert str(placed) == "a.yaml:3: wrong"
    assert placed.at("b.yaml", 4) is placed


def test_error_survives_pickling():
    """Workers hand errors to their parent process this way."""
    error = pickle.loads(pickle.dumps(SmeltError("wrong", file="a.yaml", line=3)))
    assert str(error) == "a.yaml:3: wrong" and error.line == 3


@given(st.text(), st.none() | st.text(), st.none() | st.integers(1, 99))
def test_error_is_one_printable_line(message, file, line):
    shown = str(SmeltError(message, file=file, line=line))
    assert shown.isprintable() and len(shown.splitlines()) <= 1


def test_escape_sequences_do_not_reach_the_terminal():
    assert str(SmeltError("red \x1b[31m")) == "red \\x1b[31m"


def test_nearest_names_the_near_or_lists_the_few():
    assert nearest("tiad", ["taid", "forward_kl"]) == "; did you mean 'taid'?"
    assert nearest("TAID", ["taid"]) == "; did you mean 'taid'?"
    assert nearest("zzzz", ["b", "a"]) == "; there is a, b"
    assert nearest("zzzz", [f"name{i}" for i in range(13)]) == ""
    assert nearest("zzzz", []) == ""


@given(st.text(), st.lists(st.text()))
def test_nearest_never_fails(name, options):
    assert isinstance(nearest(name, options), str)


def test_standard_library_only():
    tree = ast.parse(Path(smelt.spec.__file__).read_text(encoding="utf-8"))
    roots = {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots |= {name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert roots <= sys.stdlib_module_names


def test_every_family_is_a_folder_with_a_contract():
    for family in FAMILIES:
        contract = Path(smelt.spec.__file__).parent / family / "__init__.py"
        assert ast.get_docstring(ast.parse(contract.read_text(encoding="utf-8"))), f"{family} states no contract"
