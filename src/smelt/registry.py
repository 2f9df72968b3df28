"""A family's folder listing is the registry; one file is loaded by name, on demand.

A method is written the way its `repr` reads, with the file's name for the class: `sliding_window(judge=first_token())`.
The text is parsed with `ast`, literals and such calls only; nothing is evaluated. Third parties add methods through
the entry point group `smelt.methods`, entry name `family.name`, value `package.module:Class`.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from smelt.spec import FAMILIES, SmeltError, nearest

__all__ = ["About", "about", "build", "check", "load", "names", "parse", "source_digest", "text"]

ROOT = Path(__file__).parent
GROUP = "smelt.methods"


@cache
def _listing(family: str) -> dict[str, str]:
    """{method name: "module:Class" or "module:" when the class is still to be read}. Raises on a name taken twice."""
    if family not in FAMILIES:
        raise SmeltError(f"no family '{family}'{nearest(family, FAMILIES)}")
    folder = ROOT / family
    found = {p.stem: f"smelt.{family}.{p.stem}:" for p in sorted(folder.glob("*.py")) if not p.name.startswith("_")}
    for entry in importlib.metadata.entry_points(group=GROUP):
        owner, _, name = entry.name.partition(".")
        if owner != family:
            continue
        if name in found and found[name] != entry.value:
            raise SmeltError(f"{family}: the method '{name}' is defined twice: {found[name].rstrip(':')} and {entry.value}")
        found[name] = entry.value
    return found


def names(family: str) -> list[str]:
    return sorted(_listing(family))


def load(family: str, name: str) -> type:
    """The class of one method. Imports that file and no other method."""
    found = _listing(family)
    if name not in found:
        raise SmeltError(f"{family}: no method '{name}'{nearest(name, found)}")
    module_name, _, class_name = found[name].partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SmeltError(f"{family}: '{name}' cannot be loaded from {module_name}: {error}") from error
    public = [class_name] if class_name else list(getattr(module, "__all__", ()))
    if len(public) != 1:
        raise SmeltError(f"{family}: {module_name} must export exactly one class in __all__, it exports {public}")
    cls = getattr(module, public[0], None)
    if not (dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[union-attr]
        raise SmeltError(f"{family}: {module_name}.{public[0]} is not a frozen dataclass")
    _NAMES[cls] = (family, name)  # type: ignore[index]
    return cls  # type: ignore[return-value]


_NAMES: dict[type, tuple[str, str]] = {}


def name_of(method: object) -> tuple[str, str]:
    """(family, name) of a method object, however it was made."""
    cls = type(method)
    if cls not in _NAMES:
        for family in FAMILIES:
            for name, target in _listing(family).items():
                module, _, attribute = target.partition(":")
                if module == cls.__module__ and (not attribute or attribute == cls.__name__):
                    _NAMES[cls] = (family, name)
    if cls not in _NAMES:
        raise SmeltError(f"{cls.__name__} is not a method of smelt; register it under the entry point '{GROUP}'")
    return _NAMES[cls]


def text(method: object) -> str:
    """Recipe text: `name(field=value, ...)` with the fields that differ from their defaults. parse(text(m)) == m."""
    _, name = name_of(method)
    shown = []
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        if field.default is not dataclasses.MISSING and field.default == value:
            continue
        if field.default_factory is not dataclasses.MISSING and field.default_factory() == value:
            continue
        shown.append(f"{field.name}={_literal(value)}")
    return f"{name}({', '.join(shown)})"


def _literal(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return text(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_literal(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_literal(v)}" for k, v in value.items()) + "}"
    return repr(value)


def parse(source: str, family: str) -> Any:
    """One method, or a list of them, from recipe text. A bare name means its defaults."""
    try:
        tree = ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SmeltError(f"{family}: cannot read '{_short(source)}'; write a method as name(parameter=value)") from None
    try:
        return _value(tree, family, top=True)
    except RecursionError:
        raise SmeltError(f"{family}: '{_short(source)}' is nested too deeply") from None


def _value(node: ast.expr, family: str, top: bool = False) -> Any:
    if isinstance(node, ast.Call):
        owner, name = _called(node.func, family)
        values: dict[str, Any] = {}
        cls = load(owner, name)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if node.args:
            example = next(iter(fields), "parameter")
            raise SmeltError(f"{owner}: {name}: parameters are written by name, as {name}({example}=...)")
        for keyword in node.keywords:
            if keyword.arg is None:
                raise SmeltError(f"{owner}: {name}: '**' is not allowed in a recipe")
            if keyword.arg in values:
                raise SmeltError(f"{owner}: {name}: parameter '{keyword.arg}' is given twice")
            if keyword.arg not in fields:
                raise SmeltError(f"{owner}: {name} has no parameter '{keyword.arg}'{nearest(keyword.arg, fields)}")
            values[keyword.arg] = _value(keyword.value, owner)
        return build(cls, values, f"{owner}: {name}")
    if isinstance(node, (ast.Name, ast.Attribute)) and top:
        owner, name = _called(node, family)
        return build(load(owner, name), {}, f"{owner}: {name}")
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item, family, top) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.Dict) and not top and all(key is not None for key in node.keys):
        return {_value(k, family): _value(v, family) for k, v in zip(node.keys, node.values, strict=True)}  # type: ignore[arg-type]
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise SmeltError(f"{family}: '{_short(ast.unparse(node))}' is neither a literal nor a method") from None
    if top:
        raise SmeltError(f"{family}: {value!r} is not a method{nearest(str(value), names(family))}")
    return value


def _called(node: ast.expr, family: str) -> tuple[str, str]:
    """(family, name) of a call: in its own family first, else in the one family that has the name, else `family.name`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        _listing(node.value.id)
        return node.value.id, node.attr
    if not isinstance(node, ast.Name):
        raise SmeltError(f"{family}: '{_short(ast.unparse(node))}' is not the name of a method")
    if node.id in _listing(family):
        return family, node.id
    others = [f for f in FAMILIES if node.id in _listing(f)]
    if len(others) == 1:
        return others[0], node.id
    return family, node.id  # load() names the nearest


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """`cls(**values)` with every value checked against its annotation (type and range)."""
    hints = _hints(cls)
    good = {}
    for name, value in values.items():
        good[name] = _checked(value, hints[name], f"{where}: {name}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.name not in good and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SmeltError(f"{where}: '{missing[0]}' is missing")
    try:
        return cls(**good)
    except SmeltError:
        raise
    except (TypeError, ValueError) as error:
        raise SmeltError(f"{where}: {error}") from error


def check(method: object) -> None:
    """The same checks for a method made in Python. Called wherever smelt takes a method."""
    family, name = name_of(method)
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}  # type: ignore[arg-type]
    build(type(method), values, f"{family}: {name}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True))


def _checked(value: Any, hint: Any, where: str) -> Any:
    from pydantic import PydanticSchemaGenerationError, ValidationError

    try:
        return _adapter(hint).validate_python(value)
    except PydanticSchemaGenerationError as error:
        raise SmeltError(f"{where}: its annotation cannot be checked: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        said = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        options = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        more = nearest(value, [str(o) for o in options]) if options and isinstance(value, str) else ""
        raise SmeltError(f"{where} is {_short(repr(value))}; it should be {said[:1].lower() + said[1:]}{more}") from None


def _short(source: str) -> str:
    flat = " ".join(str(source).split())
    return flat if len(flat) <= 80 else flat[:77] + "..."


@dataclasses.dataclass(frozen=True)
class About:
    """What can be said of a method without importing it (or torch)."""

    family: str
    name: str
    cls: str
    summary: str  # first line of the class docstring: the equation or rule
    title: str
    link: str
    where: str
    fields: tuple[tuple[str, str], ...]  # (name, default as written)
    docstring: str


@cache
def about(family: str, name: str) -> About:
    """Read a method's file with `ast`: its paper, fields and docstring."""
    found = _listing(family)
    if name not in found:
        raise SmeltError(f"{family}: no method '{name}'{nearest(name, found)}")
    module, _, wanted = found[name].partition(":")
    tree = ast.parse(_source(family, name, module))
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    if not wanted:
        exported = [
            ast.literal_eval(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in n.targets)
        ]
        wanted = exported[0][0] if exported and exported[0] else ""
    if wanted not in classes:
        raise SmeltError(f"{family}: {module} exports no class '{wanted}'")
    node = classes[wanted]
    doc = ast.get_docstring(node) or ""
    paper, fields = ["", "", ""], []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if item.target.id == "paper" and isinstance(item.value, ast.Call):
                given = [ast.literal_eval(a) for a in item.value.args] + [ast.literal_eval(k.value) for k in item.value.keywords]
                paper = (given + ["", "", ""])[:3]
            elif "ClassVar" not in ast.unparse(item.annotation):
                fields.append((item.target.id, ast.unparse(item.value) if item.value else ""))
    return About(family, name, wanted, doc.split("\n")[0], *paper, fields=tuple(fields), docstring=doc)


def _source(family: str, name: str, module: str) -> str:
    own = ROOT / family / f"{name}.py"
    if module == f"smelt.{family}.{name}":
        return own.read_text(encoding="utf-8")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin:
        raise SmeltError(f"{family}: the entry point of '{name}' names {module}, which is not installed")
    return Path(spec.origin).read_text(encoding="utf-8")


def held(method: object) -> Iterator[object]:
    """The method and every method it holds."""
    if isinstance(method, (list, tuple)):
        for item in method:
            yield from held(item)
    elif dataclasses.is_dataclass(method) and not isinstance(method, type):
        yield method
        for field in dataclasses.fields(method):
            yield from held(getattr(method, field.name))


def source_digest(method: object) -> str:
    """Of the source files of a method and of all it holds: a changed method redoes the stages that used it."""
    digest = hashlib.sha256()
    for part in held(method):
        path = inspect.getsourcefile(type(part))
        digest.update(Path(path).read_bytes() if path else repr(type(part)).encode())
    return digest.hexdigest()
