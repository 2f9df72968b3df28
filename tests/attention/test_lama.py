"""Low-rank pooling against the full bilinear form, and what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from smelt.attention.lama import Lama
from smelt.registry import parse, text
from smelt.spec import SmeltError

CONTEXTS = ("mean", "last", "max", "learned")
REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)


def reference(module, states, real, context, tanh):
    """One head and one token at a time, float64: c^T (P Q^T) h."""
    p, q = module.ask.detach().double(), module.read.detach().double()
    out, weights = [], torch.zeros(len(states), len(p), states.shape[1], dtype=torch.double)
    for b, rows in enumerate(states.double()):
        kept = [t for t in range(len(rows)) if real[b, t]]
        c = {
            "mean": sum(rows[t] for t in kept) / len(kept),
            "last": rows[kept[-1]],
            "max": torch.stack([rows[t] for t in kept]).max(0).values,
            "learned": module.learned.detach().double() if context == "learned" else None,
        }[context]
        for i in range(len(p)):
            if tanh:
                scores = {t: float(sum((p[i].T @ c).tanh() * (q[i].T @ rows[t]).tanh())) for t in kept}
            else:
                scores = {t: float(c @ (p[i] @ q[i].T) @ rows[t]) for t in kept}
            total = sum(math.exp(s) for s in scores.values())
            for t in kept:
                weights[b, i, t] = math.exp(scores[t]) / total
            out.append(sum(weights[b, i, t] * rows[t] for t in kept))
    return torch.stack(out).view(len(states), -1), weights


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("heads", "rank"), [(1, 1), (3, 1), (4, 5)])
def test_it_equals_the_bilinear_form(heads, rank, context, tanh):
    module, states = Lama(heads=heads, rank=rank, context=context, tanh=tanh).module(12), torch.randn(3, 7, 12)
    wanted, weights = reference(module, states, REAL, context, tanh)
    with torch.no_grad():
        torch.testing.assert_close(module.weights(states, REAL).double(), weights, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(module(states, REAL).double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_is_not_real_has_weight_zero_and_no_gradient(context):
    module, states = Lama(heads=3, rank=2, context=context).module(12), torch.randn(3, 7, 12, requires_grad=True)
    weights = module.weights(states, REAL)
    assert (weights[~REAL[:, None].expand_as(weights)] == 0).all() and torch.allclose(weights.sum(-1), torch.ones(3, 3))
    noise = torch.where(REAL[..., None], states, 1e4 * torch.randn_like(states))
    assert torch.equal(module(noise, REAL), module(states, REAL))
    module(states, REAL).square().sum().backward()
    assert (states.grad[~REAL] == 0).all() and (states.grad[REAL] != 0).any(-1).all()


@pytest.mark.parametrize("context", ["mean", "max", "learned"])
def test_the_order_of_tokens_moves_the_weights_and_not_the_vector(context):
    module, states = Lama(heads=3, rank=2, context=context).module(12), torch.randn(3, 7, 12)
    order = torch.randperm(7)
    with torch.no_grad():
        torch.testing.assert_close(module.weights(states[:, order], REAL[:, order]), module.weights(states, REAL)[..., order])
        torch.testing.assert_close(module(states[:, order], REAL[:, order]), module(states, REAL), atol=1e-5, rtol=1e-5)


def test_parameters_follow_the_formula():
    for width, heads, rank in [(16, 10, 1), (33, 3, 8)]:
        for context in CONTEXTS:
            module = Lama(heads=heads, rank=rank, context=context).module(width)
            assert sum(p.numel() for p in module.parameters()) == 2 * width * heads * rank + (context == "learned") * width
            assert module(torch.randn(2, 5, width), torch.ones(2, 5, dtype=torch.bool)).shape == (2, heads * width)


def test_no_real_token_and_half_precision_stay_finite():
    for context in CONTEXTS:
        module = Lama(context=context).module(8)
        states = torch.randn(2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
        real = torch.tensor([[False] * 5, [True] * 5])
        out = module(states, real)
        assert out.dtype == torch.float32 and (out[0] == 0).all() and torch.isfinite(out).all()
        out.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters()) and torch.isfinite(states.grad).all()


def test_gradients_are_right():
    """Against finite differences of the slow form in float64."""
    module, states = Lama(heads=2, rank=2).module(4), torch.randn(2, 3, 4)
    real = torch.tensor([[True, True, False], [True, True, True]])
    module(states, real).sin().sum().backward()
    for parameter in module.parameters():
        flat, found = parameter.data.view(-1), parameter.grad.view(-1)
        for at in range(len(flat)):
            kept, sides = flat[at].item(), []
            for step in (1e-3, -1e-3):
                flat[at] = kept + step
                sides.append(reference(module, states, real, "mean", False)[0].sin().sum().item())
            flat[at] = kept
            assert abs((sides[0] - sides[1]) / 2e-3 - found[at].item()) < 1e-3


def bytes_of_a_class(rows, generator):
    """Texts of 48 random letters in which one digit, anywhere, is the class; [rows, 48], [rows]."""
    texts = torch.randint(97, 123, (rows, 48), generator=generator)
    label = torch.randint(0, 10, (rows,), generator=generator)
    texts[torch.arange(rows), torch.randint(0, 48, (rows,), generator=generator)] = 48 + label
    return texts, label


def test_it_reads_a_class_that_the_mean_dilutes():
    """Byte classification: embedding, pool, linear map, trained alike; the mean has 1 / 48 of the one byte that matters."""
    right = {}
    for name in ("mean", "lama"):
        torch.manual_seed(0)
        table = nn.Embedding(256, 16)
        pool = Lama(heads=4, rank=2).module(16) if name == "lama" else None
        head = nn.Linear(64 if pool else 16, 10)
        layers = nn.ModuleList([table, head, *([pool] if pool else [])])
        optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(1)

        def read(texts, table=table, pool=pool, head=head):
            states, real = table(texts), torch.ones(texts.shape, dtype=torch.bool)
            return head(states.mean(1) if pool is None else pool(states, real))

        for _ in range(150):
            texts, label = bytes_of_a_class(64, generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(read(texts), label).backward()
            optimizer.step()
        texts, label = bytes_of_a_class(1000, torch.Generator().manual_seed(2))
        with torch.no_grad():
            right[name] = (read(texts).argmax(1) == label).float().mean().item()
    assert right["lama"] > right["mean"] + 0.05 and right["lama"] > 0.9, right


def test_settings():
    method = parse("lama(heads=4, rank=2, context='learned', tanh=True)", "attention")
    assert text(method) == "lama(heads=4, rank=2, context='learned', tanh=True)"
    for bad in ("lama(heads=0)", "lama(rank=0)", "lama(context='first')"):
        with pytest.raises(SmeltError):
            parse(bad, "attention")
