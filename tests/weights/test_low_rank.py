from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from smelt.compress import compress, save_compressed
from smelt.model._load import load
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.weights._hessian import output_error
from smelt.weights.low_rank import LowRank, LowRankLinear


def problem(out, columns, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw, dtype=torch.float64) * torch.rand(columns, generator=draw, dtype=torch.float64)
    x = torch.randn(3 * columns, columns, generator=draw, dtype=torch.float64) @ mix
    return torch.randn(out, columns, generator=draw, dtype=torch.float64), x


@pytest.mark.parametrize("out, columns", [(12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_error_on_the_inputs_is_the_dropped_singular_values(out, columns, rank):
    """Eckart and Young, counted token by token."""
    weight, x = problem(out, columns)
    made = LowRank(rank=rank, damp=0.0)(weight, x.mT @ x / len(x))
    off = sum((weight @ token - made.up @ (made.down @ token)).square().sum() for token in x) / len(x)
    singular = torch.linalg.svdvals(weight @ torch.linalg.cholesky(x.mT @ x / len(x)))
    assert_close(off, singular[rank:].square().sum(), rtol=1e-9, atol=0)


def test_no_other_matrix_of_that_rank_does_better():
    weight, x = problem(10, 14)
    hessian = x.mT @ x / len(x)
    best = output_error(weight, LowRank(rank=4, damp=0.0)(weight, hessian).dense(), hessian)
    draw = torch.Generator().manual_seed(3)
    for _ in range(20):  # alternating least squares from anywhere ends no lower
        down = torch.randn(4, 14, generator=draw, dtype=torch.float64)
        for _ in range(60):
            up = weight @ hessian @ down.mT @ torch.linalg.inv(down @ hessian @ down.mT)
            down = torch.linalg.lstsq(up, weight).solution
        assert output_error(weight, up @ down, hessian) >= best * (1 - 1e-9)
    plain = output_error(weight, LowRank(rank=4, power=0.0)(weight, hessian).dense(), hessian)
    half = output_error(weight, LowRank(rank=4, power=0.5)(weight, hessian).dense(), hessian)
    assert best < half < plain


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_rank_is_the_largest_that_keeps_the_share(keep):
    method, shapes = LowRank(keep=keep), [(24, 40), (40, 24), (32, 32)]
    for (out, columns), budget in zip(shapes, method.budget(shapes), strict=True):
        rank = budget.numbers // (out + columns)
        assert rank * (out + columns) == budget.numbers <= keep * out * columns < budget.numbers + out + columns
        made = method(torch.randn(out, columns), torch.eye(columns, dtype=torch.float64))
        assert made.up.shape == (out, rank) and made.down.shape == (rank, columns)


def test_uncorrelated_inputs_of_one_size_give_plain_svd():
    weight, _ = problem(12, 20)
    made = [LowRank(rank=5, power=p)(weight, 3.0 * torch.eye(20, dtype=torch.float64)).dense() for p in (0.0, 1.0)]
    assert_close(made[0], made[1])


def test_shapes_that_leave_no_rank_are_refused_with_what_they_need():
    with pytest.raises(SmeltError, match=r"no rank for a matrix of 8 x 24; it needs keep=0.167"):
        LowRank(keep=0.16).budget([(64, 64), (8, 24)])
    assert LowRank(keep=1 / 6).budget([(8, 24)])[0].numbers == 32
    with pytest.raises(SmeltError, match="twice"):
        LowRank(rank=4, keep=0.3)
    with pytest.raises(SmeltError, match="no rank of 9"):
        LowRankLinear.build(torch.nn.Linear(8, 24), rank=9)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_and_loaded_it_is_the_same_model(rows, tmp_path, dtype):
    model, tokenizer = tiny("qwen2"), tiny_tokenizer()  # has biases
    before = sum(p.numel() for p in model.parameters())
    model, report = compress(model, tokenizer, LowRank(keep=0.4), rows, progress=None)
    after = sum(p.numel() for p in model.parameters())
    assert before - after >= 0.6 * report["weights"]
    assert report["bytes"] == 4 * (report["weights"] - (before - after))
    save_compressed(model, tokenizer, tmp_path, report, dtype)
    assert report["loads_in"] == "smelt"
    ids = rows[0]["input_ids"]
    wanted = model.to(dtype or torch.float32)(input_ids=ids).logits
    assert torch.equal(load(tmp_path, dtype=dtype or torch.float32).model(input_ids=ids).logits, wanted)


def test_looking_at_the_inputs_helps_a_trained_model(trained, plant):
    """And planted outliers change nothing then: the function is the same, so its best map of a rank is. Plain SVD's is not."""
    model, rows, held = trained

    def loss(factor, **more):
        made, _ = compress(plant(model, factor=factor), None, LowRank(keep=0.4, **more), rows, progress=None)
        with torch.no_grad():
            return sum(made(input_ids=b["input_ids"], labels=b["input_ids"]).loss.item() for b in held) / len(held)

    aware, plain = ([loss(factor, **more) for factor in (1.0, 20.0)] for more in ({"damp": 0.0}, {"power": 0.0}))
    assert aware[0] < plain[0] - 0.02
    assert abs(aware[1] - aware[0]) < 0.001 < 0.003 < abs(plain[1] - plain[0])
