"""Recipes: every name checked, every error one line with file and line, nothing evaluated, no weight read."""

from __future__ import annotations

import string

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smelt import registry
from smelt.recipe import held, read, terms, variants
from smelt.spec import SmeltError

GOOD = """\
name: good
model: embedded
data: stdlib
seed: 3
stages:
  - weights: magnitude(sparsity=0.25)
  - distill: [forward_kl(), cross_entropy()]
    train: {teacher: base, tokens: 5_000, lr: 1e-3}
  - cache: sink_window(window=64)
evaluate: [perplexity]
expect:
  - forward_kl.bits_per_byte <= 1.5 * base.bits_per_byte + 0.1
"""


def message(text: str) -> str:
    with pytest.raises(SmeltError) as caught:
        read("r.yaml", text=text)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("r.yaml")
    return line


def test_a_good_recipe():
    recipe = read("r.yaml", text=GOOD)
    assert recipe.name == "good" and recipe.seeds == (3,) and len(recipe.stages) == 3
    assert recipe.stages[1].train.lr == 1e-3 and recipe.stages[1].train.tokens == 5000  # YAML reads 1e-3 as text
    assert recipe.stages[1].train.teacher == {"model": "base"}
    assert recipe.stages[0].calibrate is not None


def test_a_fork_multiplies_what_follows():
    names = [v.name for v in variants(read("r.yaml", text=GOOD))]
    assert names[:4] == ["base", "magnitude", "forward_kl", "cross_entropy"]
    assert names[4:] == ["forward_kl.sink_window(window=64)", "cross_entropy.sink_window(window=64)"]


def test_names_are_the_shortest_unique():
    text = "stages:\n  - cache: [sink_window(window=64), sink_window(window=32)]\n"
    assert [v.name for v in variants(read("r.yaml", text=text))] == ["base", "sink_window(window=64)", "sink_window(window=32)"]


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (("forward_kl()", "forward_ki()"), 7, "did you mean 'forward_kl'"),
        (("sparsity=0.25", "sparsty=0.25"), 6, "did you mean 'sparsity'"),
        (("sparsity=0.25", "sparsity=7.0"), 6, "sparsity is 7.0"),
        (("sparsity=0.25", "sparsity='a'"), 6, "sparsity is 'a'"),
        (("tokens: 5_000", "token: 5_000"), 8, "did you mean 'tokens'"),
        (("tokens: 5_000", "tokens: many"), 8, "tokens is 'many'"),
        (("- cache:", "- cahce:"), 9, "did you mean 'cache'"),
        (("evaluate: [perplexity]", "evaluate: [perplexty]"), 10, "did you mean 'perplexity'"),
        (("forward_kl.bits", "forward_kI.bits"), 12, "did you mean 'forward_kl'"),
        (("seed: 3", "seed: -1"), 4, "whole numbers"),
        (("data: stdlib", "data: stdlbi"), 3, "did you mean 'stdlib'"),
        (("seed: 3", "name: twice"), 4, "given twice"),
        (("seed: 3", "sede: 3"), 4, "did you mean 'seed'"),
        (("    train: {teacher: base, tokens: 5_000, lr: 1e-3}\n", ""), 7, "needs a 'train:' block"),
        (("seed: 3", "seed: &x 3"), 0, ""),
        (("sink_window(window=64)", "sink_window(__import__('os'))"), 9, "by name"),
        (("[forward_kl(), cross_entropy()]", "[forward_kl(), forward_kl()]"), 7, "twice"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(change, line, said):
    assert change[0] in GOOD
    text = GOOD.replace(*change)
    if not said:
        read("r.yaml", text=text)  # an anchor without an alias harms nothing
        return
    found = message(text)
    assert found.startswith(f"r.yaml:{line}: ") and said in found, found


def test_aliases_are_refused_so_no_file_can_explode():
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"
    assert "aliases" in message(bomb)


def test_overrides():
    recipe = read("r.yaml", {"seed": "9", "train.tokens": "77", "stages.0.weights": "magnitude(sparsity=0.5)"}, text=GOOD)
    assert recipe.seed == 9 and recipe.stages[1].train.tokens == 77 and recipe.stages[0].methods[0].sparsity == 0.5
    for key in ("stagse.0.weights", "stages.9.weights", "train.x.y", "calibrate.rows"):
        with pytest.raises(SmeltError):
            read("r.yaml", {key: "1"}, text=GOOD)


def test_an_unreadable_file_is_one_line(tmp_path):
    for name, content in {"latin.yaml": b"name: \xff\xfe", "big.yaml": b"#" * (1 << 21)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SmeltError):
            read(tmp_path / name)
    with pytest.raises(SmeltError, match="cannot be read"):
        read(tmp_path / "absent.yaml")
    with pytest.raises(SmeltError, match="cannot be read"):
        read(tmp_path)


def test_expectations_are_arithmetic_and_nothing_else():
    recipe = read("r.yaml", text=GOOD)
    assert list(terms(recipe.expect[0])) == [("forward_kl", "bits_per_byte"), ("base", "bits_per_byte")]
    figures = {("forward_kl", "bits_per_byte"): 1.6, ("base", "bits_per_byte"): 1.0}
    assert held(recipe.expect[0], lambda v, m: figures[v, m]) == (True, 1.6, 1.6)
    for hostile in ("base.x() < 1", "base.x < [1][0]", "__import__('os').x < 1 < 2", "(lambda: 1) < 2", "base.x"):
        assert "expect" in message(GOOD + f"  - {yaml.safe_dump(hostile).splitlines()[0]}\n")


WORDS = ["name", "model", "stages", "evaluate", "expect", "weights", "distill", "cache", "train", "calibrate", "seed", "data"]
METHODS = ["kivi(bits=2)", "forward_kl()", "magnitude(sparsity=0.5)", "stdlib", "perplexity", "rtn(bits=99)", "x(", "kivi(bits=kivi())"]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(METHODS), st.text(max_size=20), st.sampled_from(WORDS)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
TOP = st.dictionaries(st.sampled_from([*WORDS[:5], "seed", "data", "seeds"]), VALUES, max_size=5)
MUTATED = st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 12), st.text(string.printable, max_size=8)).map(
    lambda m: GOOD[: m[0]] + m[2] + GOOD[m[0] + m[1] :]
)
MALFORMED = st.one_of(MUTATED, TOP.map(lambda t: yaml.safe_dump(t, allow_unicode=True)), st.text(max_size=200))


def one_line_or_a_recipe(text: str) -> None:
    try:
        variants(read("r.yaml", text=text))
    except SmeltError as error:
        assert "\n" not in str(error) and str(error).startswith("r.yaml")


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(MALFORMED)
def test_any_text_is_a_recipe_or_one_clear_line(text):
    one_line_or_a_recipe(text)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(MALFORMED)
def test_ten_thousand_malformed_recipes(text):
    one_line_or_a_recipe(text)


def test_recipe_text_is_the_repr():
    for stage in read("r.yaml", text=GOOD).stages:
        for method in stage.methods:
            assert registry.parse(registry.text(method), stage.kind) == method
