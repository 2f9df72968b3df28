from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from smelt.compress import compress
from smelt.data import Document
from smelt.evaluate import Variant
from smelt.evaluate.perplexity import Perplexity
from smelt.evaluate.ptq_outliers import PTQOutliers, docstrings, pool
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import blocks
from smelt.spec import SmeltError
from smelt.weights.awq import AWQ
from smelt.weights.gptq import GPTQ
from smelt.weights.low_rank import LowRank
from smelt.weights.planted_outliers import PlantedOutliers
from smelt.weights.rtn import RTN


@dataclass(frozen=True)
class Text:
    """Modules with a docstring and code in the train split, and the same in the test split."""

    count: int = 12
    prose: bool = True

    def documents(self, split):
        for at in range(self.count):
            said = f'"""{at} is{" very" * 40} much."""\n' if self.prose else ""
            yield Document(f"{split}{at}.py", said + f"def f(x):\n    return {at} * x\n" * 20)

    def digest(self):
        return f"text-{self.count}-{self.prose}"


SMALL = PTQOutliers(AWQ(quantizer=RTN(bits=3, group=32)), Text(), seeds=2, rows=2, context=24, tokens=300, document=100)


@pytest.fixture
def small():
    return Variant("base", tiny("llama"), tiny_tokenizer(), data=Text())


def found(probe, variant):
    return {metric.name: metric for metric in probe(variant)}


def test_ratios_and_kurtosis_are_those_of_the_inputs(small):
    """Recorded with hooks in one plain forward; q_proj stands for what k_proj and v_proj read, gate_proj for up_proj."""
    (rows,) = SMALL._rows(small, "own", 0)
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, given, name=name: seen.setdefault(name.split(".")[-1], []).append(given[0]))
        for block in blocks(small.model)
        for name, module in block.named_modules()
        if name.endswith("proj")
    ]
    with torch.no_grad():
        small.model(**rows)
    for handle in handles:
        handle.remove()
    metrics = {m.name: m for m in SMALL._outliers(small, [rows])}
    assert len(metrics) == 8 and "outlier_ratio_k_proj" not in metrics and "outlier_ratio_up_proj" not in metrics
    for kind in ("q_proj", "o_proj", "gate_proj", "down_proj"):
        for layer, x in enumerate(seen[kind]):
            values = sorted(x.abs().flatten().double().tolist())
            ratio = values[-1] / values[(len(values) - 1) // 2]
            fourth = sum(v**4 for v in values) / len(values) / (sum(v * v for v in values) / len(values)) ** 2
            assert metrics[f"outlier_ratio_{kind}"].samples[layer] == pytest.approx(ratio, rel=1e-4)
            assert metrics[f"outlier_kurtosis_{kind}"].samples[layer] == pytest.approx(fourth, rel=1e-4)
        assert metrics[f"outlier_ratio_{kind}"].value == pytest.approx(np.mean(metrics[f"outlier_ratio_{kind}"].samples))


def test_planted_outliers_show_where_they_were_planted(small):
    plain = found(replace(SMALL, sources=("own",), seeds=1), small)
    planted = Variant("planted", PlantedOutliers(channels=1)(small.model, []), small.tokenizer, data=small.data)
    other = found(replace(SMALL, sources=("own",), seeds=1), planted)
    for kind in ("q_proj", "gate_proj"):
        assert other[f"outlier_ratio_{kind}"].value > 4 * plain[f"outlier_ratio_{kind}"].value
        assert other[f"outlier_kurtosis_{kind}"].value > 4 * plain[f"outlier_kurtosis_{kind}"].value
    for kind in ("o_proj", "down_proj"):
        assert other[f"outlier_ratio_{kind}"].value == pytest.approx(plain[f"outlier_ratio_{kind}"].value, rel=1e-3)
    assert other["ptq_before"].value == pytest.approx(plain["ptq_before"].value, rel=1e-5)


def test_figures_are_those_of_compressing_by_hand(small):
    metrics = found(SMALL, small)
    read = Perplexity(tokens=300, document=100)
    means, spreads = [], []
    for source in ("own", "shuffled", "uniform", "prose"):
        bits = []
        for seed in range(2):
            model, _ = compress(copy.deepcopy(small.model), None, SMALL.method, SMALL._rows(small, source, seed), progress=None)
            bits.append(read(Variant("by hand", model, small.tokenizer, data=small.data))[0].value)
        assert metrics[f"ptq_{source}"].samples == tuple(bits) and bits[0] != bits[1]
        means.append(sum(bits) / 2)
        spreads.append((bits[0] - bits[1]) ** 2 / 2)
    assert metrics["ptq_before"].value == read(small)[0].value
    middle = sum(means) / 4
    assert metrics["ptq_source_sd"].value == pytest.approx((sum((m - middle) ** 2 for m in means) / 3) ** 0.5)
    assert metrics["ptq_seed_sd"].value == pytest.approx((sum(spreads) / 4) ** 0.5)


def test_a_method_that_measures_nothing_does_not_care(small):
    metrics = found(replace(SMALL, method=RTN(bits=3, group=32)), small)
    assert metrics["ptq_source_sd"].value == metrics["ptq_seed_sd"].value == 0
    assert metrics["ptq_own"].value == metrics["ptq_uniform"].value != metrics["ptq_before"].value


@pytest.mark.parametrize("method", [GPTQ(RTN(bits=3, group=32)), LowRank(keep=0.4)])
def test_codes_and_modules_can_be_studied(small, method):
    metrics = found(replace(SMALL, method=method, seeds=1, sources=("own", "uniform")), small)
    assert metrics["ptq_own"].value != metrics["ptq_uniform"].value and metrics["ptq_seed_sd"].value == 0


def test_sources_are_what_they_say(small):
    ids = {source: SMALL._rows(small, source, 1)[0]["input_ids"] for source in ("own", "shuffled", "uniform", "prose")}
    assert all(rows.shape == (2, 24) for rows in ids.values())
    count = {source: Counter(rows.flatten().tolist()) for source, rows in ids.items()}
    assert count["own"] == count["shuffled"] != count["uniform"] and not torch.equal(ids["own"], ids["shuffled"])
    specials = set(small.tokenizer.all_special_ids)
    assert not specials & set(count["uniform"]) and max(count["uniform"]) < len(small.tokenizer) and len(count["uniform"]) > 30
    long = replace(SMALL, rows=9)  # pieces begin anywhere in a document
    texts = {source: small.tokenizer.decode(long._rows(small, source, 1)[0]["input_ids"].flatten()) for source in ("own", "prose")}
    assert "very" in texts["prose"] and "return" not in texts["prose"] and "return" in texts["own"]
    assert torch.equal(SMALL._rows(small, "own", 1)[0]["input_ids"], ids["own"])
    assert not torch.equal(SMALL._rows(small, "own", 0)[0]["input_ids"], ids["own"])


def test_prose_is_left_out_where_there_is_none(small):
    metrics = found(replace(SMALL, corpus=Text(prose=False), seeds=1), small)
    assert "ptq_prose" not in metrics and {"ptq_own", "ptq_shuffled", "ptq_uniform"} <= set(metrics)
    with pytest.raises(SmeltError, match="too short for a row"):
        replace(SMALL, corpus=Text(prose=False), sources=("prose",))(small)


def test_pool_is_drawn_from_the_train_split_by_the_seed():
    texts = [d.text for d in Text(40).documents("train")]
    first, second = (pool(Text(40), 5, seed) for seed in (0, 1))
    assert len(first) == 5 and first != second and set(first) | set(second) <= set(texts)
    assert sorted(pool(Text(40), 99, 0)) == sorted(texts)
    assert pool(Text(40), 99, 0)[:5] == first


def test_docstrings():
    source = '"""A."""\nclass B:\n    """C."""\n    def d(self):\n        """E."""\n        "F"\n'
    assert list(docstrings(source)) == ["A.", "C.", "E."] and not list(docstrings("not python")) and not list(docstrings("x = 1"))


def test_what_it_does_not_take_is_refused():
    with pytest.raises(SmeltError, match="single matrices"):
        PTQOutliers(PlantedOutliers())
    for sources in ((), ("own", "own")):
        with pytest.raises(SmeltError, match="each once"):
            PTQOutliers(sources=sources)
