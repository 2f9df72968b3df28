from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol

import pytest
from annotated_types import Ge, Le
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from smelt import registry
from smelt.spec import FAMILIES, Paper, SmeltError

METHODS = [(family, name) for family in FAMILIES for name in registry.names(family)]


@dataclass(frozen=True)
class Toy:
    """y = x; a method with a field of every kind a recipe can write."""

    paper: ClassVar = Paper("Toys", "doi:10/1", "1")
    count: Annotated[int, Ge(1), Le(9)] = 2
    rate: float = 0.5
    mode: Literal["fast", "slow"] = "fast"
    bits: Literal[2, 4] = 2
    on: bool = False
    label: str = ""
    sizes: tuple[int, ...] = ()
    names: list[str] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    held: Any = None
    inner: Inner | None = None
    both: tuple[Any, ...] = ()
    made: int = field(default=0, init=False)


@dataclass(frozen=True)
class Inner:
    """y = 2 x"""

    paper: ClassVar = Paper("Toys", "doi:10/1", where="2")
    depth: int = 1


@dataclass(frozen=True)
class Needy:
    """y = n x; needs a parameter and looks at it."""

    paper: ClassVar = Paper(link="doi:10/1", title="Toys", where="3")
    n: int

    def __post_init__(self):
        if self.n == 3:
            raise ValueError("3 is not allowed")
        if self.n == 4:
            raise SmeltError("4 is not allowed either")
        1 / (self.n - 5)


@pytest.fixture
def toys(monkeypatch):
    """The classes above as methods; `inner` is a name of two families."""
    entries = [("distill", "toy", "Toy"), ("distill", "needy", "Needy"), ("cache", "inner", "Inner"), ("decode", "inner", "Inner")]
    monkeypatch.setattr(registry, "_entries", lambda: [(f, n, f"{__name__}:{c}", "tests") for f, n, c in entries])
    monkeypatch.setattr(registry, "_NAMES", {})
    registry._listing.cache_clear()
    yield
    registry._listing.cache_clear()


def wrong(source: str, family: str = "distill") -> str:
    with pytest.raises(SmeltError) as caught:
        registry.parse(source, family)
    return str(caught.value)


# every registered method


@pytest.mark.parametrize("family, name", METHODS)
def test_defaults_come_back_from_their_text(family, name):
    cls = registry.load(family, name)
    needed = _needed(cls)
    if needed:
        assert f"'{needed[0]}' is missing" in wrong(f"{name}()", family)
        return
    try:
        method = cls()
    except SmeltError as error:  # it needs one of several settings, and says which
        assert error.message.startswith(f"{name}: ") and error.message in wrong(f"{name}()", family)
        return
    assert registry.text(method) == f"{name}()"
    assert registry.parse(f"{name}()", family) == registry.parse(name, family) == method
    registry.check(method)


def _needed(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]


@pytest.mark.parametrize("family, name", METHODS)
def test_any_allowed_parameters_come_back_from_their_text(family, name):
    cls = registry.load(family, name)
    hints = typing.get_type_hints(cls, include_extras=True)
    plain = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init and _plain(hints[f.name])}
    makers = {n: st.from_type(h) for n, h in plain.items()}
    for needed in set(_needed(cls)) - set(plain):  # a method it holds: any of the family that stands by itself
        others = [registry.load(family, n)() for n in registry.names(family) if not _needed(registry.load(family, n))]
        makers[needed] = st.sampled_from([m for m in others if _takes(hints[needed], m)])

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.filter_too_much])
    @given(st.fixed_dictionaries({n: makers.pop(n) for n in _needed(cls)}, optional=makers))
    def check(values):
        try:
            method = registry.build(cls, values, name)
        except SmeltError:  # a rule between parameters
            assume(False)
        assert registry.parse(registry.text(method), family) == method

    check()


def _takes(hint: Any, method: Any) -> bool:
    try:
        registry._checked(method, hint, "")
    except SmeltError:
        return False
    return True


def _plain(hint: Any) -> bool:
    """Made of numbers, words and tuples of them."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _plain(args[0])
    if origin is Literal:
        return True
    return all(_plain(a) for a in args if a is not ...) if origin else hint in (int, float, bool, str, type(None))


@pytest.mark.parametrize("family, name", METHODS)
def test_about_agrees_with_the_class(family, name):
    said, cls = registry.about(family, name), registry.load(family, name)
    assert (said.cls, said.title, said.link, said.where) == (cls.__name__, cls.paper.title, cls.paper.link, cls.paper.where)
    assert said.docstring == cls.__doc__.strip() or said.docstring.split() == cls.__doc__.split()
    assert said.summary and said.docstring.startswith(said.summary)
    assert [n for n, _ in said.fields] == [f.name for f in dataclasses.fields(cls)]
    assert [bool(d) for _, d in said.fields] == [
        f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING for f in dataclasses.fields(cls)
    ]


COMPLETE = [(family, name) for family, name in METHODS if all(default for _, default in registry.about(family, name).fields)]


@pytest.mark.parametrize("family, name", COMPLETE)
def test_what_is_said_of_the_defaults_is_what_a_recipe_may_say(family, name):
    fields = registry.about(family, name).fields
    said = ", ".join(f"{field}={default}" for field, default in fields if default != "math.inf")  # a recipe has no word for infinity
    try:
        plain = registry.parse(name, family)
    except SmeltError:  # awrs() and control_vector() are told nothing
        with pytest.raises(SmeltError):
            registry.parse(f"{name}({said})", family)
    else:
        assert registry.parse(f"{name}({said})", family) == plain


def test_about_imports_no_torch():
    script = (
        "import sys, json\nfrom smelt import registry\nfrom smelt.spec import FAMILIES\n"
        "told = [registry.about(f, n).summary for f in FAMILIES for n in registry.names(f)]\n"
        "print(json.dumps([len(told), [m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [len(METHODS), []]


# reading


def test_a_list_and_bare_names(toys):
    assert registry.parse("[toy, needy(n=1)]", "distill") == [Toy(), Needy(1)]
    assert registry.parse(" toy ", "distill") == registry.parse("toy(\n  count=2,\n)", "distill") == Toy()


def test_methods_hold_methods(toys):
    method = Toy(held=Inner(2), both=(Inner(), [Inner(3)], {"a": Inner(4)}))
    written = "toy(held=cache.inner(depth=2), both=(cache.inner(), [cache.inner(depth=3)], {'a': cache.inner(depth=4)}))"
    assert registry.text(method) == written
    assert registry.parse(written, "distill") == method
    assert [type(m).__name__ for m in registry.held(method)] == ["Toy", "Inner", "Inner", "Inner", "Inner"]
    assert "inner' is a method of cache and decode; write cache.inner()" in wrong("toy(held=inner())")
    assert "write stdlib()" in wrong("toy(held=stdlib)")


def test_the_short_name_where_it_is_unique():
    assert registry.text(registry.parse("mistral(data=stdlib())", "model")) == "mistral(data=stdlib())"
    assert registry.text(registry.parse("mistral(data=data.stdlib())", "model")) == "mistral(data=stdlib())"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@settings(deadline=None, database=None)
@given(values, st.floats(allow_nan=False), st.text())
@example(math.inf, -math.inf, "'\"\n\\")
def test_every_literal_comes_back(held, rate, label):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_entries", lambda: [("distill", "toy", f"{__name__}:Toy", "tests")])
        registry._listing.cache_clear()
        try:
            method = Toy(held=held, rate=rate, label=label)
            assert registry.parse(registry.text(method), "distill") == method
        finally:
            registry._listing.cache_clear()


def test_text_leaves_out_what_cannot_be_given(toys):
    method = Toy()
    object.__setattr__(method, "made", 7)
    assert registry.text(method) == "toy()"


def test_about_reads_a_paper_however_it_is_written(toys):
    for name, cls in (("toy", Toy), ("needy", Needy)):
        said = registry.about("distill", name)
        assert (said.title, said.link, said.where) == (cls.paper.title, cls.paper.link, cls.paper.where)
    assert registry.about("distill", "needy").fields == (("n", ""),)


def test_text_refuses_what_it_could_not_read_back(toys):
    for value in (math.nan, object(), {1}, print):
        with pytest.raises(SmeltError, match="cannot be written in a recipe"):
            registry.text(Toy(held=value))
    with pytest.raises(SmeltError, match="not a method of smelt"):
        registry.text(Paper("a", "b"))


# wrong names


def test_unknown_names_name_the_nearest(toys):
    assert wrong("cros_entropy()") == "distill: no method 'cros_entropy'; did you mean 'cross_entropy'?"
    assert wrong("cros_entropy") == "distill: no method 'cros_entropy'; did you mean 'cross_entropy'?"
    assert wrong("toy(cuont=3)") == "distill: toy has no parameter 'cuont'; did you mean 'count'?"
    assert wrong("toy(made=3)").startswith("distill: toy has no parameter 'made'")
    assert wrong("x()", "distil") == "no family 'distil'; did you mean 'distill'?"
    assert wrong("distil.toy()") == "no family 'distil'; did you mean 'distill'?"
    assert wrong("'toy'").startswith("distill: 'toy' is not a method")
    with pytest.raises(SmeltError, match="did you mean 'toy'"):
        registry.about("distill", "tyo")


def test_a_stage_takes_only_its_own_family(toys):
    assert wrong("stdlib()") == "distill: no method 'stdlib'; it belongs to data"
    assert wrong("data.stdlib()") == "distill: 'data.stdlib' is not a method of distill"
    assert wrong("[toy, stdlib]") == "distill: no method 'stdlib'; it belongs to data"


def test_ill_formed_calls(toys):
    assert wrong("toy(3)") == "distill: toy: parameters are written by name, as toy(count=...)"
    assert "'**' is not allowed" in wrong("toy(**{})")
    assert "cannot read" in wrong("toy(count=1, count=2)") or "given twice" in wrong("toy(count=1, count=2)")
    assert "'n' is missing" in wrong("needy()")
    assert f"has {5 + registry.LONGEST} characters" in wrong("toy()" + " " * registry.LONGEST)
    assert wrong("needy(n=3)") == "distill: needy: 3 is not allowed"
    assert wrong("needy(n=4)") == "4 is not allowed either"
    assert "needy: division by zero" in wrong("needy(n=5)")


# wrong values


@pytest.mark.parametrize(
    "given, said",
    [
        ("count=0", "count is 0; it should be greater than or equal to 1"),
        ("count=10", "count is 10; it should be less than or equal to 9"),
        ("count=1.5", "count is 1.5; it should be a valid integer"),
        ("count=True", "count is True; it should be a valid integer"),
        ("count='2'", "count is '2'; it should be a valid integer"),
        ("count=0x" + "f" * 9000, "count is a int too long to show"),
        ("rate='a'", "rate is 'a'; it should be a valid number"),
        ("rate=0x" + "f" * 9000, "rate is a int too long to show"),
        ("mode='fats'", "mode is 'fats'; it should be 'fast' or 'slow'; did you mean 'fast'?"),
        ("bits=3", "bits is 3; it should be 2 or 4"),
        ("on=1", "on is 1; it should be a valid boolean"),
        ("label=b'a'", "label is b'a'; it should be a valid string"),
        ("sizes=(1, 'a')", "it should be a valid integer"),
        ("sizes={}", "it should be a valid tuple"),
        ("inner=toy()", "inner is Toy("),
        ("table={[]: 1}", "has a key that cannot be one"),
    ],
)
def test_ill_typed_and_out_of_range(toys, given, said):
    assert said in wrong(f"toy({given})")


def test_lenient_where_nothing_is_lost(toys):
    assert registry.parse("toy(rate=1)", "distill").rate == 1.0
    assert registry.parse("toy(sizes=[1, 2])", "distill").sizes == (1, 2)
    assert registry.parse("toy(inner=cache.inner())", "distill").inner == Inner()


def test_methods_made_in_python_are_checked_too(toys):
    registry.check(Toy(inner=Inner()))
    with pytest.raises(SmeltError, match="distill: toy: count is 0"):
        registry.check(Toy(count=0))
    with pytest.raises(SmeltError, match="distill: toy: rate is not a number"):
        registry.check(Toy(rate=math.nan))


class Untestable(Protocol):
    def __call__(self) -> int: ...


def test_hints_of_other_kinds():
    @dataclass(frozen=True)
    class Record:
        place: Paper = Inner.paper
        call: Untestable | None = None

    paper = Paper("x", "y")
    assert registry.build(Record, {"place": paper}, "r").place is paper
    with pytest.raises(SmeltError, match="r: place is 3; it should be a Paper"):
        registry.build(Record, {"place": 3}, "r")
    with pytest.raises(SmeltError, match="r: there is no parameter 'plaec'; did you mean 'place'"):
        registry.build(Record, {"plaec": 3}, "r")


# nothing is ever evaluated

HOSTILE = [
    "__import__('os').system('touch {}')",
    "toy(held=__import__('os').system('touch {}'))",
    "toy(held=open('{}', 'w'))",
    "(lambda: open('{}', 'w'))()",
    "toy(held=[open('{}', 'w') for _ in (1,)])",
    "toy(held=f\"{{open('{}', 'w')}}\")",
    "[x for x in ().__class__.__bases__[0].__subclasses__()]",
    "toy(held=(y := 3))",
    "toy(held=1 if 1 else 2)",
    "toy(held='%s' % 3)",
    "toy(held=[1] * 3)",
    "toy(held=2 ** 2 ** 9)",
    "toy(held=a.b.c())",
    "toy.__class__",
    "toy().held",
    "toy()()",
    "toy()[0]",
    "await toy()",
    "(yield)",
    "distill.toy.__init__()",
    "toy(held=__builtins__)",
    "toy(held={**{}})",
    "[*toy()]",
    "toy(*[1])",
    "toy(); toy()",
    "toy = 3",
    "import os",
    "toy\0()",
    "\ud800",
    "'\\d'",
    "1 is 1",
    "'a'()",
    "{[]}",
    "...",
    "",
    "#",
    "toy(held=NotImplemented)",
    "../../etc/passwd",
    "distill.__init__",
    "_listing()",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_text_is_refused(toys, tmp_path, source):
    touched = tmp_path / "touched"
    assert wrong(source.replace("{}", touched.as_posix()).replace("{{", "{").replace("}}", "}"))
    assert not touched.exists()


@pytest.mark.parametrize("n", [50, 500, 4_000, 200_000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ("(", ")"), ("toy(held=", ")"), ("{1: ", "}"), ("-", ""), ("a.", ""), ("1+", "")])
def test_nesting_of_any_depth_is_an_error_or_a_value(toys, opening, closing, n):
    for source in (opening * n + "1" + closing * n, "toy(held=" + opening * n + "1" + closing * n + ")"):
        try:
            registry.parse(source, "distill")
        except SmeltError as error:
            assert len(str(error)) < 500


def test_no_code_runs_while_reading():
    """Python's own audit events: nothing is executed, opened, imported or started."""
    script = (
        "import sys, json\nfrom smelt import registry\nfrom smelt.spec import SmeltError\n"
        "registry.parse('stdlib()', 'data')\n"
        "for text in ('stdlib(x=1)', '[[]]'):\n"
        "    try: registry.parse(text, 'data')\n"
        "    except SmeltError: pass\n"
        "seen, sources = [], json.load(sys.stdin)\n"
        "sys.addaudithook(lambda event, args: seen.append(event))\n"
        "for source in sources:\n"
        "    try: registry.parse(source, 'data')\n"
        "    except SmeltError: pass\n"
        "watched = ('exec', 'open', 'import', 'os', 'subprocess', 'socket', 'ctypes')\n"
        "print(json.dumps(sorted({event for event in seen if event.split('.')[0] in watched})))"
    )
    sources = [s.replace("toy(held=", "stdlib(x=").replace("toy", "stdlib") for s in HOSTILE]
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps(sources), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


WORDS = (
    "stdlib dedup corpus files path cross_entropy x lambda for in if else None True 1e999 0x1f 7 ** := f' b' ... dedup( corpus= stdlib()"
)
words = st.sampled_from([*WORDS.split(), *"()[]{},.=:*+-'\"\\@;~^|&<>\n\t #\0é\u2028", "__import__('os')"])


@settings(max_examples=400, deadline=None, database=None)
@given(st.lists(words, max_size=25).map("".join) | st.lists(words, max_size=12).map("dedup(corpus={})".format) | st.text(max_size=40))
def test_any_text_is_a_method_or_one_clear_line(source):
    try:
        found = registry.parse(source, "data")
    except SmeltError as error:
        assert str(error).isprintable() and len(str(error)) < 500
    else:
        for method in found if isinstance(found, (list, tuple)) else [found]:
            assert registry.name_of(method)[0] == "data" or method == []


# digests


def test_source_digest_follows_the_sources(tmp_path, monkeypatch):
    package = tmp_path / "digested"
    package.mkdir()
    (package / "__init__.py").touch()
    head = "from dataclasses import dataclass\nfrom typing import Any\n"
    (package / "outer.py").write_text(head + "@dataclass(frozen=True)\nclass Outer:\n    held: Any = None\n")
    (package / "outer.py").write_text((package / "outer.py").read_text() + "from digested._help import deep\n")
    (package / "_help.py").write_text("from . import _deeper\nfrom ._other import x\ndeep = 1\n")
    for name in ("_deeper.py", "_other.py", "_stranger.py"):
        (package / name).write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    outer = __import__("digested.outer", fromlist=["Outer"]).Outer
    before = registry.source_digest(outer())
    assert registry.source_digest(outer()) == before != registry.source_digest(outer(held=Inner()))
    for name in ("outer.py", "_help.py", "_deeper.py", "_other.py", "__init__.py", "_stranger.py"):
        (package / name).write_text((package / name).read_text() + "# changed\n")
        after = registry.source_digest(outer())
        assert (after != before) is (name != "_stranger.py"), name
        before = after
