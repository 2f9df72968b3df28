"""Run a recipe: every stage takes a folder and leaves a folder named by the digest of all that went into it.

    runs/<name>/stages/<method>-<digest>/   a checkpoint and stage.json          runs/<name>/model/     the result
    runs/<name>/measured/<digest>.json      figures of one probe on one variant  runs/<name>/results.json, report.html

A stage works in a hidden folder beside its place, is flushed to the disk and renamed: a kill, a full disk or a power
cut leave the whole folder or none, and the next call goes on where the last one was. One process holds the lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import smelt
from smelt import registry, report
from smelt._pipeline_files import disk_errors, flush, link_or_copy, write_json, write_text
from smelt._pipeline_machine import git_hash, machine, quiet, versions
from smelt._pipeline_results import as_metric, over_seeds, ratios
from smelt._train_convert import convert
from smelt._train_judge import learner, ranked
from smelt.attention._mixer import Converting
from smelt.cache._calibrated import Calibrated
from smelt.compress import calibration_rows, compress, save_compressed
from smelt.data._tokens import Tokens, tokenize
from smelt.decode._learned import Learned
from smelt.distill._endpoint import Endpoint
from smelt.distill._teacher import named
from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._measure import measure
from smelt.model._files import identity
from smelt.model._load import Loaded, aliased, load, locate, save, vocabulary
from smelt.preflight import bindable
from smelt.progress import clock, note, track
from smelt.recipe import RUNTIME, Recipe, Stage, claim, held, lookup, one_or_none, read, recipe_of, shipped, variants
from smelt.runtime import bind
from smelt.spec import SmeltError, nearest
from smelt.train import draft, prefer, teach
from smelt.weights._adapter import FOLDER
from smelt.weights._merge import Merge, merge_folders

__all__ = ["Run", "bench", "run", "verify"]


STAGE = (
    "seconds",
    "text",
    "digest",
    "log",
    "steps",
    "tokens",
    "flops",
    "warnings",
    "resumed_at",
    "papers",
    "report",
)  # of stage.json, shown elsewhere


def run(
    recipe: str | Path | Recipe | None = None,
    *,
    model: str | None = None,
    data: str | None = None,
    overrides: dict[str, str] | None = None,
    folder: str | Path = "runs",
    store: str | Path | None = None,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Run a recipe (the default one when none is named) and return its results.

    `model` and `data` replace the recipe's. Stages, token ids and figures are kept in `store`, by default the run's own
    folder; recipes that share one share what they have in common. Raises SmeltError for everything the person can
    mend. Calling again reuses every finished stage and figure.
    """
    if not isinstance(recipe, Recipe):
        recipe = recipe_of(recipe or shipped("recipes") / "quickstart.yaml", model, data, overrides)
    with disk_errors():
        work = Run(recipe, Path(folder) / recipe.name, trust_pickle, trust_remote_code, Path(store) if store else None)
        with work.locked():
            return work.everything()


def bench(
    model: str,
    choices: dict[str, str],
    evaluate: str = "[perplexity, latency, memory]",
    *,
    data: str | None = None,
    folder: str | Path = "runs",
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Any], Path]:
    """Measure every combination of runtime methods on one model in turns: `{"cache": "[none, kivi(bits=2)]"}`.

    The first combination is what the others are compared with. Returns the results and their folder.
    """
    lists: list[list[tuple[str, Any]]] = []
    for family, text in choices.items():
        if family not in RUNTIME:
            raise SmeltError(f"bench compares runtime methods; no family '{family}'{nearest(family, RUNTIME)}")
        lists.append([(family, m) for m in one_or_none(text, family)])
    combinations = [dict(c) for c in itertools.product(*lists)] or [{}]
    text = f"name: bench\nmodel: {json.dumps(model)}\ndata: {json.dumps(data or 'stdlib')}\nevaluate: {evaluate}\n"
    recipe = read("bench", text=text)
    bindable(recipe, combinations, {"trust_pickle": trust_pickle, "trust_remote_code": trust_remote_code})
    with disk_errors():
        work = Run(recipe, Path(folder) / "bench", trust_pickle, trust_remote_code)
        with work.locked(), quiet():
            base, points = work.base(), []
            for bound in combinations:
                bound = {k: m for k, m in bound.items() if m is not None}
                name = ".".join(registry.text(m).removesuffix("()") for m in bound.values()) or "plain"
                key = digest("bench", base.key, *(registry.text(m) + registry.source_digest(m) for m in bound.values()))
                points.append(Point(name, name, "model" if not bound else next(iter(bound)), base.folder, key, None, bound))
            points = [p if i == 0 else dataclasses.replace(p, parent=points[0].name) for i, p in enumerate(points)]
            results = work.results(points, work.figures(points)) | {"seconds": 0.0, "expect": []}
            results["headline"] = {"from": points[0].name, "to": points[-1].name}
            work.deliver(results, points)
    return results, work.root


def verify(
    name: str | Recipe, overrides: dict[str, str] | None = None, folder: str | Path = "runs", ledger: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Run the claim of a method, or what `claim` read; append when, machine, versions, figures and held or not to the ledger."""
    recipe = name if isinstance(name, Recipe) else claim(name, overrides)
    results = run(recipe, folder=Path(folder) / "claims", store=Path(folder) / "claims")  # the same student and baselines serve many
    family, _, method = recipe.name.partition(".")
    entry = {
        "name": method,
        "family": family,
        "when": results["created"],
        "machine": results["machine"],
        "versions": results["versions"],
        "git": results["git"],
        "seeds": results.get("seeds", [results["seed"]]),
        "changed": overrides or {},
        "figures": results["expect"],
        "held": all(row["held"] for row in results["expect"]),
    }
    file = ledger or shipped("claims") / "ledger.jsonl"
    with disk_errors():
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")
    return results, entry, file


@dataclass(frozen=True)
class Point:
    """Where a variant stands: a checkpoint on disk and the runtime methods bound to it."""

    name: str
    text: str
    kind: str
    folder: Path
    key: str
    parent: str | None
    bound: dict[str, Any] = field(default_factory=dict)


class Run:
    """One recipe in one folder. `everything()` is the whole of `smelt run`."""

    def __init__(self, recipe: Recipe, root: Path, trust_pickle: bool = False, trust_remote_code: bool = False, store: Path | None = None):
        self.recipe, self.root, self.store = recipe, root, store or root
        self.trust: dict[str, Any] = {"trust_pickle": trust_pickle, "trust_remote_code": trust_remote_code}
        self.stages: list[dict[str, Any]] = []
        self.refusals: list[str] = []
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.seed = recipe.seed
        self.done: dict[str, Point] = {}

    # ------------------------------------------------------------------ the whole

    def everything(self) -> dict[str, Any]:
        began = time.monotonic()
        self.join_processes()
        with quiet():
            runs = []
            for seed in self.recipe.seeds:
                if len(self.recipe.seeds) > 1:
                    note(f"seed {seed}")
                self.seed, self.stages = seed, []
                points = self.points()
                if self.rank == 0:
                    runs.append(self.results(points, self.figures(points)))
                self.sync()
        if self.rank:
            return {}
        results = runs[0] if len(runs) == 1 else over_seeds(runs)
        results["seconds"] = time.monotonic() - began
        results["expect"] = list(self.expected(results))
        self.deliver(results, points)
        return results

    def points(self) -> list[Point]:
        """Every variant of the recipe, its stage done."""
        done = self.done = {}
        for variant in variants(self.recipe):
            if variant.stage is None or variant.parent is None:
                done["base"] = self.base()
            else:
                parent = done[variant.parent]
                work = {"weights": self.weights, "distill": self.train, "align": self.train}.get(variant.stage.kind, self.bound)
                with aliased(self.aliases):
                    done[variant.name] = work(variant.name, variant.stage, variant.method, parent)
        return list(done.values())

    @property
    def aliases(self) -> dict[str, Path]:
        """Every way to say a variant that is done, and its folder: what a teacher, a draft or a model to merge may be called."""
        return {said: self.done[name].folder for said, name in lookup(self.recipe).items() if name in self.done}

    def named(self, method: Any) -> str:
        """Digest of the models that a method names in its fields: its text says only what they are called."""
        aliases = self.aliases
        values = [getattr(part, f.name) for part in registry.held(method) for f in dataclasses.fields(part)]  # type: ignore[arg-type]
        words = [word for value in values for word in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(word, str)]
        models = [
            word
            for word in words
            if word == "embedded" or word in aliases or (word and len(word) < 1000 and Path(word, "config.json").is_file())
        ]
        files = [Path(word).stat() for word in words if word and len(word) < 1000 and Path(word).is_file()]  # examples to learn from
        with aliased(aliases):
            return " ".join([identity(locate(word, **self.trust)) for word in models] + [f"{f.st_size} {f.st_mtime_ns}" for f in files])

    def base(self) -> Point:
        model = self.recipe.model
        if isinstance(model, str):
            folder = locate(model, **self.trust)
            return Point("base", model, "model", folder, digest("model", identity(folder)), None)
        key = digest("model", registry.text(model), registry.source_digest(model), corpora(model), self.seed)

        def make(partial: Path) -> dict[str, Any]:
            made, tokenizer = model.create(self.seed)
            save(made, tokenizer, partial / "result")
            return {"parameters": made.num_parameters()}

        folder = self.stage("base", "model", model, key, make)
        return Point("base", registry.text(model), "model", folder, key, None)

    # ------------------------------------------------------------------ stages

    def weights(self, name: str, stage: Stage, method: Any, parent: Point) -> Point:
        settings = stage.calibrate
        assert settings is not None
        source = registry.source_digest(method) + spine("compress") + self.named(method)
        key = digest("weights", registry.text(method), source, parent.key, self.seed, block(settings))

        def make(partial: Path) -> dict[str, Any]:
            if isinstance(method, Merge):
                others, origin = (
                    [locate(word, **self.trust) for word in words] for words in (method.models, [method.base] * method.needs_base)
                )
                return {"report": merge_folders(method, [parent.folder, *others], origin[0] if origin else None, partial / "result")}
            loaded = self.load_plain(parent, name)
            tokens = self.tokens(settings.data, "train", loaded.tokenizer, together=False)
            rows = calibration_rows(tokens, settings.rows, settings.context, settings.batch, self.seed)
            model, about = compress(loaded.model, loaded.tokenizer, method, rows, place=partial / "compress", seed=self.seed)
            save_compressed(model, loaded.tokenizer, partial / "result", about, dtype=stored_dtype(parent.folder))
            return {"report": about}

        folder = self.stage(name, "weights", method, key, make)
        return Point(name, registry.text(method), "weights", folder, key, parent.name, parent.bound)

    def train(self, name: str, stage: Stage, method: Any, parent: Point) -> Point:
        settings = stage.train
        assert settings is not None
        taught = settings.teacher or {}
        folders = [locate(who, **self.trust) for who in named(settings.teacher)[0]]
        source = registry.source_digest(method) + spine("train") + self.named(method) + corpora(method)
        source += registry.source_digest(settings.adapter) if settings.adapter else ""
        key = digest(
            stage.kind, registry.text(method), source, parent.key, self.seed, block(settings),
            " ".join(map(identity, folders)), taught.get("cache", ""), "endpoint" in taught and [taught["endpoint"], taught["model"]],
        )  # fmt: skip

        def make(partial: Path) -> dict[str, Any]:
            loaded = self.load_plain(parent, name)
            teachers = [load(folder, **self.trust) for folder in folders]
            place = partial / "train"
            common: dict[str, Any] = {"seed": self.seed, "label": name, "cache_folder": self.store / "teacher"}
            if stage.kind == "align":
                about = prefer(loaded, teachers[0] if teachers else None, settings.data, method, settings, place, **common)
            else:
                tokens = self.tokens(settings.data, "train", loaded.tokenizer)
                server = (
                    Endpoint(taught["endpoint"], **{k: v for k, v in taught.items() if k != "endpoint"}) if "endpoint" in taught else None
                )
                about = teach(loaded, teachers, tokens, method, settings, place, reader=self.tokens, speaker=server, **common)
                about |= {"endpoint": server.cost} if server else {}
            if self.rank == 0:
                save(loaded.model, loaded.tokenizer, partial / "result", dtype=stored_dtype(parent.folder))
                if (place / FOLDER).is_dir():
                    os.rename(place / FOLDER, partial / "result" / FOLDER)
            return about | ({"papers": papers(settings.adapter)} if settings.adapter else {})

        folder = self.stage(name, stage.kind, method, key, make, together=True)
        return Point(name, registry.text(method), stage.kind, folder, key, parent.name, parent.bound)

    def bound(self, name: str, stage: Stage, method: Any, parent: Point) -> Point:
        if isinstance(method, Converting):
            return self.converted(name, stage, method, parent)
        if stage.train is not None and isinstance(method, Learned):
            return self.drafted(name, stage, method, parent)
        if stage.train is not None and learner(method) is not None:
            return self.ranked(name, stage, method, parent)
        unmeasured = next((held for held in registry.held(method) if isinstance(held, Calibrated) and not held.weights), None)
        if unmeasured is not None:
            return self.measured(name, stage, method, unmeasured, parent)
        source = registry.source_digest(method) + self.named(method)
        source += identity(method.file.parent) if isinstance(method, Learned) else ""
        key = digest(stage.kind, registry.text(method), source, parent.key)
        bound = {**parent.bound, stage.kind: method}
        about = {"name": name, "kind": stage.kind, "text": registry.text(method), "digest": key, "folder": None, "seconds": 0.0}
        self.stages.append({**about, "reused": False, "warnings": [], "log": [], "papers": papers(method), "report": {}})
        return Point(name, registry.text(method), stage.kind, parent.folder, key, parent.name, bound)

    def drafted(self, name: str, stage: Stage, method: Any, parent: Point) -> Point:
        """A decoding method whose draft is trained over the parent's checkpoint, as it is without what is bound to it."""
        settings = stage.train
        assert settings is not None
        source = registry.source_digest(method) + spine("train")
        key = digest(stage.kind, registry.text(method.learned), source, parent.key, self.seed, block(settings))

        def make(partial: Path) -> dict[str, Any]:
            loaded = load(parent.folder, **self.trust)
            tokens = self.tokens(settings.data, "train", loaded.tokenizer)
            return draft(loaded, tokens, method, settings, partial / "train", partial / "result", seed=self.seed, label=name)

        folder = self.stage(name, stage.kind, method, key, make, together=True)
        trained = dataclasses.replace(method, weights=str(folder))
        key = digest(key, registry.text(method))  # of the variant: others may draft otherwise with the same weights
        return Point(name, registry.text(trained), stage.kind, parent.folder, key, parent.name, {**parent.bound, stage.kind: trained})

    def measured(self, name: str, stage: Stage, method: Any, part: Calibrated, parent: Point) -> Point:
        """A cache method that is measured on text through the parent's checkpoint; `part` is it or what it holds."""
        settings = stage.calibrate
        assert settings is not None
        source = registry.source_digest(part) + spine("compress")
        key = digest(stage.kind, registry.text(part), source, parent.key, self.seed, block(settings))

        def make(partial: Path) -> dict[str, Any]:
            loaded = load(parent.folder, **self.trust)
            tokens = self.tokens(settings.data, "train", loaded.tokenizer, together=False)
            rows = calibration_rows(tokens, settings.rows, settings.context, settings.batch, self.seed)
            part.calibrated(loaded.model, [row["input_ids"].to(loaded.model.device) for row in rows], partial / "result")
            return {"report": {"calibration": f"{settings.rows} rows of {settings.context} tokens"}}

        folder = self.stage(name, stage.kind, part, key, make)
        whole = registry.replaced(method, part, dataclasses.replace(part, weights=str(folder)))  # type: ignore[type-var]
        key = digest(key, registry.text(method))
        return Point(name, registry.text(method), stage.kind, parent.folder, key, parent.name, {**parent.bound, stage.kind: whole})

    def converted(self, name: str, stage: Stage, method: Converting, parent: Point) -> Point:
        """A checkpoint whose attention is another mixer, taught beforehand where there is a `train:` block."""
        settings = stage.train
        source = registry.source_digest(method) + spine("_train_convert")
        key = digest(stage.kind, registry.text(method), source, parent.key, self.seed, block(settings) if settings else "")

        def make(partial: Path) -> dict[str, Any]:
            loaded = self.load_plain(parent, name)
            tokens = self.tokens(settings.data, "train", loaded.tokenizer) if settings else None
            about = convert(loaded, tokens, method, settings, partial / "train", seed=self.seed, label=name)
            save(loaded.model, loaded.tokenizer, partial / "result", dtype=stored_dtype(parent.folder))
            return about

        folder = self.stage(name, stage.kind, method, key, make, together=True)
        return Point(name, registry.text(method), stage.kind, folder, key, parent.name, parent.bound)

    def ranked(self, name: str, stage: Stage, method: Any, parent: Point) -> Point:
        """A rank method whose judge's model is trained: leaves a checkpoint, and is bound to it."""
        settings, judge = stage.train, learner(method)
        assert settings is not None
        folders = [locate(who, **self.trust) for who in named(settings.teacher)[0]]
        source = registry.source_digest(judge) + spine("_train_judge") + self.named(judge)  # whatever strategy asks it later
        who = " ".join(map(identity, folders))
        key = digest(stage.kind, registry.text(judge), source, parent.key, self.seed, block(settings), who)

        def make(partial: Path) -> dict[str, Any]:
            loaded = self.load_plain(parent, name)
            teacher = load(folders[0], **self.trust) if folders else None
            places = partial / "train", partial / "result", self.store / "teacher"
            about = ranked(loaded, teacher, method, settings, *places, seed=self.seed, label=name)
            save(loaded.model, loaded.tokenizer, partial / "result", dtype=stored_dtype(parent.folder))
            return about

        folder = self.stage(name, stage.kind, judge, key, make, together=True)
        trained = registry.replaced(method, judge, dataclasses.replace(judge, weights=str(folder)))
        key = digest(key, registry.text(method), registry.source_digest(method), self.named(method))
        return Point(name, registry.text(method), stage.kind, folder, key, parent.name, {**parent.bound, stage.kind: trained})

    def stage(self, name: str, kind: str, method: Any, key: str, make: Callable[[Path], dict], together: bool = False) -> Path:
        """Do a stage, or find it done. `make(partial)` fills partial/result; with `together` on every process."""
        place = self.store / "stages"
        slug = registry.name_of(method)[1]
        final, partial = place / f"{slug}-{key[:12]}", place / f".{slug}-{key[:12]}"
        self.sync()
        reused = (final / "stage.json").exists()
        self.sync()
        if not reused:
            note(f"{kind}: {registry.text(method)}")
            if self.rank == 0:
                partial.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(partial / "result", ignore_errors=True)
            self.sync()
            began = time.monotonic()
            about = make(partial) if together or self.rank == 0 else {}
            if self.rank == 0:
                about = {"seconds": time.monotonic() - began, "text": registry.text(method), "digest": key} | about
                (partial / "result" / "stage.json").write_text(json.dumps(about, indent=1, default=str))
                flush(partial / "result")
                os.rename(partial / "result", final)
                flush(place, deep=False)
                shutil.rmtree(partial, ignore_errors=True)
                note(f"  done in {clock(about['seconds'])}")
            self.sync()
        about = json.loads((final / "stage.json").read_text())
        self.stages.append(
            {
                "name": name, "kind": kind, "text": registry.text(method), "digest": key, "reused": reused,
                "folder": os.path.relpath(final, self.root), "seconds": about["seconds"], "tokens": about.get("tokens"),
                "flops": about.get("flops"), "log": about.get("log", []),
                "report": about.get("report", {}) | {k: v for k, v in about.items() if k not in STAGE},
                "warnings": about.get("warnings", []), "papers": papers(method) + about.get("papers", []),
            }
        )  # fmt: skip
        return final

    def load_plain(self, point: Point, name: str) -> Loaded:
        """The parent's model for training or compressing. Quantized checkpoints are refused."""
        if "quantization_config" in json.loads((point.folder / "config.json").read_text()):
            raise SmeltError(f"{name}: its model '{point.name}' is quantized and can be neither trained nor compressed; quantize last")
        return load(point.folder, **self.trust)

    def tokens(self, corpus: Any, split: Any, tokenizer: Any, together: bool = True) -> Tokens:
        """The ids of one split; `together` when every process asks for them at the same moment."""
        key = digest("tokens", corpus.digest(), vocabulary(tokenizer), split)
        folder = self.store / "tokens" / key[:16]
        if self.rank == 0 and not (folder / "tokens.json").exists():
            with track(f"reading {registry.text(corpus).removesuffix('()')}", 0, "bytes") as bar:
                tokenize(corpus, split, tokenizer, folder, bar.advance)
        if together:
            self.sync()
        return Tokens(folder)

    # ------------------------------------------------------------------ measuring

    def figures(self, points: list[Point]) -> dict[str, list[Metric]]:
        """{variant: metrics}. Quality is measured variant by variant and kept; times are measured in turns."""
        found: dict[str, list[Metric]] = {p.name: [] for p in points}
        loaded: dict[Path, Loaded] = {}
        quality = [p for p in self.recipe.evaluate if not p.paired]
        with track("measuring quality", len(points) * len(quality), "probes") as bar:
            for point in points:
                for probe in quality:
                    bar.note = f"{registry.name_of(probe)[1]} of {point.name}"
                    bar.advance(0)
                    found[point.name] += self.kept(point, probe, loaded)
                    bar.advance()
        timed = [p for p in self.recipe.evaluate if p.paired]
        for probe in timed:
            key = digest("paired", registry.text(probe), registry.source_digest(probe), *(p.key for p in points))
            file = self.store / "measured" / f"{key[:16]}.json"
            if not file.exists():
                label = f"measuring {registry.name_of(probe)[1]}"
                with track(label, 1, "rounds") as bar:
                    got = measure([self.opener(p, loaded) for p in points], [probe], progress=bar)
                write_json(file, {name: [m._asdict() for m in metrics] for name, metrics in got.items()})
            for name, metrics in json.loads(file.read_text()).items():
                found[name] += [as_metric(m) for m in metrics]
        return found

    def kept(self, point: Point, probe: Probe, loaded: dict[Path, Loaded]) -> list[Metric]:
        data = self.recipe.data.digest()
        key = digest("quality", registry.text(probe), registry.source_digest(probe), point.key, data)
        file = self.store / "measured" / f"{key[:16]}.json"
        if not file.exists():
            try:
                got = measure([self.opener(point, loaded)], [probe])[point.name]
            except SmeltError as refusal:
                name = registry.name_of(probe)[1]
                self.refusals.append(f"{point.name}: {name}: {refusal.message.removeprefix(name + ': ')}")
                return []
            write_json(file, [m._asdict() for m in got])
        return [as_metric(m) for m in json.loads(file.read_text())]

    def opener(self, point: Point, loaded: dict[Path, Loaded]) -> Callable[[], contextlib.AbstractContextManager[Variant]]:
        """A factory of the variant: loads the checkpoint once, binds its runtime methods for the block."""

        @contextlib.contextmanager
        def open_it() -> Iterator[Variant]:
            if point.folder not in loaded:
                loaded[point.folder] = load(point.folder, **self.trust)
            model, tokenizer, _ = loaded[point.folder]
            methods = {k: v for k, v in point.bound.items() if k in ("cache", "attention", "decode")}
            with aliased(self.aliases), bind(model, tokenizer=tokenizer, **methods):
                about = {"teacher": self.reference, "data": self.recipe.data, "folder": point.folder}
                yield Variant(point.name, model, tokenizer, **about, **point.bound)

        open_it.name = point.name  # type: ignore[attr-defined]
        return open_it

    @cached_property
    def reference(self) -> Loaded:
        """The model before any stage: what agreement is measured against."""
        return load(self.base().folder, **self.trust)

    # ------------------------------------------------------------------ results

    def results(self, points: list[Point], found: dict[str, list[Metric]]) -> dict[str, Any]:
        rows = []
        for point in points:
            about = {m.name: {"value": m.value, "unit": m.unit, "better": m.better} for m in found[point.name]}
            about["disk_bytes"] = {"value": float(stored_bytes(point.folder)), "unit": "bytes", "better": "lower"}
            inside = point.folder.is_relative_to(self.store)
            rows.append(
                {
                    "name": point.name, "text": point.text, "parent": point.parent, "kind": point.kind, "metrics": about,
                    "folder": os.path.relpath(point.folder, self.root) if inside else str(point.folder),
                }
            )  # fmt: skip
        return {
            "smelt": smelt.__version__,
            "name": self.recipe.name,
            "about": self.recipe.about,
            "recipe": self.recipe.text,
            "seed": self.seed,
            "git": git_hash(),
            "versions": versions(),
            "machine": machine(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "headline": self.headline(points),
            "variants": rows,
            "ratios": ratios(points, found),
            "stages": self.stages,
            "warnings": [f"{s['name']}: {w}" for s in self.stages for w in s["warnings"]],
            "refusals": self.refusals,
        }

    def headline(self, points: list[Point]) -> dict[str, str]:
        """From the base to the end of the first branch that left a checkpoint."""
        made = [p for p in points if p.folder != points[0].folder and p.folder not in {q.folder for q in points if q.name == p.parent}]
        if not made:
            return {"from": points[0].name, "to": points[-1].name}
        deepest = {v.name: len(v.path) for v in variants(self.recipe)}
        last = max(deepest[p.name] for p in made)
        return {"from": points[0].name, "to": next(p.name for p in made if deepest[p.name] == last)}

    def expected(self, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
        figures = {v["name"]: v["metrics"] for v in results["variants"]}
        named = lookup(self.recipe)

        def value(variant: str, metric: str) -> float:
            variant = named[variant]
            if metric not in figures[variant]:
                raise SmeltError(f"expect: '{variant}' has no figure '{metric}'; it has {', '.join(sorted(figures[variant])) or 'none'}")
            return figures[variant][metric]["value"]

        for expectation in self.recipe.expect:
            try:
                kept, left, right = held(expectation, value)
            except SmeltError as error:
                raise error.at(self.recipe.file, expectation.line) from None
            yield {"text": expectation.text, "held": kept, "left": left, "right": right}

    def deliver(self, results: dict[str, Any], points: list[Point]) -> None:
        """results.json, report.html, and model/: the headline's checkpoint with its card."""
        result = next(p for p in points if p.name == results["headline"]["to"])
        if result.folder.is_relative_to(self.store):
            target, temporary = self.root / "model", self.root / ".model"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for file in result.folder.iterdir():
                if file.is_file() and file.name != "stage.json":
                    link_or_copy(file, temporary / file.name)
            (temporary / "README.md").write_text(report.model_card(results, result.name), encoding="utf-8")
            flush(temporary)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(temporary, target)
        write_json(self.root / "results.json", results)
        write_text(self.root / "report.html", report.html(results))

    # ------------------------------------------------------------------ processes

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process (or one group of processes) works in a run folder; a second one waits and says so."""
        if self.rank:
            yield
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.store.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SmeltError(f"the run folder cannot be made: {error.strerror}", file=str(self.root)) from error
        lock = FileLock(self.store / ".lock")
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            note(f"another process is running in {self.store}; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def join_processes(self) -> None:
        """Under torchrun: one process group for the whole recipe; waiting has no time limit of minutes."""
        if self.world > 1 and not torch.distributed.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=7))

    def sync(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()


# ---------------------------------------------------------------------- helpers


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).hexdigest()


def block(settings: Any) -> str:
    """Text of a settings block: its corpus by digest, without what changes no result."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    values.pop("save_seconds", None)
    values.pop("teacher", None)
    corpus = values.pop("data")
    return json.dumps([values, registry.text(corpus), corpus.digest(), registry.source_digest(corpus)], sort_keys=True, default=str)


def spine(name: str) -> str:
    """Digest of a file of the spine with all it imports: a changed training loop redoes what was trained."""
    return registry.code_digest(Path(__file__).with_name(f"{name}.py"))


def corpora(method: Any) -> str:
    return " ".join(m.digest() for m in registry.held(method) if registry.name_of(m)[0] == "data")  # type: ignore[attr-defined]


def papers(method: Any) -> list[dict[str, str]]:
    return [{"title": m.paper.title, "link": m.paper.url, "where": m.paper.where} for m in registry.held(method)]  # type: ignore[attr-defined]


def stored_dtype(folder: Path) -> torch.dtype:
    """The precision a checkpoint was saved in; what comes of it is saved the same way."""
    config = json.loads((folder / "config.json").read_text())
    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)


def stored_bytes(folder: Path) -> int:
    """Of the weights as files: what a packed checkpoint saves even where it is unpacked when loaded."""
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
