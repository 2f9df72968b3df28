"""Eigen Attention against explicit projections."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from smelt.cache import eigen
from smelt.cache.eigen import Eigen, Subspace
from smelt.cache.kivi import Kivi
from smelt.model._rotary import Rotary
from smelt.model._tiny import tiny
from smelt.model._walk import blocks
from smelt.runtime import bind, cache_bytes, new_cache
from smelt.spec import SmeltError

D, HEADS, GROUP = 32, 2, 2
NO_ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module")
def decoder():
    model = tiny("llama", hidden=128, heads=4, kv_heads=2, context=512, **NO_ENDS)
    for block in blocks(model):  # keys and values that lie near a subspace, as those of trained models do
        for module in (block.self_attn.k_proj, block.self_attn.v_proj):
            u, s, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            module.weight.data = (u * s * 0.88 ** torch.arange(len(s))) @ v
    return model


def text():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 320, (4, 48), generator=generator) for _ in range(2)]


def run(query, key, value, mask):
    key, value = key.repeat_interleave(GROUP, 1), value.repeat_interleave(GROUP, 1)
    causal = mask is None and query.shape[2] > 1
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal).transpose(1, 2)


run.scaling = D**-0.5


def test_bases_are_orthonormal_and_span_what_the_text_spans(decoder, tmp_path):
    found = Eigen(rank=0.5).measure(decoder, text())
    assert {part.shape for part in found.values()} == {(HEADS, D, D // 2)} and len(found) == 4
    rotary = Rotary(decoder.config)
    with torch.no_grad():
        rows = [decoder(ids, use_cache=True).past_key_values.layers[1] for ids in text()]
    for name, parts in (
        ("keys", [rotary.turn(layer.keys, torch.arange(48), back=True) for layer in rows]),
        ("values", [layer.values for layer in rows]),
    ):
        basis = found[f"1.{name}"].double()
        torch.testing.assert_close(basis.transpose(1, 2) @ basis, torch.eye(D // 2).double().expand(HEADS, -1, -1), atol=1e-5, rtol=0)
        for h in range(HEADS):
            x = torch.cat([part[:, h].flatten(0, 1) for part in parts]).double()
            lost = (x - x @ basis[h] @ basis[h].T).square().sum()
            best = torch.linalg.svdvals(x)[D // 2 :].square().sum()
            torch.testing.assert_close(lost, best, rtol=1e-4, atol=1e-6)
    assert decoder.training is False and all(p.grad is None for p in decoder.parameters())


@pytest.mark.parametrize("block", [eigen.BLOCK, 7])
def test_scores_and_outputs_equal_those_of_rebuilt_rows(decoder, monkeypatch, block):
    monkeypatch.setattr(eigen, "BLOCK", block)
    rotary, n = Rotary(decoder.config), 50
    up, out = (torch.linalg.qr(torch.randn(HEADS, D, r)).Q for r in (24, 16))
    narrow = Subspace(up, out, rotary)
    key, value, query = torch.randn(2, HEADS, n, D), torch.randn(2, HEADS, n, D), torch.randn(2, HEADS, 3, D)
    rows = torch.cat([narrow.keys(key[:, :, :31], 0, None), narrow.keys(key[:, :, 31:], 31, None)], 2)
    at = torch.arange(n)
    rebuilt = rotary.turn(rotary.turn(key, at, back=True) @ up @ up.transpose(1, 2), at)
    torch.testing.assert_close(narrow.scores(query, rows, None), query @ rebuilt.transpose(2, 3), atol=1e-4, rtol=1e-5)
    weights = torch.rand(2, HEADS, 3, n)
    torch.testing.assert_close(
        narrow.mixed(weights, narrow.values(value)), weights @ (value @ out @ out.transpose(1, 2)), atol=1e-4, rtol=1e-5
    )


def test_full_rank_gives_the_logits_of_the_full_cache(decoder, tmp_path):
    method = Eigen.unlimited().calibrated(decoder, text(), tmp_path)
    ids = torch.randint(2, 320, (2, 90))
    with torch.no_grad():
        plain, cache = decoder(ids).logits, new_cache(decoder, method)
        with bind(decoder, cache=method):
            parts = [decoder(piece, past_key_values=cache).logits for piece in ids.split([40, 1, 1, 30, 18], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), plain, atol=1e-4, rtol=1e-4)


def test_the_error_falls_with_the_rank_and_is_far_below_a_random_basis(decoder):
    basis = Eigen.unlimited().measure(decoder, text())
    inputs = eigen._inputs(decoder, text()[0])
    for index, block in enumerate(blocks(decoder)):
        given = (decoder, block, inputs[index], Rotary(decoder.config))
        with torch.no_grad():
            error = eigen._errors(*given, [basis[f"{index}.keys"], basis[f"{index}.values"]])
            random = eigen._errors(*given, [torch.linalg.qr(torch.randn(HEADS, D, D)).Q for _ in range(2)])
            errors = [error(r, r) for r in (8, 16, 24, 28, 32)]
            assert all(b < a for a, b in pairwise(errors)) and errors[-1] < 1e-5
            assert errors[1] < 0.3 * random(16, 16)


def test_ranks_are_searched_up_to_the_error(decoder):
    loose, tight = (Eigen(rank=0.25, error=e, multiple=4).measure(decoder, text()) for e in (10.0, 0.02))
    assert {part.shape[2] for part in loose.values()} == {8}
    sizes = {name: part.shape[2] for name, part in tight.items()}
    assert all(size % 4 == 0 and 8 <= size <= D for size in sizes.values()) and sum(sizes.values()) > sum(
        p.shape[2] for p in loose.values()
    )
    inputs = eigen._inputs(decoder, text()[0])
    with torch.no_grad():
        for index, block in enumerate(blocks(decoder)):
            basis = [tight[f"{index}.keys"], tight[f"{index}.values"]]
            assert eigen._errors(decoder, block, inputs[index], Rotary(decoder.config), basis)(D, D) <= 0.02


def test_ranks_may_differ_between_layers_and_the_bytes_are_their_sum(decoder, tmp_path):
    method = Eigen(rank=0.25, error=0.05, multiple=4).calibrated(decoder, text(), tmp_path)
    cache = new_cache(decoder, method)
    for layer in cache.layers:
        rows = torch.randn(2, HEADS, 37, D)
        layer.update(rows, rows)
        layer.attend(torch.randn(2, HEADS * GROUP, 37, D), None, run)
    assert cache_bytes(cache) == method.bytes_held(decoder.config, 37, batch=2)


def test_what_cannot_be_done_is_said(decoder):
    with pytest.raises(SmeltError, match="eigen has to be measured on text first"):
        new_cache(decoder, Eigen())
    with pytest.raises(SmeltError, match="eigen has to be measured on text first"), bind(decoder, cache=Kivi(group=16, inner=Eigen())):
        pass
    with pytest.raises(SmeltError, match="before rotary angles"):
        Eigen().fits(type("Config", (), {"model_type": "gpt2"})())
