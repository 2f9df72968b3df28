"""Laws of every probe. None is named here."""

from __future__ import annotations

import math

import pytest
import torch

from smelt import registry
from smelt.cache._calibrated import Calibrated
from smelt.evaluate import Metric, Probe
from smelt.runtime import bind
from smelt.spec import SmeltError

CLASSES = {name: registry.load("evaluate", name) for name in registry.names("evaluate")}
PROBES = [pytest.param(cls.example(), id=name) for name, cls in CLASSES.items() if cls.example() is not None]
BOUND = [
    pytest.param({}, id="plain"),
    *(pytest.param({"cache": registry.load("cache", n).example()}, id=n) for n in registry.names("cache")),
]


def hooks(model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def look(model):
    with torch.no_grad():
        logits = model(input_ids=torch.arange(2, 60)[None], use_cache=False).logits
    return hooks(model), sorted(vars(model)), model.training, model.config.to_dict(), model.generation_config.to_dict(), logits


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_is_a_probe_that_builds_from_its_text(cls):
    assert issubclass(cls, Probe) and isinstance(cls.paired, bool)
    for probe in (cls(), cls.example() or cls()):
        assert registry.parse(registry.text(probe), "evaluate") == probe


# Every probe without a method and through every second cache, every cache under every second probe; the others with -m slow.
MEASURED = [
    pytest.param(p.values[0], b.values[0], id=f"{p.id}-{b.id}", marks=[pytest.mark.slow] if j and (i + j) % 2 else [])
    for i, p in enumerate(PROBES)
    for j, b in enumerate(BOUND)
]


@pytest.mark.parametrize("probe, methods", MEASURED)
def test_measures_say_what_they_are_repeat_and_leave_the_model_alone(variant, probe, methods, tmp_path):
    methods = dict(methods)
    if isinstance(methods.get("cache"), Calibrated):
        methods["cache"] = methods["cache"].calibrated(variant.model, [torch.randint(2, 300, (4, 64))], tmp_path)
    with bind(variant.model, **methods):
        variant.cache = methods.get("cache")
        before = look(variant.model)
        state = torch.get_rng_state()
        found = [probe(variant) for _ in range(2)]
        after = look(variant.model)
    assert all(a == b for a, b in zip(before[:-1], after[:-1], strict=True)) and torch.equal(before[-1], after[-1])
    assert torch.equal(state, torch.get_rng_state())
    assert found[0]
    for metric in found[0]:
        assert isinstance(metric, Metric) and metric.name.isidentifier() and metric.unit and metric.better in ("lower", "higher")
        assert all(map(math.isfinite, (metric.value, *metric.samples, *metric.weights)))
        if metric.weights:
            assert len(metric.weights) == len(metric.samples) and min(metric.weights) >= 0
            assert metric.value == pytest.approx(sum(metric.samples) / sum(metric.weights))
    names = [metric.name for metric in found[0]]
    assert len(set(names)) == len(names) and names == [metric.name for metric in found[1]]
    if probe.paired:
        assert not any(metric.samples for metric in found[0])  # the driver collects them
    else:
        assert found[0] == found[1]


@pytest.mark.parametrize("probe", PROBES)
def test_an_error_inside_the_model_leaves_no_hook(variant, probe, monkeypatch):
    before = hooks(variant.model)

    def fail(*args, **kwargs):
        raise SmeltError("planted")

    monkeypatch.setattr(variant.model, "forward", fail)
    with pytest.raises(SmeltError, match="planted"):
        probe(variant)
    assert hooks(variant.model) == before


def test_metric_names_belong_to_one_probe(variant):
    names = [m.name for param in PROBES for m in param.values[0](variant)]
    assert len(set(names)) == len(names)
