from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from smelt.registry import parse
from smelt.spec import SmeltError
from smelt.weights.linear import Linear


def slow(tensors, weights):
    result = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for index in itertools.product(*map(range, result.shape)):
        result[index] = sum(w * t[index].item() for w, t in zip(weights, tensors)) / sum(weights)
    return result


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.3), (3.0, 0.0, 1.0), (2.0, -0.5, -0.5)])
def test_equals_the_loop(weights):
    tensors = [torch.randn(4, 5) for _ in range(3)]
    made = Linear(models=("b", "c"), weights=weights)("w", tensors)
    assert_close(made.double(), slow(tensors, weights), rtol=0, atol=2e-6)
    if len(set(weights)) == 1:
        assert torch.equal(made, Linear(models=("b", "c"))("w", tensors))


def test_equal_models_and_a_picked_model_come_back_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.randn(50).to(dtype) for _ in range(3)]
        assert torch.equal(Linear(models=("b", "c"), weights=(0.1, 0.7, 0.3))("w", [tensors[0]] * 3), tensors[0])
        for at in range(3):
            weights = tuple(2.0 * (i == at) for i in range(3))
            assert torch.equal(Linear(models=("b", "c"), weights=weights)("w", tensors), tensors[at])


def test_points_of_a_line_give_a_point_of_it():
    a, d = torch.randn(30), torch.randn(30)
    made = Linear(weights=(0.75, 0.25))("w", [a + 1.0 * d, a + 3.0 * d])
    assert_close(made, a + 1.5 * d)


def test_the_order_of_models_does_not_matter():
    tensors, weights = [torch.randn(20) for _ in range(3)], (0.2, 0.3, 0.5)
    made = [
        Linear(models=("x", "y"), weights=tuple(weights[i] for i in order))("w", [tensors[i] for i in order])
        for order in itertools.permutations(range(3))
    ]
    for other in made[1:]:
        assert_close(other, made[0], rtol=0, atol=1e-6)


def test_sums_are_float32():
    """bfloat16 has 8 bits: 256 + 1 would be lost in it."""
    tensors = [torch.tensor([256.0]).bfloat16()] + [torch.tensor([260.0]).bfloat16()] * 2
    made = Linear(models=("b", "c"), weights=(0.5, 0.25, 0.25))("w", tensors)
    assert made.item() == 258.0


@pytest.mark.parametrize(
    "source, message",
    [
        ("linear(models=[])", "models is empty"),
        ("linear(weights=[1.0])", "1 weights for 2 models"),
        ("linear(weights=[1.0, -1.0])", "a sum that is not zero"),
        ("linear(models='base')", "models"),
        ("linear(weights=[1e999, 0.0])", "finite"),
    ],
)
def test_what_makes_no_sense_is_refused(source, message):
    with pytest.raises(SmeltError, match=message):
        parse(source, "weights")


@pytest.mark.slow
def test_the_mean_of_two_students_is_better_than_they_are_on_average(trained, text):
    """Two short trainings of one start on different text: the merged loss beside the mean of the two, on three held-out sets."""
    import copy

    start, _, held = trained
    quarter = len(text) // 4
    students, sets = [], [held]
    for part in (text[:quarter], text[2 * quarter : 3 * quarter]):
        learn, keep = part[: -quarter // 5], part[-quarter // 5 :]
        model = copy.deepcopy(start).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(40):
            at = torch.randint(0, len(learn) - 48, (16,), generator=torch.Generator().manual_seed(step))
            ids = torch.stack([learn[i : i + 48] for i in at.tolist()])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        students.append(model.eval())
        sets.append([{"input_ids": keep[: len(keep) // 48 * 48].view(-1, 48)}])
    merged, method = copy.deepcopy(start), Linear()
    ours, theirs = (dict(s.named_parameters()) for s in students)
    with torch.no_grad():
        for name, p in merged.named_parameters():
            p.copy_(method(name, [ours[name], theirs[name]]))
        for rows in sets:
            losses = [
                sum(model(input_ids=b["input_ids"], labels=b["input_ids"]).loss.item() for b in rows) / len(rows)
                for model in (merged, *students)
            ]
            print([round(x, 4) for x in losses])
            assert losses[0] <= (losses[1] + losses[2]) / 2
