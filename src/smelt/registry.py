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
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import keyword
import math
import sys
import typing
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from smelt.spec import FAMILIES, SmeltError, nearest

__all__ = ["About", "about", "build", "check", "code_digest", "held", "load", "name_of", "names", "parse", "source_digest", "text"]

ROOT = Path(__file__).parent
GROUP = "smelt.methods"
QUIET = ("__init__.py", "__main__.py", "cli.py", "preflight.py", "progress.py", "recipe.py", "registry.py", "report.py", "spec.py")
LONGEST = 20_000  # characters of one method's text; far above any recipe, far below what could exhaust the parser


@cache
def _listing(family: str) -> dict[str, str]:
    """{method name: "module:Class" or "module:" when the class is still to be read}. Raises on a name taken twice."""
    if family not in FAMILIES:
        raise SmeltError(f"no family '{family}'{nearest(family, FAMILIES)}")
    found = {p.stem: f"smelt.{family}.{p.stem}:" for p in sorted((ROOT / family).glob("*.py")) if _is_name(p.stem)}
    origin = dict(found)
    for owner, name, target, package in _entries():
        if owner != family:
            continue
        if name in found and found[name] != target:
            raise SmeltError(f"{family}: the method '{name}' is defined twice: {origin[name].rstrip(':')} and {target} ({package})")
        found[name], origin[name] = target, f"{target} ({package})"
    return found


def _is_name(stem: str) -> bool:
    return stem.isidentifier() and not stem.startswith("_") and not keyword.iskeyword(stem)


@cache
def _entries() -> list[tuple[str, str, str, str]]:
    """(family, name, "module:Class", package) of every installed entry point of the group."""
    found = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        package = entry.dist.name if entry.dist else "a package"
        family, _, name = entry.name.partition(".")
        where = f"{package}: the entry point '{entry.name} = {entry.value}' of {GROUP}"
        if family not in FAMILIES:
            raise SmeltError(f"{where} must be named family.name; no family '{family}'{nearest(family, FAMILIES)}")
        match = entry.pattern.match(entry.value)
        if not _is_name(name) or match is None:
            raise SmeltError(f"{where} must read family.name = package.module:Class")
        found.append((family, name, f"{match['module']}:{match['attr'] or ''}", package))
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
    except Exception as error:  # whatever somebody else's file does when it is imported
        raise SmeltError(f"{family}: '{name}' cannot be loaded from {module_name}: {type(error).__name__}: {error}") from error
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
                module_name, _, attribute = target.partition(":")
                module = sys.modules.get(module_name)
                exported = [attribute] if attribute else list(getattr(module, "__all__", ()))
                if module is not None and len(exported) == 1 and getattr(module, exported[0], None) is cls:
                    _NAMES.setdefault(cls, (family, name))
    if cls not in _NAMES:
        raise SmeltError(f"{cls.__name__} is not a method of smelt; register it under the entry point '{GROUP}'")
    return _NAMES[cls]


def text(method: object) -> str:
    """Recipe text: `name(field=value, ...)` with the fields that differ from their defaults. parse(text(m)) == m."""
    return _text(method, name_of(method)[0])


def _text(method: object, inside: str) -> str:
    """As written inside a method of family `inside`, where the short name must still mean this method."""
    family, name = name_of(method)
    if family != inside and (name in _listing(inside) or sum(name in _listing(f) for f in FAMILIES) > 1):
        name = f"{family}.{name}"
    shown = []
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        if not field.init or (field.default is not dataclasses.MISSING and field.default == value):
            continue
        if field.default_factory is not dataclasses.MISSING and field.default_factory() == value:
            continue
        shown.append(f"{field.name}={_literal(value, family)}")
    return f"{name}({', '.join(shown)})"


def _literal(value: Any, family: str) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _text(value, family)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_literal(v, family) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k, family)}: {_literal(v, family)}" for k, v in value.items()) + "}"
    if isinstance(value, float) and math.isfinite(value):
        return float.__repr__(value)
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"  # the literal that reads back as infinity
    if value is None or type(value) in (bool, int, str, bytes):
        return repr(value)
    raise SmeltError(f"{family}: {_shown(value)} cannot be written in a recipe")


def parse(source: str, family: str) -> Any:
    """One method of the family, or a list of them, from recipe text. A bare name means its defaults."""
    _listing(family)
    if not isinstance(source, str):
        raise SmeltError(f"{family}: {_shown(source)} is not a method; write name(parameter=value)")
    if len(source) > LONGEST:
        raise SmeltError(f"{family}: '{_short(source)}' has {len(source)} characters; a method has at most {LONGEST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser's remarks on odd literals
            tree = ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SmeltError(f"{family}: cannot read '{_short(source)}'; write a method as name(parameter=value)") from None
    try:
        return _value(tree, family, top=True)
    except (RecursionError, MemoryError):
        raise SmeltError(f"{family}: '{_short(source)}' is nested too deeply") from None


def _value(node: ast.expr, family: str, top: bool = False) -> Any:
    if isinstance(node, ast.Call):
        owner, name = _called(node.func, family, top)
        values: dict[str, Any] = {}
        cls = load(owner, name)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
        if node.args:
            example = next(iter(fields), "parameter")
            raise SmeltError(f"{owner}: {name}: parameters are written by name, as {name}({example}=...)")
        for given in node.keywords:
            if given.arg is None:
                raise SmeltError(f"{owner}: {name}: '**' is not allowed in a recipe")
            if given.arg in values:
                raise SmeltError(f"{owner}: {name}: parameter '{given.arg}' is given twice")
            if given.arg not in fields:
                raise SmeltError(f"{owner}: {name} has no parameter '{given.arg}'{nearest(given.arg, fields)}")
            values[given.arg] = _value(given.value, owner)
        return build(cls, values, f"{owner}: {name}")
    if isinstance(node, (ast.Name, ast.Attribute)) and top:
        owner, name = _called(node, family, top)
        return build(load(owner, name), {}, f"{owner}: {name}")
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item, family, top) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.Dict) and not top and all(key is not None for key in node.keys):
        keys = [_value(key, family) for key in node.keys if key is not None]
        try:
            return dict(zip(keys, [_value(v, family) for v in node.values]))
        except TypeError:
            raise SmeltError(f"{family}: '{_short(ast.unparse(node))}' has a key that cannot be one") from None
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        hint = f"; write {node.id}()" if isinstance(node, ast.Name) and any(node.id in _listing(f) for f in FAMILIES) else ""
        raise SmeltError(f"{family}: '{_short(ast.unparse(node))}' is neither a literal nor a method{hint}") from None
    if top:
        raise SmeltError(f"{family}: {_shown(value)} is not a method{nearest(_shown(value), names(family))}")
    return value


def _called(node: ast.expr, family: str, top: bool) -> tuple[str, str]:
    """(family, name) of a call: in its own family first, else in the one family that has the name, else `family.name`.

    Only what a method holds may come from another family: a stage's own method (`top`) may not.
    """
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        _listing(node.value.id)
        owner, name = node.value.id, node.attr
        if top and owner != family:
            raise SmeltError(f"{family}: '{owner}.{name}' is not a method of {family}")
        return owner, name
    if not isinstance(node, ast.Name):
        raise SmeltError(f"{family}: '{_short(ast.unparse(node))}' is not the name of a method")
    others = [f for f in FAMILIES if node.id in _listing(f)]
    if family in others or not others:
        return family, node.id  # load() names the nearest
    if top:
        raise SmeltError(f"{family}: no method '{node.id}'; it belongs to {' and '.join(others)}")
    if len(others) > 1:
        raise SmeltError(f"{family}: '{node.id}' is a method of {' and '.join(others)}; write {others[0]}.{node.id}()")
    return others[0], node.id


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """`cls(**values)` with every value checked against its annotation (type and range)."""
    try:
        hints = _hints(cls)
    except (NameError, TypeError, AttributeError) as error:
        raise SmeltError(f"{where}: the annotations of {cls.__name__} cannot be read: {error}") from error
    good = {}
    for name, value in values.items():
        if name not in hints:
            raise SmeltError(f"{where}: there is no parameter '{name}'{nearest(name, [f.name for f in dataclasses.fields(cls)])}")
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
    except (TypeError, ValueError, ArithmeticError) as error:
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

    if dataclasses.is_dataclass(hint):
        return None  # a method or record: being one is all that is asked, its fields were checked when it was built
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True))


def _checked(value: Any, hint: Any, where: str) -> Any:
    from pydantic import ValidationError
    from pydantic.errors import PydanticUserError

    if isinstance(value, float) and math.isnan(value):
        raise SmeltError(f"{where} is not a number")
    try:
        adapter = _adapter(hint)
    except (PydanticUserError, TypeError) as error:
        raise SmeltError(f"{where}: its annotation cannot be checked: {error}") from error
    if adapter is None:
        if isinstance(value, hint):
            return value
        raise SmeltError(f"{where} is {_shown(value)}; it should be a {hint.__name__}")
    said = ""
    for candidate in [value, tuple(value)] if isinstance(value, list) else [value]:  # a recipe may write a tuple as a list
        try:
            return adapter.validate_python(candidate)
        except ValidationError as error:
            said = said or error.errors(include_url=False)[0]["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        except (TypeError, ArithmeticError) as error:  # a protocol that cannot be tested, an integer too large for a float
            said = said or f"something else ({error})"
    options = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    more = nearest(value, [str(o) for o in options]) if options and isinstance(value, str) else ""
    raise SmeltError(f"{where} is {_shown(value)}; it should be {said[:1].lower() + said[1:]}{more}")


def _shown(value: Any) -> str:
    """repr for a message: short, and safe for integers of any length."""
    try:
        return _short(repr(value))
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too long to show"


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
    path = _source(family, name, module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SmeltError(f"cannot be read: {error}", file=str(path)) from error
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    if not wanted:
        exported = [
            [e.value for e in n.value.elts if isinstance(e, ast.Constant)]
            for n in tree.body
            if isinstance(n, ast.Assign) and isinstance(n.value, (ast.List, ast.Tuple))
            if any(isinstance(t, ast.Name) and t.id == "__all__" for t in n.targets)
        ]
        if len(exported) != 1 or len(exported[0]) != 1:
            raise SmeltError(f"{family}: {module} must export exactly one class in __all__")
        wanted = str(exported[0][0])
    if wanted not in classes:
        raise SmeltError(f"{family}: {module} defines no class '{wanted}'{nearest(wanted, classes)}")
    doc = ast.get_docstring(classes[wanted]) or ""
    imports = [(n.module or "", one.asname or one.name) for n in tree.body if isinstance(n, ast.ImportFrom) for one in n.names]
    constants = {n.target.id: n.value for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.value}
    named = _Named({local: module.rpartition(".")[2] for module, local in imports if local[:1].isupper()}, constants)
    paper, fields = {"title": "", "link": "", "where": ""}, []
    for item in classes[wanted].body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if item.target.id == "paper" and isinstance(item.value, ast.Call):
                given = [*zip(paper, item.value.args), *((k.arg, k.value) for k in item.value.keywords)]
                paper |= {str(k): v.value for k, v in given if isinstance(v, ast.Constant) and isinstance(v.value, str)}
            elif "ClassVar" not in ast.unparse(item.annotation):
                fields.append((item.target.id, ast.unparse(named.visit(item.value)) if item.value else ""))
    return About(family, name, wanted, doc.split("\n")[0], **paper, fields=tuple(fields), docstring=doc)


class _Named(ast.NodeTransformer):
    """A default as a recipe says it: `field(default_factory=lambda: RTN(bits=3))` is `rtn(bits=3)`, by the file RTN is imported from."""

    def __init__(self, files: dict[str, str], constants: dict[str, ast.expr]):
        self.files, self.constants = files, constants  # class: the file it is imported from, which is a method's name

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.constants.get(node.id, node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        made = next((k.value for k in node.keywords if k.arg == "default_factory"), None)
        if isinstance(made, ast.Lambda):
            return self.visit(made.body)
        if isinstance(made, ast.Name):
            return self.visit(ast.Call(made, [], []))
        if ast.unparse(node.func) == "registry.parse" and isinstance(node.args[0], ast.Constant):
            return ast.Name(f"{str(node.args[0].value).removesuffix('()')}()")
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in self.files:
            node.func = ast.Name(self.files[node.func.id])
        return node


def _source(family: str, name: str, module: str) -> Path:
    """The file of a module. Packages on the way are located, not imported."""
    if module == f"smelt.{family}.{name}":
        return ROOT / family / f"{name}.py"
    parts = module.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
        for at in range(1, len(parts)):
            inside = spec.submodule_search_locations if spec else None
            spec = importlib.machinery.PathFinder.find_spec(".".join(parts[: at + 1]), list(inside)) if inside else None
    except ValueError:  # a module that was not imported from a file, such as __main__
        spec = None
    if spec is None or not spec.origin:
        raise SmeltError(f"{family}: the entry point of '{name}' names {module}, which is not installed")
    return Path(spec.origin)


def held(method: object) -> Iterator[object]:
    """The method and every method it holds."""
    if isinstance(method, (list, tuple, dict)):
        for item in method.values() if isinstance(method, dict) else method:
            yield from held(item)
    elif dataclasses.is_dataclass(method) and not isinstance(method, type):
        yield method
        for field in dataclasses.fields(method):
            yield from held(getattr(method, field.name))


def replaced(method: Any, old: object, new: object) -> Any:
    """The method with `new` in the place of `old`, which is itself or what it holds, at any depth."""
    if method is old:
        return new
    if isinstance(method, (list, tuple)):
        return type(method)(replaced(item, old, new) for item in method)
    if not dataclasses.is_dataclass(method) or isinstance(method, type) or not any(item is old for item in held(method)):
        return method
    return dataclasses.replace(method, **{f.name: replaced(getattr(method, f.name), old, new) for f in dataclasses.fields(method)})


def source_digest(method: object) -> str:
    """Of the source files of a method, of all it holds and of all they import: a changed method redoes the stages that used it."""
    digest = hashlib.sha256()
    for part in held(method):
        source = inspect.getsourcefile(type(part))
        digest.update(repr(type(part)).encode() if source is None else code_digest(Path(source)).encode())
    return digest.hexdigest()


def code_digest(path: Path) -> str:
    """Of a source file and of every file of its package that it imports, directly or not. Of smelt's own, the files that
    only read, check and show (`QUIET`) do not count: no result follows from them."""
    found: set[Path] = set()
    left = [path.resolve()]
    while left:
        file = left.pop()
        if file in found or (file.parent == ROOT and file.name in QUIET):
            continue
        found.add(file)
        state = file.stat()
        left += _imported(file, state.st_mtime_ns, state.st_size)
    digest = hashlib.sha256()
    for file in sorted(found):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@cache
def _imported(file: Path, *state: int) -> tuple[Path, ...]:
    """Files of its own package that a file imports, and the `__init__.py` beside it."""
    if not (file.parent / "__init__.py").is_file():
        return ()
    top = file.parent
    while (top.parent / "__init__.py").is_file():
        top = top.parent
    wanted = [file.parent / "__init__"]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            wanted += [top.parent.joinpath(*name.name.split(".")) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1] if node.level else top.parent
            base = base.joinpath(*(node.module or "").split(".")) if node.module else base
            wanted += [base, *(base / name.name for name in node.names)]
    near = [place for place in wanted if place.is_relative_to(top)]
    found = {option for place in near for option in (place.with_name(place.name + ".py"), place / "__init__.py") if option.is_file()}
    return tuple(sorted(found))
