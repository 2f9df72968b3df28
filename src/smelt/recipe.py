"""A YAML file of at most a screen becomes a frozen Recipe; every name and parameter is checked, no weight is read.

    name: quickstart
    model: embedded                 # embedded | a folder | a hub id | a new model such as mistral(data=stdlib())
    data: stdlib                    # the corpus of every block that names none, and of the evaluation
    stages:
      - weights: minitron(layers=4)
        calibrate: {rows: 64}
      - distill: [forward_kl(), cross_entropy()]      # a list is a fork: each starts from the same student
        train: {teacher: base, tokens: 500_000}
      - cache: kivi(bits=2)
    evaluate: [perplexity, latency, memory]
    expect:
      - forward_kl.bits_per_byte <= 1.0 * cross_entropy.bits_per_byte

Every error names the file, the line, what is wrong and the nearest right name.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Interval

from smelt import registry
from smelt.spec import SmeltError, nearest

__all__ = [
    "Calibration", "Expectation", "Recipe", "Stage", "Training", "Variant", "claim", "corpus", "lookup", "one_or_none", "read", "recipe_of",
    "shipped", "variants",
]  # fmt: skip

STAGES = ("weights", "distill", "align", "cache", "attention", "decode", "rank")
RUNTIME = ("cache", "attention", "decode", "rank")
BLOCKS = ("train", "calibrate")
KEYS = ("name", "model", "data", "seed", "seeds", "stages", "evaluate", "expect", "about")
ENDPOINT = ("endpoint", "model", "key", "per_minute", "parallel", "timeout", "retries")  # `key` names an environment variable
LARGEST = 1 << 20  # bytes of a recipe


@dataclass(frozen=True)
class Training:
    """The `train:` block. Sizes are global: any number of processes does the same training."""

    data: Any = None  # corpus; the recipe's `data` when not given
    tokens: Annotated[int, Ge(1)] = 1_000_000  # positions trained on, in all
    context: Annotated[int, Ge(2)] = 512  # tokens of a row
    batch: Annotated[int, Ge(1)] = 16  # rows of an optimizer step, over all processes
    micro: Annotated[int, Ge(0)] = 0  # rows of one forward on one process; 0: as many as the step has
    lr: Annotated[float, Gt(0)] = 1e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Interval(ge=0, lt=1)] = 0.05  # share of the steps
    floor: Annotated[float, Interval(ge=0, le=1)] = 0.1  # last learning rate / lr
    weight_decay: Annotated[float, Ge(0)] = 0.1
    clip: Annotated[float, Gt(0)] = 1.0  # gradient norm
    boundaries: Literal["cross", "mask"] = "cross"  # may a row attend across document ends
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False  # torch.compile: about 1.2 times on CPU after 40 s; needs a C++ compiler
    teacher: Any = None  # `base`, a model, a list of them, {model: NAME, cache: topk(k=64)}, or {endpoint: URL, model: NAME}
    adapter: Any = None  # of family `weights`: only it is trained, such as lora(rank=8)
    shard: Literal["none", "fsdp2"] = "none"  # under torchrun: split weights and optimizer state over the processes
    save_seconds: Annotated[float, Gt(0)] = 60.0  # between checkpoints

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.tokens / (self.batch * self.context)))


@dataclass(frozen=True)
class Calibration:
    """The `calibrate:` block: rows of the train split whose activations the weights methods see."""

    data: Any = None  # corpus; the recipe's `data` when not given
    rows: Annotated[int, Ge(1)] = 64
    context: Annotated[int, Ge(2)] = 256
    batch: Annotated[int, Ge(1)] = 8


@dataclass(frozen=True)
class Stage:
    """One line of a recipe. `methods` has more than one entry when the stage is a fork."""

    kind: str
    methods: tuple[Any, ...]
    train: Training | None = None
    calibrate: Calibration | None = None
    line: int = 0
    optional: bool = False  # `none` is in the list: a search may leave the stage out


@dataclass(frozen=True)
class Expectation:
    """left (<=, >=, <, >) right, over `variant.metric`, numbers, + - * /."""

    text: str
    line: int = 0


@dataclass(frozen=True)
class Variant:
    """A point of the recipe's tree: the model after a path of stages."""

    name: str  # shortest unique way to say the path, `base` for no stage
    path: tuple[int, ...]  # which method of each stage was taken
    stage: Stage | None
    method: Any
    parent: str | None


@dataclass(frozen=True)
class Recipe:
    name: str
    model: Any  # text, or a method of family `model`
    data: Any  # corpus
    seeds: tuple[int, ...]
    stages: tuple[Stage, ...]
    evaluate: tuple[Any, ...]
    expect: tuple[Expectation, ...]
    file: str
    text: str
    about: str = ""

    @property
    def seed(self) -> int:
        return self.seeds[0]


def shipped(kind: str) -> Path:
    """Folder of the `recipes` or `claims` that come with smelt: in the package, or beside `src` in a checkout."""
    inside = Path(__file__).parent / f"_{kind}"
    return inside if inside.is_dir() else Path(__file__).parents[2] / kind


def read(source: str | Path, overrides: dict[str, str] | None = None, *, text: str | None = None) -> Recipe:
    """Read and check a recipe file (or `text`, with `source` as its name in messages)."""
    file = str(source)
    if text is None:
        path = Path(source)
        try:
            if path.stat().st_size > LARGEST:
                raise SmeltError("a recipe is a screen of YAML; this file is larger than 1 MB", file=file)
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise SmeltError(f"cannot be read: {reason}", file=file) from None
    page = _Page(file, text)
    for key, value in (overrides or {}).items():
        page.override(key, value)
    return _Reader(page).recipe()


def recipe_of(file: str | Path, model: str | None = None, data: str | None = None, overrides: dict[str, str] | None = None) -> Recipe:
    """The recipe of a file, with another model or other text in the place of its own."""
    given = {"model": model, "data": data}
    return read(file, dict(overrides or {}) | {key: json.dumps(value) for key, value in given.items() if value})


def claim(name: str, overrides: dict[str, str] | None = None) -> Recipe:
    """The claim of a method, `kivi` or `cache.kivi`; its name is the longer one."""
    claims = {f"{p.parent.name}.{p.stem}": p for p in sorted(shipped("claims").glob("*/*.yaml"))}
    found = [full for full in claims if full == name or full.partition(".")[2] == name]
    if not found:
        raise SmeltError(f"no claim for '{name}'{nearest(name, [f.partition('.')[2] for f in claims])}")
    if len(found) > 1:
        raise SmeltError(f"'{name}' has several claims: {', '.join(found)}")
    recipe = read(claims[found[0]], overrides)
    if not recipe.expect:
        raise SmeltError("this claim expects nothing", file=recipe.file)
    return dataclasses.replace(recipe, name=found[0])


class _Page:
    """The YAML as plain values, with the line of every key and item: `lines[("stages", 0, "train")]`."""

    def __init__(self, file: str, text: str):
        self.file, self.text, self.lines = file, text, {(): 1}
        try:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
                raise SmeltError("YAML aliases (*name) are not used in recipes", file=file)
            loader = yaml.SafeLoader(text)
            try:
                node = loader.get_single_node()
                self.value = self._plain(loader, node, ()) if node is not None else {}
            finally:
                loader.dispose()
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            what = getattr(error, "problem", None) or "it is not YAML"
            raise SmeltError(f"not readable as YAML: {what}", file=file, line=mark.line + 1 if mark else 1) from None
        except (ValueError, OverflowError, RecursionError, TypeError) as error:
            raise SmeltError(f"not readable as YAML: {str(error) or type(error).__name__}", file=file, line=1) from None

    def _plain(self, loader: Any, node: Any, path: tuple) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        if len(path) > 12:
            raise SmeltError("nested too deeply for a recipe", file=self.file, line=line)
        if isinstance(node, yaml.MappingNode):
            table: dict[str, Any] = {}
            for key_node, value_node in node.value:
                at = key_node.start_mark.line + 1
                key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
                if not isinstance(key, str):
                    raise SmeltError("a key must be a word", file=self.file, line=at)
                if key in table:
                    raise SmeltError(f"'{key}' is given twice", file=self.file, line=at)
                self.lines[(*path, key)] = at
                table[key] = self._plain(loader, value_node, (*path, key))
            return table
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.lines[(*path, index)] = item.start_mark.line + 1
                items.append(self._plain(loader, item, (*path, index)))
            return items
        value = loader.construct_object(node)
        if value is not None and not isinstance(value, (str, int, float, bool)):
            raise SmeltError(f"'{node.value[:40]}' is a {type(value).__name__}; write text in quotes", file=self.file, line=line)
        return value

    def line(self, path: tuple) -> int:
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]

    def override(self, key: str, value: str) -> None:
        """`--set seed=1`, `--set stages.0.train.tokens=1000`; `train.x` and `calibrate.x` reach every such block."""
        try:
            new = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise SmeltError(f"--set {key}={value}: the value is not readable as YAML") from None
        words = key.split(".")
        if words[0] in BLOCKS and isinstance(self.value, dict):
            stages = self.value.get("stages") or []
            blocks = [s[words[0]] for s in stages if isinstance(s, dict) and isinstance(s.get(words[0]), dict)]
            if not blocks or len(words) != 2:
                raise SmeltError(f"--set {key}: no stage of this recipe has a '{words[0]}' block, or the key is not {words[0]}.NAME")
            for block in blocks:
                block[words[1]] = new
            return
        owner: Any = self.value
        for at, word in enumerate(words):
            last = at == len(words) - 1
            if isinstance(owner, list) and word.isdigit() and int(word) < len(owner):
                if last:
                    owner[int(word)] = new
                else:
                    owner = owner[int(word)]
            elif isinstance(owner, dict) and last:
                owner[word] = new
            elif isinstance(owner, dict) and word in owner:
                owner = owner[word]
            else:
                near = nearest(word, [str(k) for k in owner]) if isinstance(owner, dict) else ""
                raise SmeltError(f"--set {key}: there is no '{word}' here{near}")


class _Reader:
    def __init__(self, page: _Page):
        self.page = page

    def wrong(self, message: str, path: tuple = ()) -> SmeltError:
        return SmeltError(message, file=self.page.file, line=self.page.line(path))

    def placed(self, path: tuple, make: Any, *args: Any) -> Any:
        """make(*args), its error given this file and line."""
        try:
            return make(*args)
        except SmeltError as error:
            raise error.at(self.page.file, self.page.line(path)) from error.__cause__

    def recipe(self) -> Recipe:
        top = self.page.value
        if not isinstance(top, dict):
            raise self.wrong("a recipe is a table of keys: name, model, stages, evaluate")
        for key in top:
            if key not in KEYS:
                raise self.wrong(f"no key '{key}' in a recipe{nearest(key, KEYS)}", (key,))
        name = top.get("name", Path(self.page.file).stem)
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
            raise self.wrong(f"name: {name!r} is not a name of letters, digits, '_', '-' and '.'", ("name",))
        model = top.get("model", "embedded")
        if not isinstance(model, str) or not model.strip():
            raise self.wrong("model: a folder, a hub id or 'embedded' is expected", ("model",))
        if "(" in model:
            model = self.placed(("model",), registry.parse, model, "model")
        data = self.placed(("data",), corpus, top.get("data", "stdlib"))
        stages = tuple(self.stages(top.get("stages", []), data))
        evaluate = self.methods(top.get("evaluate", []), "evaluate", ("evaluate",), empty=True)
        recipe = Recipe(
            name,
            model,
            data,
            self.seeds(top),
            stages,
            evaluate,
            tuple(self.expectations(top.get("expect"))),
            self.page.file,
            self.page.text,
            str(top.get("about", "")),
        )
        known = lookup(recipe) if recipe.expect else {}
        for expectation in recipe.expect:
            for variant, _ in terms(expectation):
                if variant not in known:
                    raise SmeltError(
                        f"expect: there is no variant '{variant}'{nearest(variant, known)}", file=recipe.file, line=expectation.line
                    )
        return recipe

    def seeds(self, top: dict[str, Any]) -> tuple[int, ...]:
        seed, seeds = top.get("seed", 0), top.get("seeds")
        if seeds is None:
            seeds = [seed]
        elif isinstance(seeds, int) and not isinstance(seeds, bool) and 1 <= seeds <= 1000:
            seeds = [seed + i for i in range(seeds)] if isinstance(seed, int) else [seed]
        good = isinstance(seeds, list) and seeds and all(type(s) is int and 0 <= s < 1 << 31 for s in seeds)
        if not good or len(set(seeds)) != len(seeds):
            key = "seeds" if "seeds" in top else "seed"
            raise self.wrong(f"{key}: {top.get(key)!r}; whole numbers from 0 are expected", (key,))
        return tuple(seeds)

    def stages(self, value: Any, data: Any) -> Iterator[Stage]:
        if value is None:
            value = []
        if not isinstance(value, list):
            raise self.wrong("stages: a list is expected, each item like '- cache: kivi(bits=2)'", ("stages",))
        for index, item in enumerate(value):
            path: tuple = ("stages", index)
            if not isinstance(item, dict) or not item:
                raise self.wrong("a stage is a table such as '- cache: kivi(bits=2)'", path)
            for key in item:
                if key not in STAGES + BLOCKS:
                    raise self.wrong(f"no stage or block '{key}'{nearest(key, STAGES + BLOCKS)}", (*path, key))
            kinds = [key for key in item if key in STAGES]
            if len(kinds) > 1:
                raise self.wrong(f"a stage does one thing; this one has {' and '.join(kinds)}", path)
            if not kinds and "train" not in item:
                raise self.wrong("a stage needs a method such as 'weights:', 'distill:' or 'cache:', or a 'train:' block", path)
            kind = kinds[0] if kinds else "distill"
            methods = self.methods(item.get(kind, "cross_entropy()"), kind, (*path, kind))
            optional = isinstance(item.get(kind), list) and "none" in item[kind]
            train = self.block(Training, item["train"], "train", (*path, "train"), data) if "train" in item else None
            calibrate = self.block(Calibration, item["calibrate"], "calibrate", (*path, "calibrate"), data) if "calibrate" in item else None
            if kind in ("distill", "align") and train is None:
                raise self.wrong(f"a {kind} stage needs a 'train:' block, such as train: {{teacher: base, tokens: 500_000}}", path)
            drafts = [m for m in methods if kind == "decode" and getattr(m, "trains", False)]  # those of decode._learned
            judges = kind == "rank" and all(any(getattr(h, "trains", False) for h in registry.held(m)) for m in methods)
            measures = kind == "cache" and any(
                getattr(h, "calibrates", False) and not getattr(h, "weights", None) for m in methods for h in registry.held(m)
            )
            for draft in drafts:
                said = registry.text(draft)
                if draft.weights and train is not None:
                    raise self.wrong(f"{kind}: {said} has been trained; leave out its weights, or the 'train:' block", (*path, "train"))
                if not draft.weights and train is None:
                    block = "train: {tokens: 500_000, context: 256, batch: 8}"
                    raise self.wrong(f"{kind}: {said} is a draft that learns; give it '{block}', or weights='FOLDER' of one that has", path)
            taught = kind == "attention" and all(getattr(m, "transfers", False) for m in methods)  # attention._mixer.Transferring
            if kind == "rank" and train is not None and not judges:
                learn = [n for n in registry.names(kind) if getattr(registry.load(kind, n), "trains", False)]
                raise self.wrong(f"{kind}: what takes a 'train:' block is a judge that learns: {', '.join(learn)}", (*path, "train"))
            if kind not in ("distill", "align", "rank") and train is not None and not (drafts or taught):
                article = "an" if kind[0] == "a" else "a"
                raise self.wrong(f"{article} {kind} stage takes no 'train:' block; train in a stage of its own", (*path, "train"))
            if (kind == "weights" or measures) and calibrate is None:
                calibrate = Calibration(data=data)
            if kind != "weights" and not measures and calibrate is not None:
                raise self.wrong(f"{'an' if kind[0] == 'a' else 'a'} {kind} stage takes no 'calibrate:' block", (*path, "calibrate"))
            yield Stage(kind, methods, train, calibrate, self.page.line(path), optional)

    def methods(self, value: Any, family: str, path: tuple, empty: bool = False) -> tuple[Any, ...]:
        listed = isinstance(value, list)
        items = rejoined(value) if listed else [value]
        found = []
        for index, item in enumerate(items):
            at = (*path, index) if listed else path
            if item == "none" and listed and family in STAGES:
                continue  # Stage.optional
            if not isinstance(item, str):
                raise self.wrong(f"{family}: {item!r} is not a method; write name(parameter=value)", at)
            method = self.placed(at, registry.parse, item, family)
            more = method if isinstance(method, list) else [method]
            for one in more:
                if isinstance(one, (tuple, dict)) or self.placed(at, registry.name_of, one)[0] != family:
                    raise self.wrong(f"{family}: '{item}' is no method of this family", at)
                if one in found:
                    raise self.wrong(f"{family}: '{item}' is listed twice", at)
                found.append(one)
        if not found and not empty:
            raise self.wrong(f"{family}: the list is empty", path)
        return tuple(found)

    def block(self, cls: type, value: Any, name: str, path: tuple, data: Any) -> Any:
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.wrong(f"{name}: a table such as {{data: stdlib}} is expected", path)
        fields = {f.name for f in dataclasses.fields(cls)}
        good: dict[str, Any] = {"data": data}
        for key, given in value.items():
            at = (*path, key)
            if key not in fields:
                raise self.wrong(f"{name}: no setting '{key}'{nearest(key, fields)}", at)
            if key == "data":
                good[key] = self.placed(at, corpus, given)
            elif key == "teacher":
                good[key] = self.placed(at, _teacher, given)
            elif key == "adapter":
                good[key] = self.placed(at, _adapter, given)
            else:
                if isinstance(given, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", given):
                    given = float(given)  # YAML 1.1 reads 1e-3 as text
                good[key] = self.placed(at, registry.build, cls, {key: given}, name) and given
        return self.placed(path, registry.build, cls, good, name)

    def expectations(self, value: Any) -> Iterator[Expectation]:
        if value is None:
            return
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.wrong("expect: a list of lines such as 'a.bits_per_byte <= 1.02 * base.bits_per_byte'", ("expect",))
        for index, text in enumerate(value):
            expectation = Expectation(text, self.page.line(("expect", index)))
            self.placed(("expect", index), lambda e=expectation: list(terms(e)))
            yield expectation


def corpus(value: Any) -> Any:
    """A corpus from recipe text: `stdlib`, `dedup(corpus=stdlib())`, a path or glob, a `datasets` name owner/name."""
    if not isinstance(value, str) or not value.strip():
        raise SmeltError(f"data: {value!r} is neither a corpus, a path nor a datasets name")
    value = value.strip()
    if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?(\(.*\))?", value, re.DOTALL) and not Path(value).exists():
        method = registry.parse(value, "data")
        if isinstance(method, (list, tuple)):
            raise SmeltError(f"data: one corpus is expected, not {value}")
        return method
    if re.fullmatch(r"[\w.-]+/[\w.-]+", value) and not Path(value).exists() and not Path(value).suffix:
        return registry.build(registry.load("data", "hub"), {"name": value}, "data")
    return registry.build(registry.load("data", "files"), {"path": value}, "data")


def one_or_none(text: str, family: str) -> list[Any]:
    """`[none, kivi(bits=2)]` -> [None, Kivi(bits=2)]."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SmeltError(f"{family}: cannot read '{text}'; write [none, name(parameter=value)]") from None
    parts = tree.elts if isinstance(tree, (ast.List, ast.Tuple)) else [tree]
    found = [ast.unparse(p) for p in parts]
    return [None if t in ("none", "None") else registry.parse(t, family) for t in found]


def rejoined(items: list[Any]) -> list[Any]:
    """`[kivi(bits=2, window=32), h2o()]` is three items for YAML, which splits at every comma; put the calls together."""
    found: list[Any] = []
    depth = 0
    for item in items:
        if depth > 0:
            found[-1] += f", {item}"
        else:
            found.append(item)
        depth = found[-1].count("(") - found[-1].count(")") if isinstance(found[-1], str) else 0
    return found


def _teacher(value: Any) -> Any:
    """A dict with `model` (a name, or a list of them) and `cache`, or with `endpoint` and what it needs."""
    if isinstance(value, str) and value.strip():
        return {"model": value.strip()}
    if _names(value):
        return {"model": rejoined(value)}
    if isinstance(value, dict):
        known = ENDPOINT if "endpoint" in value else ("model", "cache")
        for key in value:
            if key not in known:
                raise SmeltError(f"teacher: no setting '{key}'{nearest(key, known)}")
        if "endpoint" in value and all(isinstance(value.get(key), str) for key in ("endpoint", "model")):
            least = {"parallel": 1, "timeout": 0.001}
            wrong = [key for key in known[3:] if type(value.get(key, 1)) not in (int, float) or value.get(key, 1) < least.get(key, 0)]
            if wrong or not isinstance(value.get("key", ""), str):
                raise SmeltError(f"teacher: {wrong[0] if wrong else 'key'}: {value[wrong[0] if wrong else 'key']!r} will not do")
            return value
        model, cache = value.get("model", "base"), value.get("cache", "")
        if "endpoint" not in value and (isinstance(model, str) or _names(model)) and isinstance(cache, str):
            return {"model": "base", **value}
    raise SmeltError(
        f"teacher: {value!r}; write a model, a list of models, {{model: base, cache: topk(k=64)}} or {{endpoint: URL, model: NAME}}"
    )


def _adapter(value: Any) -> Any:
    """One method of family `weights`; that it is an adapter is for those to see who may import it."""
    method = registry.parse(value, "weights") if isinstance(value, str) else None
    if method is None or isinstance(method, (list, tuple, dict)):
        raise SmeltError(f'adapter: {value!r}; one method is expected, such as lora() or "lora(rank=8, alpha=16)"')
    return method


def _names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name.strip() for name in value)


Path_ = tuple[int, ...]  # which method of each stage was taken


def variants(recipe: Recipe) -> list[Variant]:
    """Every variant in the order of the recipe: the base, then stage by stage, branch by branch."""
    methods, ways, owner = _tree(recipe)
    called: dict[Path_, str] = {(): "base"}
    for path, names in ways.items():
        called[path] = next((n for n in names if owner.get(n) == path), names[-1])
    found = [Variant("base", (), None, None, None)]
    for path in ways:
        found.append(Variant(called[path], path, recipe.stages[len(path) - 1], methods[path], called[path[:-1]]))
    return found


def lookup(recipe: Recipe) -> dict[str, str]:
    """{any unambiguous way to say a variant: its name}, for expectations: `kivi`, `kivi(bits=4)`, `forward_kl.kivi`."""
    names = {v.path: v.name for v in variants(recipe)}
    return {said: names[path] for said, path in _tree(recipe)[2].items()} | {"base": "base"}


def _tree(recipe: Recipe) -> tuple[dict[Path_, Any], dict[Path_, list[str]], dict[str, Path_]]:
    """({path: its last method}, {path: ways to say it, shortest first}, {unambiguous way: path}) without the empty path.

    The text of a method goes before its bare name: beside `kivi(bits=4)`, `kivi` is the one with its defaults.
    """
    paths: list[Path_] = [()]
    for depth, stage in enumerate(recipe.stages):
        if stage.optional:
            what = f"{stage.kind}: 'none' leaves the stage out, which only `smelt search` tries; take it from the list to run all others"
            raise SmeltError(what, file=recipe.file, line=stage.line)
        paths += [(*p, i) for p in [p for p in paths if len(p) == depth] for i in range(len(stage.methods))]
    methods = {p: recipe.stages[len(p) - 1].methods[p[-1]] for p in paths if p}
    bare = {p: registry.name_of(m)[1] for p, m in methods.items()}
    full = {p: registry.text(m).removesuffix("()") for p, m in methods.items()}

    def chains(words: dict[Path_, str], path: Path_) -> list[str]:
        return [".".join(words[path[:n]] for n in range(start, len(path) + 1)) for start in range(len(path), 0, -1)]

    owner: dict[str, Path_] = {}
    said: set[str] = {"base"}
    for words in (full, bare):
        owners: dict[str, set[Path_]] = {}
        for path in methods:
            for name in chains(words, path):
                owners.setdefault(name, set()).add(path)
        owner |= {name: next(iter(those)) for name, those in owners.items() if len(those) == 1 and name not in said}
        said |= set(owners)
    ways = {p: list(dict.fromkeys([chains(bare, p)[0], *chains(full, p), *chains(bare, p)])) for p in methods}
    return methods, ways, owner


OPERATORS = {ast.LtE: "<=", ast.GtE: ">=", ast.Lt: "<", ast.Gt: ">"}


def _compare(expectation: Expectation) -> ast.Compare:
    try:
        tree = ast.parse(expectation.text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if not isinstance(tree, ast.Compare) or len(tree.ops) != 1 or type(tree.ops[0]) not in OPERATORS:
        raise SmeltError(f"expect: '{expectation.text}' is not of the form 'variant.metric <= 1.02 * base.metric'")
    return tree


def _named(node: ast.expr) -> str:
    """A variant as it is written in an expectation -> its name: settings that are the default may be spelled out."""
    if isinstance(node, ast.Attribute):
        return f"{_named(node.value)}.{node.attr}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return f"{_named(node.func.value)}.{_named(ast.Call(ast.Name(node.func.attr), node.args, node.keywords))}"
    family = next((f for f in STAGES if isinstance(node, ast.Call) and ast.unparse(node.func) in registry.names(f)), None)
    if family:
        return registry.text(registry.parse(ast.unparse(node), family)).removesuffix("()")
    return ast.unparse(node).removesuffix("()")


def terms(expectation: Expectation) -> Iterator[tuple[str, str]]:
    """(variant, metric) pairs an expectation speaks of. Raises SmeltError for anything but arithmetic over them."""
    tree = _compare(expectation)

    def walk(node: ast.expr) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
            yield from walk(node.left)
            yield from walk(node.right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield from walk(node.operand)
        elif isinstance(node, ast.Attribute):
            yield _named(node.value), node.attr
        elif not (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
            raise SmeltError(f"expect: '{ast.unparse(node)[:60]}' is neither a number nor variant.metric")

    yield from walk(tree.left)
    yield from walk(tree.comparators[0])


def held(expectation: Expectation, value: Any) -> tuple[bool, float, float]:
    """(held, left, right), with `value(variant, metric)` looking figures up."""
    tree = _compare(expectation)

    def number(node: ast.expr) -> float:
        if isinstance(node, ast.Constant):
            return float(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.UnaryOp):
            return -number(node.operand)
        if isinstance(node, ast.Attribute):
            return float(value(_named(node.value), node.attr))
        assert isinstance(node, ast.BinOp)
        left, right = number(node.left), number(node.right)
        if isinstance(node.op, ast.Div):
            return left / right if right else math.nan
        return left + right if isinstance(node.op, ast.Add) else left - right if isinstance(node.op, ast.Sub) else left * right

    left, right = number(tree.left), number(tree.comparators[0])
    operator = OPERATORS[type(tree.ops[0])]
    return {"<=": left <= right, ">=": left >= right, "<": left < right, ">": left > right}[operator], left, right
