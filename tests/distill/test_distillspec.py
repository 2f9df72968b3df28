from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from smelt import registry
from smelt.data._tokens import Tokens
from smelt.distill.distillspec import DistillSpec
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.gkd import GKD
from smelt.distill.total_variation import TotalVariation
from smelt.evaluate.acceptance import overlap
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.train import Training, teach

V, CONTEXT = 320, 16


@pytest.fixture
def tokens(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    ids = np.random.default_rng(0).zipf(1.3, 4000).clip(max=V) - 1
    ids.astype(np.uint16).tofile(folder / "ids.bin")
    np.array([0, 4000]).tofile(folder / "starts.bin")
    (folder / "tokens.json").write_text(json.dumps({"tokens": 4000, "bytes": 4000, "documents": 1, "dtype": "uint16"}))
    return Tokens(folder)


def small(seed):
    return tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1, seed=seed)


def drafted(method, tokens, folder, steps):
    draft, target = (Loaded(small(seed), tiny_tokenizer(), folder / str(seed)) for seed in (0, 7))
    settings = Training(tokens=steps * 4 * CONTEXT, context=CONTEXT, batch=4, lr=1e-2, save_seconds=1e9)
    teach(draft, target, tokens, method, settings, folder, seed=3)
    return draft.model


def test_it_is_gkd_on_the_text_of_the_draft_alone(tmp_path, tokens):
    how = {"prompt": 4, "new": 9, "temperature": 0.8}
    spec = drafted(DistillSpec(divergence=ForwardKL(), **how), tokens, tmp_path / "spec", 2)
    gkd = drafted(GKD(objective=ForwardKL(), share=1.0, **how), tokens, tmp_path / "gkd", 2)
    mixed = drafted(GKD(objective=ForwardKL(), share=0.5, **how), tokens, tmp_path / "mixed", 2)
    assert all(torch.equal(a, b) for a, b in zip(spec.parameters(), gkd.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(spec.parameters(), mixed.parameters(), strict=True))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "generalized_jsd(beta=0.5)", "total_variation"])
def test_more_of_the_draft_is_accepted(tmp_path, tokens, divergence):
    target, start = small(7), torch.randint(2, V, (32, 6), generator=torch.Generator().manual_seed(5))

    def acceptance(draft):
        with torch.no_grad():
            return overlap(target(input_ids=start).logits, draft(input_ids=start).logits, 1.0).mean().item()

    method = DistillSpec(divergence=registry.parse(divergence, "distill"), prompt=4)
    assert acceptance(drafted(method, tokens, tmp_path, 40)) > acceptance(small(0)) + 0.02


def test_what_it_may_hold():
    assert DistillSpec(divergence=TotalVariation()).divergence == TotalVariation()
    with pytest.raises(SmeltError, match="distillspec: it trains by an objective"):
        DistillSpec(divergence=DistillSpec())
