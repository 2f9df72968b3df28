"""Chimera: the trigram's linear part, its loss row by row and head by head, and drafting that equals training's view."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from smelt.decode._loop import Choice
from smelt.decode.chimera import Chimera, _Fused
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer

V, D = 320, 32


@pytest.fixture(scope="module")
def model():
    return tiny(layers=2, hidden=D, ffn=48, heads=2, kv_heads=1, eos_token_id=None, bos_token_id=None, pad_token_id=None)


def noisy(draft):
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for p in draft.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return draft.eval()


def some(b=2, t=9):
    return torch.randint(2, V, (b, t), generator=torch.Generator().manual_seed(1))


def encoded(draft, model, f, ids, known):
    """c of the last of `ids`, when the target has read the first `known`: one short text, nothing shared, nothing kept."""
    rows = [f[j] for j in range(known)]
    for p in range(known, len(ids)):
        three = [model.get_input_embeddings().weight[ids[max(0, p - back)]] for back in (2, 1, 0)]
        z = torch.cat(three)
        bent = draft.bend.weight @ z
        rows.append(draft.narrow.weight @ (z + bent * bent.sigmoid()))
    return draft.layer(torch.stack(rows)[None], torch.arange(len(ids))[None])[0, -1]


def test_a_block_of_zeros_is_its_linear_part(model):
    draft, z = _Fused(model.config, 2), torch.randn(5, 3 * D)
    assert torch.equal(draft.trigram(z), draft.narrow(z))
    assert not torch.allclose(noisy(draft).trigram(z), draft.narrow(z), atol=1e-3)


def test_heads_begin_as_the_targets_head_twice(model):
    draft = _Fused(model.config, 2)
    Chimera(heads=2).start(draft, model)
    for head in draft.heads:
        assert torch.equal(head.weight, torch.cat([model.lm_head.weight, model.lm_head.weight], 1))


@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_the_loss_is_that_of_every_head_after_every_prefix(model, hidden):
    draft, ids = noisy(_Fused(model.config, 3)), some()
    with torch.no_grad():
        f = model.base_model(ids).last_hidden_state
        made = Chimera(heads=3, hidden=hidden).loss(draft, model, ids, f)
        expected = torch.zeros(2, 8, dtype=torch.float64)
        for b in range(2):
            for p in range(1, 9):
                for i in range(min(3, p)):
                    c = encoded(draft, model, f[b], ids[b, : p + 1].tolist(), p - i)
                    expected[b, p - 1] += hidden * (c - f[b, p]).double().square().mean()
                    if p < 8:  # what comes after the row's last token is not in the row
                        logits = draft.heads[i](torch.cat([f[b, p - i - 1], c])).double()
                        expected[b, p - 1] += cross_entropy(logits, ids[b, p + 1])
    torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["tree", "chain"])
def test_a_draft_is_what_every_path_by_itself_says(model, form):
    """Rounds with 1, 3 and 1 kept tokens; states of drafted tokens never stay."""
    draft, text = noisy(_Fused(model.config, 3)), some(1, 14)[0].tolist()
    grower = Chimera(form=form, width=2, nodes=99).grower(draft, model)
    with torch.no_grad():
        f = model.base_model(torch.tensor([text])).last_hidden_state[0]
        grower.begin(text[:1], Choice([], False))
        seen = 0
        for read, n in ((0, 2), (1, 3), (2, 6), (5, 7)):
            grower.kept(text[:n], read, f[read : n - 1])
            made = grower.draft(text[:n], 9)
            parents = range(-1, len(made.tokens) - 1) if made.parents is None else made.parents
            paths = [[]]
            for node, parent in enumerate(parents):
                paths.append([*paths[parent + 1], int(made.tokens[node])])
            for path in paths:
                below = [int(made.tokens[i]) for i, parent in enumerate(parents) if paths[parent + 1] == path]
                if below:
                    c = encoded(draft, model, f, text[:n] + path, n - 1)
                    logits = draft.heads[len(path)](torch.cat([f[n - 2], c]))
                    assert below == logits.topk(2).indices.tolist()[: len(below)]
                    seen += 1
        assert seen == 4 * (3 if form == "chain" else 5)  # inner nodes: the root, two on each of two levels


@pytest.mark.parametrize("form", ["tree", "chain"])
def test_greedy_text_is_the_targets(model, tmp_path, form):
    save(model, tiny_tokenizer(), tmp_path)
    method = Chimera(form=form, width=2, nodes=8).untrained(tmp_path, tmp_path / "draft")
    for at in range(12):
        ids = some(1, 1 + at)
        options = {"do_sample": False, "max_new_tokens": 24, "attention_mask": torch.ones_like(ids)}
        plain = model.generate(ids, **options)
        assert model.generate(ids, **options, **method.arguments(model, tiny_tokenizer())).tolist() == plain.tolist()


def test_the_cost_of_a_token_is_its_products(model):
    """6 FLOPs per weight; the layer reads a state and one trigram row for every head."""
    layer = D * (2 * 32 + 2 * 16) + 3 * D * 48 + 2 * D
    assert Chimera(heads=2).cost(_Fused(model.config, 2), model.config) == 6 * (12 * D * D + 2 * 2 * D * V + (1 + 2) * layer)
