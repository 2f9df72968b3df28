from __future__ import annotations

import math

import pytest
import torch

from smelt import registry
from smelt.evaluate.position import Position, long
from smelt.runtime import bind
from smelt.spec import SmeltError


def test_buckets_equal_a_sum_token_by_token(variant):
    probe = Position(documents=4, length=90, first=16)
    metrics = probe(variant)
    assert [m.name for m in metrics] == [f"bits_per_byte_from_{a}" for a in (0, 16, 32, 64)]
    found = long(variant, 4, 90)
    assert len(found) == 4
    for metric, (low, high) in zip(metrics, [(0, 16), (16, 32), (32, 64), (64, 90)], strict=True):
        bits, size = 0.0, 0
        for one in found:
            with torch.no_grad():
                log = variant.model(torch.tensor([one.ids])).logits[0].double().log_softmax(-1)
            for i in range(low + one.start, high + one.start):
                if i:
                    bits -= float(log[i - 1, one.ids[i]]) / math.log(2)
                    size += int(one.bytes[i])
        assert metric.value == pytest.approx(bits / size, rel=1e-4)


def test_documents_are_long_enough_and_equally_long(variant, made):
    variant.data = made(count=5, lines=3)
    with pytest.raises(SmeltError, match="no document of the test split has 400 tokens"):
        Position(length=400)(variant)
    assert {len(d.ids) - d.start for d in long(variant, 9, 30)} == {30}
    assert len(long(variant, 9, 30)) == 5


def test_the_length_gives_way_to_the_context_unless_told(variant, made):
    variant.data = made(count=2, lines=60)
    names = [m.name for m in Position(documents=1, length=600, first=300)(variant)]
    assert (
        names
        == ["bits_per_byte_from_0", "bits_per_byte_from_300"]
        == [m.name for m in Position(documents=1, length=511, first=300)(variant)]
    )
    wide = Position(documents=1, length=700, first=300, beyond=True)(variant)
    assert [m.name for m in wide] == ["bits_per_byte_from_0", "bits_per_byte_from_300", "bits_per_byte_from_600"]


def test_reads_through_the_bound_cache(variant):
    probe = Position(documents=2, length=100, first=50, prefill=50, chunk=10)
    plain = [m.value for m in probe(variant)]
    for method, same in (
        (registry.load("cache", "sink_window").unlimited(), True),
        (registry.load("cache", "sink_window")(window=8), False),
    ):
        variant.cache = method
        with bind(variant.model, cache=method):
            early, late = (m.value for m in probe(variant))
        assert early == pytest.approx(plain[0], rel=1e-5)
        assert (late == pytest.approx(plain[1], rel=1e-5)) == same
