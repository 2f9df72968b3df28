"""What can be known of a recipe before any weight is read: refusals, and estimates of memory, disk and time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from smelt import registry
from smelt._train_judge import learner
from smelt.attention._mixer import Converting, convert, place
from smelt.cache._calibrated import Calibrated
from smelt.decode._learned import Learned
from smelt.distill import READS, Procedure
from smelt.distill._teacher import named
from smelt.model._files import header
from smelt.model._load import configuration, is_decoder, locate, vocabulary
from smelt.model._walk import linears, parts
from smelt.progress import clock
from smelt.rank._training import FILE, untrained
from smelt.recipe import RUNTIME, Recipe, Training, Variant, lookup, variants
from smelt.runtime import compatible
from smelt.spec import SmeltError
from smelt.train import reads
from smelt.weights import PerMatrix, Scaled
from smelt.weights._adapter import Adapter
from smelt.weights._whole import Restructure

__all__ = ["Plan", "bindable", "check", "plan"]

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Plan:
    """One variant as it will be: parameters, and what making it costs."""

    name: str
    text: str
    parameters: int
    disk: int = 0  # bytes it leaves
    memory: int = 0  # bytes resident at its peak
    flops: float = 0.0
    half: bool = False  # its products are in bf16


def check(recipe: Recipe, root: Path, trust: dict[str, bool]) -> list[str]:
    """Lines for the terminal. Raises SmeltError with file and line for what cannot work."""
    plans = plan(recipe, trust)
    lines = [f"{recipe.file}: {len(plans)} variants, {len(recipe.evaluate)} probes, seeds {', '.join(map(str, recipe.seeds))}", ""]
    rates = {half: speed(half) for half in {p.half for p in plans if p.flops}}
    seconds = {p.name: p.flops / rates[p.half] if p.flops else 0.0 for p in plans}
    lines.append(f"{'variant':<34}{'parameters':>12}{'memory':>10}{'disk':>10}{'time':>14}")
    for p in plans:
        takes = f"about {clock(seconds[p.name])}" if p.flops else ""
        lines.append(f"{p.name[:33]:<34}{_size(p.parameters):>12}{_bytes(p.memory):>10}{_bytes(p.disk):>10}{takes:>14}")
    disk, memory = sum(p.disk for p in plans), max(p.memory for p in plans)
    lines += ["", f"peak memory about {_bytes(memory)}, " + (f"disk {_bytes(disk)}" if disk else "no new checkpoint")]
    if rates:
        measured = " and ".join(f"{rate / 1e9:.0f} GFLOP/s in {'bf16' if half else 'fp32'}" for half, rate in sorted(rates.items()))
        lines[-1] += f", training about {clock(len(recipe.seeds) * sum(seconds.values()))} at {measured} as measured now"
    existing = next(f for f in [root, *root.absolute().parents] if f.exists())
    free = shutil.disk_usage(existing).free
    if disk * len(recipe.seeds) > free:
        raise SmeltError(f"this recipe leaves about {_bytes(disk * len(recipe.seeds))} and {existing} has {_bytes(free)} free")
    have = psutil.virtual_memory().available if not torch.cuda.is_available() else torch.cuda.mem_get_info()[0]
    if memory > have:
        lines.append(f"warning: {_bytes(have)} of memory are free here; a smaller train.micro or train.context needs less")
    if True in rates and (full := rates.get(False) or speed()) > 1.2 * rates[True]:
        lines.append(f"warning: products of fp32 are {full / rates[True]:.1f} times as fast here; --set train.precision=fp32 trains faster")
    return [*lines, "ok: nothing stands against this recipe"]


def plan(recipe: Recipe, trust: dict[str, bool]) -> list[Plan]:
    """Every variant's size and cost. Refuses what cannot work, naming the recipe's line."""
    found: dict[str, Plan] = {}
    configs: dict[str, Any] = {}
    bound: dict[str, dict[str, Any]] = {}
    packed: dict[str, bool] = {}
    judged: dict[str, bool] = {}
    tokenizer = None
    recipe.data.digest()
    for variant in variants(recipe):
        line = variant.stage.line if variant.stage else 1
        said = {word: found[name] for word, name in lookup(recipe).items() if name in found}
        try:
            if variant.stage is None or variant.parent is None:
                config, found["base"], tokenizer = _base(recipe, trust)
                configs["base"], bound["base"], packed["base"] = config, {}, _packed(config)
                judged["base"] = _ranks(recipe, trust)
                continue
            config = configs[variant.parent]
            parent = found[variant.parent]
            bound[variant.name] = dict(bound[variant.parent])
            packed[variant.name] = packed[variant.parent]
            judged[variant.name] = judged[variant.parent]
            if variant.stage.kind in RUNTIME:
                if isinstance(variant.method, Converting):
                    found[variant.name] = _converted(variant, config, parent, packed[variant.name])
                    configs.setdefault(variant.name, config)
                    continue
                bound[variant.name][variant.stage.kind] = variant.method
                if variant.stage.kind == "rank" and variant.stage.train is not None:
                    found[variant.name], judged[variant.name] = _judged(variant, config, parent, packed[variant.name], trust, said), True
                    configs.setdefault(variant.name, config)
                    continue
                if variant.stage.kind == "rank" and not judged[variant.name]:
                    _refuse_untrained(variant.method, config)
                methods = {k: v for k, v in bound[variant.name].items() if k in ("cache", "attention", "decode")}
                compatible(config, **methods)
                found[variant.name] = _bound(variant, config, parent)
            elif packed[variant.name]:
                raise SmeltError(
                    f"{variant.stage.kind}: '{variant.parent}' is quantized and can be neither trained nor compressed; quantize last"
                )
            elif isinstance(variant.method, Adapter):
                said_so = registry.text(variant.method)
                raise SmeltError(f"weights: '{said_so}' learns; name it in a train block: train: {{adapter: {said_so}, tokens: 500_000}}")
            elif variant.stage.kind == "weights":
                configs[variant.name] = config = _target(variant, config)
                packed[variant.name] = bool(getattr(variant.method, "quantizes", False))
                found[variant.name] = _compressed(variant, config, parent, recipe)
            else:
                found[variant.name] = _trained(variant, config, parent, recipe, tokenizer, trust, said)
            configs.setdefault(variant.name, config)
        except SmeltError as error:
            raise error.at(recipe.file, line) from error.__cause__
    halves = {v.name for v in variants(recipe) if v.stage is not None and v.stage.train is not None and v.stage.train.precision == "bf16"}
    return [replace(p, half=name in halves) for name, p in found.items()]


def bindable(recipe: Recipe, combinations: Iterable[dict[str, Any]], trust: dict[str, bool]) -> None:
    """Raises SmeltError where methods {family: method or None} cannot be bound to the recipe's model as it is."""
    config, ranks = _base(recipe, trust)[0], _ranks(recipe, trust)
    for bound in combinations:
        compatible(config, *(bound.get(family) for family in ("cache", "attention", "decode")))
        for part in (part for method in bound.values() if method is not None for part in registry.held(method)):
            if isinstance(part, Calibrated):
                part.state(config.get_text_config(decoder=True), 0)
            elif isinstance(part, Learned):
                part.file  # noqa: B018 (raises where there is none)
        if "rank" in bound and not ranks:
            _refuse_untrained(bound["rank"], config)


def _ranks(recipe: Recipe, trust: dict[str, bool]) -> bool:
    """Whether the recipe's model was trained to rank."""
    return isinstance(recipe.model, str) and (locate(recipe.model, **trust) / FILE).is_file()


def _refuse_untrained(method: Any, config: Any) -> None:
    """Raises SmeltError for a judge whose heads have to be trained and were not."""
    if (judge := learner(method)) is not None and not getattr(judge, "weights", None):
        with torch.device("meta"):
            if judge.heads(config.get_text_config()) is not None:
                raise untrained(registry.name_of(judge)[1])


def _bound(variant: Variant, config: Any, parent: Plan) -> Plan:
    """Costs nothing but for a draft that has to be trained, over a target that only reads."""
    method, settings, text = variant.method, variant.stage.train, registry.text(variant.method)  # type: ignore[union-attr]
    if not isinstance(method, Learned):
        return Plan(variant.name, text, parent.parameters)
    if settings is None:
        method.file  # noqa: B018 (raises where there is none)
        return Plan(variant.name, text, parent.parameters)
    sizes = parts(config)
    if settings.context > sizes.context:
        raise SmeltError(f"train: context={settings.context} is longer than the model's {sizes.context} positions")
    settings.data.digest()
    with torch.device("meta"):
        made = method.module(config.get_text_config(decoder=True))
    count = sum(p.numel() for p in made.parameters())
    flops = settings.steps * settings.batch * settings.context * (2.0 * parent.parameters + method.cost(made, config))
    rows = 4 * (settings.micro or settings.batch) * settings.context * (14 * sizes.hidden + 4 * sizes.ffn + 3 * sizes.vocab)
    return Plan(variant.name, text, parent.parameters, disk=4 * count, memory=4 * parent.parameters + 16 * count + rows, flops=flops)


def _converted(variant: Variant, config: Any, parent: Plan, packed: bool) -> Plan:
    """Built without memory, which refuses shapes that do not fit."""
    settings, text = variant.stage.train, registry.text(variant.method)  # type: ignore[union-attr]
    if packed:
        raise SmeltError(f"attention: '{variant.parent}' is quantized and cannot be converted; quantize last")
    if settings is not None and settings.context > parts(config).context:
        raise SmeltError(f"train: context={settings.context} is longer than the model's {parts(config).context} positions")
    with torch.device("meta"):
        model = _empty(config)
        place(model, convert(model, variant.method))
    count = sum(p.numel() for p in model.parameters())
    positions = settings.steps * settings.batch * settings.context if settings is not None else 0
    return Plan(variant.name, text, count, disk=4 * count, memory=8 * (count + parent.parameters), flops=4.0 * count * positions)


def _judged(variant: Variant, config: Any, parent: Plan, packed: bool, trust: dict[str, bool], said: dict[str, Plan]) -> Plan:
    """A judge whose model is trained; the loop's own refusals, before it starts."""
    settings, judge = variant.stage.train, learner(variant.method)  # type: ignore[union-attr]
    assert settings is not None
    if packed:
        raise SmeltError(f"rank: '{variant.parent}' is quantized and cannot be trained; quantize last")
    text = config.get_text_config()
    if judge.together and settings.context > text.max_position_embeddings:
        raise SmeltError(f"train: context={settings.context} is longer than the model's {text.max_position_embeddings} positions")
    teachers = named(settings.teacher)[0]
    if bool(teachers) != (judge.labels is not None):
        raise SmeltError(f"train: {registry.text(judge)} needs both a 'teacher' and labels=, or neither")
    for who in teachers:
        if who not in said:
            locate(who, **trust)
    with torch.device("meta"):
        heads = judge.heads(text)
    count = parent.parameters + (sum(p.numel() for p in heads.parameters()) if heads is not None else 0)
    positions = settings.steps * settings.batch * settings.context
    rows = 4 * (settings.micro or settings.batch) * settings.context * (14 * text.hidden_size * text.num_hidden_layers)
    flops = 6.0 * parent.parameters * positions
    return Plan(variant.name, registry.text(variant.method), count, disk=4 * count, memory=16 * count + rows, flops=flops)


def _packed(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _base(recipe: Recipe, trust: dict[str, bool]) -> tuple[Any, Plan, Any]:
    if not isinstance(recipe.model, str):
        config = recipe.model.config()
        count = parameters(config)
        return config, Plan("base", registry.text(recipe.model), count, disk=4 * count, memory=8 * count), None
    folder = locate(recipe.model, **trust)
    try:
        config, _ = configuration(folder, trust.get("trust_remote_code", False))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.get("trust_remote_code", False))
    except Exception as error:
        raise SmeltError(
            f"model '{recipe.model}': its configuration or tokenizer cannot be read: {str(error).splitlines()[0][:200]}"
        ) from error
    count = 0
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        for _, shape in header(folder).values():
            size = 1
            for n in shape:
                size *= n
            count += size
    return config, Plan("base", recipe.model, count or parameters(config), memory=4 * count), tokenizer


def _target(variant: Variant, config: Any) -> Any:
    method = variant.method
    return method.target(config) if isinstance(method, Restructure) else config


def _compressed(variant: Variant, config: Any, parent: Plan, recipe: Recipe) -> Plan:
    settings = variant.stage.calibrate  # type: ignore[union-attr]
    assert settings is not None
    sizes = parts(config)
    count = parameters(config) if isinstance(variant.method, Restructure) else parent.parameters
    tokens = settings.rows * settings.context
    kept = tokens * sizes.hidden * 4 * 2
    flops = 2.0 * parent.parameters * tokens * 2
    disk = 4 * count - _saved(variant.method, config)
    return Plan(variant.name, registry.text(variant.method), count, disk=disk, memory=8 * parent.parameters + kept, flops=flops)


def _saved(method: Any, config: Any) -> int:
    """Bytes that a method for single matrices takes off a float32 checkpoint. Asks its budget, which refuses shapes that do not fit."""
    last = method.quantizer if isinstance(method, Scaled) else method
    if not isinstance(last, PerMatrix):
        return 0
    shapes = [(module.out_features, module.in_features) for _, _, module in linears(_empty(config))]
    saved = 0.0
    for (out, columns), budget in zip(shapes, last.budget(shapes), strict=True):
        stored = budget.bits * out * columns / 8 if budget.bits is not None else 4 * (budget.numbers or out * columns)
        saved += 4 * out * columns - stored
    return int(saved)


def needs(method: Any) -> tuple[str, bool]:
    """What a distill method needs of a teacher ("model", "text" or "no"), and whether that may have another tokenizer."""
    if isinstance(method, Procedure):
        return method.taught, method.taught == "text"
    reading = reads(method, READS)
    return "model" if any(name.startswith("teacher") for name in reading) else "no", "teacher_ids" in reading


def _trained(
    variant: Variant, config: Any, parent: Plan, recipe: Recipe, tokenizer: Any, trust: dict[str, bool], known: dict[str, Plan]
) -> Plan:
    settings: Training = variant.stage.train  # type: ignore[assignment,union-attr]
    sizes = parts(config)
    if settings.context > sizes.context:
        raise SmeltError(f"train: context={settings.context} is longer than the model's {sizes.context} positions")
    settings.data.digest()
    taught, teacher_count = settings.teacher, 0
    if variant.stage.kind == "distill":  # type: ignore[union-attr]
        name = registry.name_of(variant.method)[1]
        wants, foreign = needs(variant.method)
        if wants != "no" and taught is None:
            raise SmeltError(f"distill: {name} learns from a teacher; add 'teacher: base' (or a model) to its train block")
        if wants == "model" and "endpoint" in taught:
            raise SmeltError(f"distill: {name} reads the teacher's tensors, which an endpoint does not give; name a model")
        for who in named(taught)[0] if wants != "no" else ():
            if who in known:  # the model before any stage, or another variant of this recipe
                teacher_count += known[who].parameters
                continue
            folder = locate(who, **trust)
            theirs = AutoTokenizer.from_pretrained(folder)
            if wants == "model" and not foreign and tokenizer is not None and vocabulary(theirs) != vocabulary(tokenizer):
                raise SmeltError(
                    f"distill: the teacher '{who}' has another tokenizer than '{recipe.model}'; their token ids mean different things"
                )
            teacher_count += sum(_count(shape) for _, shape in header(folder).values())
    micro = settings.micro or settings.batch
    tokens = settings.steps * settings.batch * settings.context
    n = parent.parameters
    trained = n if settings.adapter is None else _learned(settings.adapter, config)
    states = 4 * n + 12 * trained + 4 * teacher_count
    activations = (
        4 * micro * settings.context * (sizes.layers * (14 * sizes.hidden + 4 * sizes.ffn) + (6 if teacher_count else 3) * sizes.vocab)
    )
    attention = 12.0 * sizes.layers * sizes.heads * sizes.head_dim * settings.context / 2
    flops = tokens * (4.0 * n + 2.0 * trained + 2.0 * teacher_count + attention)
    return Plan(variant.name, registry.text(variant.method), n, disk=4 * n, memory=states + activations, flops=flops)


def _learned(adapter: Any, config: Any) -> int:
    """Weights of an adapter, counted on the meta device."""
    if not isinstance(adapter, Adapter):
        raise SmeltError(f"train: adapter: '{registry.text(adapter)}' is no adapter; one is lora(rank=8), another sequential_adapter()")
    return adapter.parameters(_empty(config))


def _count(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def parameters(config: Any) -> int:
    """Parameters of a configuration, counted on the meta device: no memory, no weights."""
    return _empty(config).num_parameters()


def _empty(config: Any) -> Any:
    """The model without its weights."""
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM if is_decoder(config) else AutoModel
        return auto.from_config(config)


def speed(half: bool = False) -> float:
    """FLOP/s of a training-like product on this machine, in bf16 or fp32, measured for a quarter of a second."""
    how: dict[str, Any] = {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": torch.bfloat16 if half else torch.float32}
    a, b = torch.randn(2048, 256, **how), torch.randn(256, 768, **how)
    (a @ b).sum().item()  # the first one makes its kernel
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < 0.25:
        (a @ b).sum().item()
        done += 1
    return 0.8 * done * 2 * 2048 * 256 * 768 / (time.perf_counter() - began)


def _size(n: float) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def _bytes(n: float) -> str:
    return f"{n / 2**30:.1f} GB" if n >= 2**30 else f"{n / 2**20:.0f} MB" if n else ""
