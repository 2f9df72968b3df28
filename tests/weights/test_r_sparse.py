from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

import smelt.weights.r_sparse as module
from smelt.compress import compress, save_compressed
from smelt.model._load import load
from smelt.model._swap import swapped
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.weights.r_sparse import RSparse, RSparseLinear, _threshold

FULL = {"sparsity": 0.0, "alpha": 1.0}


def problem(out=12, columns=20, tokens=60, seed=0):
    draw = torch.Generator().manual_seed(seed)
    size = torch.rand(columns, generator=draw) * 3
    x = torch.randn(tokens, columns, generator=draw) * size
    return torch.randn(out, columns, generator=draw), x


def slow(weight, inputs, method, x):
    """One token and one input at a time, in float64; the rank by trying all."""
    out, columns = weight.shape
    norm = [weight[:, j].double().square().sum().sqrt().item() for j in range(columns)]
    scores = sorted(abs(v) * c for row in inputs.double().tolist() for v, c in zip(row, norm, strict=True))
    share = (1 - method.sparsity) * method.alpha
    above = round(share * len(scores))
    threshold = scores[len(scores) - above - 1] if above < len(scores) else 0.0
    room = (1 - method.sparsity) * (1 - method.alpha) * out * columns
    rank = max(r for r in range(1 + min(out, columns)) if r * (out + columns) <= room)
    u, s, v = torch.linalg.svd(weight.double())
    low = u[:, :rank] * s[:rank] @ v[:rank]
    made = torch.zeros(len(x), out, dtype=torch.float64)
    for t, token in enumerate(x.double()):
        for j in range(columns):
            made[t] += token[j] * (weight[:, j].double() if abs(token[j]) * norm[j] > threshold * (1 + 1e-6) else low[:, j])
    return made


@pytest.mark.parametrize("out, columns", [(12, 20), (20, 12)])
@pytest.mark.parametrize("sparsity, alpha", [(0.5, 0.2), (0.5, 0.95), (0.3, 0.6), (0.5, 1.0), (0.2, 0.0), (0.0, 1.0)])
def test_equals_the_rule_input_by_input(sparsity, alpha, out, columns):
    weight, inputs = problem(out, columns)
    method = RSparse(sparsity=sparsity, alpha=alpha)
    x = torch.cat([inputs[:7], 2 * inputs[7:9]])
    assert_close(method(weight, inputs)(x).double(), slow(weight, inputs, method, x), rtol=1e-4, atol=1e-4)


def test_full_rank_is_exact_for_every_threshold():
    weight, inputs = problem()
    for sparsity in (0.1, 0.5, 0.9):
        made = RSparse(sparsity=sparsity, alpha=1.0)(weight, inputs)
        made.up, made.down = torch.nn.Parameter(torch.eye(12)), torch.nn.Parameter(weight.clone())
        assert_close(made(inputs), inputs @ weight.mT, rtol=1e-5, atol=1e-5)
        made.up = torch.nn.Parameter(torch.zeros(12, 12))
        assert (made(inputs) - inputs @ weight.mT).abs().max() > 0.1


def test_no_threshold_is_the_dense_product():
    weight, inputs = problem()
    made = RSparse(sparsity=0.0, alpha=1.0)(weight, inputs)
    assert made.threshold == 0 and torch.equal(made.dense(), weight)
    x = torch.cat([torch.zeros(1, 20), 1e-6 * inputs, inputs])
    assert_close(made(x), x @ weight.mT, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_the_threshold_lets_exactly_the_share_through(share):
    score = torch.rand(37, 11, generator=torch.Generator().manual_seed(0)) + 0.01
    assert int((score > _threshold(score, share)).sum()) == round(share * score.numel())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_what_a_token_reads_stays_within_the_budget(sparsity, alpha):
    method = RSparse(sparsity=sparsity, alpha=alpha)
    for out, columns in ((64, 64), (96, 64), (64, 16)):
        rank = (method.budget([(out, columns)])[0].numbers - out * columns - 2 * columns - 1) // (out + columns)
        read = (1 - sparsity) * alpha * out * columns + rank * (out + columns)
        assert read <= (1 - sparsity) * out * columns + 1e-6 < read + out + columns or alpha == 1
        assert method.moved(out, columns, 4) == pytest.approx(4 * (read + columns))


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_the_best_map_for_the_small_inputs_is_the_best_of_its_rank(alpha):
    """At power 1 nothing of that rank serves the calibration's small inputs better; plain SVD serves them worse."""
    weight, inputs = problem(16, 24, 200)
    plain, best = (RSparse(alpha=alpha, power=power, damp=0.0)(weight, inputs) for power in (0.0, 1.0))
    assert torch.equal(plain.threshold, best.threshold)
    small = inputs.masked_fill(best.kept(inputs), 0.0).double()
    rank = best.settings()["rank"]
    off = [(small @ (weight - made.up @ made.down).double().mT).square().sum().item() for made in (plain, best)]
    assert off[1] == pytest.approx(torch.linalg.svdvals(small @ weight.double().mT)[rank:].square().sum().item(), rel=1e-4)
    assert off[1] < 0.95 * off[0]


def test_dense_is_the_nearest_matrix_when_inputs_are_independent():
    """E |y - W'x|^2 is least, column by column, at W_j e_j + (up down)_j (1 - e_j), e_j the share of the energy kept."""
    weight, inputs = problem()
    made = RSparse(alpha=0.5)(weight, inputs)
    kept = made.kept(inputs)
    for j in range(20):
        x = inputs[:, j]
        y = torch.where(kept[:, j, None], x[:, None] * weight[:, j], x[:, None] * (made.up @ made.down)[:, j])
        assert_close(made.dense()[:, j], x @ y / (x @ x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.45])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_one_token_gathered_equals_the_masked_product(monkeypatch, share, alpha, threads):
    weight, inputs = problem(40, 200, 50)
    made = RSparse(sparsity=1 - max(share, 1e-9) / alpha, alpha=alpha)(weight, inputs)
    x = inputs[:1] if share else 0 * inputs[:1]
    masked = made(x)
    calls = []
    real = module.embedding_bag
    monkeypatch.setattr(module, "GATHERS", 1)
    monkeypatch.setattr(module, "embedding_bag", lambda *a, **k: calls.append(len(a[0])) or real(*a, **k))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with torch.no_grad():
        for shaped in (x, x[0], x[None]):
            assert_close(made(shaped), masked.view(*shaped.shape[:-1], 40), rtol=1e-5, atol=1e-5)
        assert calls == [int(made.kept(x).sum())] * 3
        made(inputs[:2])  # more than one token, a gradient, more than half of the inputs: the masked product
        made.threshold.zero_()
        made(inputs[:1])
    made.threshold.fill_(1e9)
    made(x).sum().backward()
    assert len(calls) == 3


def test_small_matrices_do_not_gather(monkeypatch):
    weight, inputs = problem()
    monkeypatch.setattr(module, "embedding_bag", lambda *a, **k: pytest.fail("gathered"))
    with torch.no_grad():
        RSparse()(weight, inputs)(inputs[:1])


@pytest.mark.parametrize("method", [RSparse(alpha=0.4), RSparse(alpha=1.0)])  # the second has maps of rank 0
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_and_loaded_it_is_the_same_model(rows, tmp_path, method, dtype):
    model, tokenizer = tiny("qwen2"), tiny_tokenizer()
    model, report = compress(model, tokenizer, method, rows, progress=None)
    save_compressed(model, tokenizer, tmp_path, report, dtype)
    ids = rows[0]["input_ids"]
    with torch.no_grad():
        wanted = model.to(dtype or torch.float32)(input_ids=ids).logits
        back = load(tmp_path, dtype=dtype or torch.float32).model
        assert torch.equal(back(input_ids=ids).logits, wanted)
    assert [m.settings() for _, m in swapped(back)] == [m.settings() for _, m in swapped(model)]


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(SmeltError, match="no rank of 9"):
        RSparseLinear.build(torch.nn.Linear(8, 24), rank=9)


def test_on_a_trained_model(trained):
    """Held-out text: the share that passes is the target, and a few ranks bring back most of what dropping half of the inputs costs."""
    model, rows, held = trained

    def loss(made):
        with torch.no_grad():
            return sum(made(input_ids=b["input_ids"], labels=b["input_ids"]).loss.item() for b in held) / len(held)

    made, _ = compress(copy.deepcopy(model), None, RSparse(sparsity=0.5, alpha=1.0), rows, progress=None)
    shares: list[float] = []
    for _, part in swapped(made):
        part.register_forward_pre_hook(lambda part, given: shares.append(part.kept(given[0]).float().mean().item()))
    off = {0: loss(made) - loss(model)}
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.02)
    for rank in (16, 32):
        with_low = copy.deepcopy(made)
        for name, part in swapped(with_low):
            u, s, v = torch.linalg.svd(model.get_submodule(name).weight.data, full_matrices=False)
            part.up, part.down = torch.nn.Parameter(u[:, :rank] * s[:rank]), torch.nn.Parameter(v[:rank].clone())
        off[rank] = loss(with_low) - loss(model)
    assert off[0] > 0.005 and off[32] < off[16] < 0.5 * off[0]
