"""FSPAD: EAGLE where its gate is closed and its halves are tied, the loss by hand, and drafting that equals training's view."""

from __future__ import annotations

import pytest
import torch

from smelt.decode._grower import Layer
from smelt.decode._loop import Choice
from smelt.decode.fspad import FSPAD, _Eagle
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError

V, D = 320, 32


@pytest.fixture(scope="module")
def model():
    return tiny(layers=2, hidden=D, ffn=48, heads=2, kv_heads=1, eos_token_id=None, bos_token_id=None, pad_token_id=None)


def noisy(draft):
    """Every weight drawn, so that nothing is 0 by chance of the start."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for p in draft.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return draft.eval()


def some(b=2, t=11):
    made = torch.Generator().manual_seed(1)
    return torch.randint(2, V, (b, t), generator=made)


def test_a_closed_gate_and_tied_halves_are_eagle(model):
    draft = noisy(_Eagle(model.config))
    e, f, at = torch.randn(2, 7, D), torch.randn(2, 7, D), torch.arange(7)[None]
    with torch.no_grad():
        said, state = draft(e, f, at)
        eagle = draft.layer(draft.join(torch.cat([e, f], -1)), at)
        assert not torch.allclose(said, eagle, atol=1e-3) and not torch.allclose(said, state, atol=1e-3)
        draft.down.weight.zero_()
        said, state = draft(e, f, at)
        assert torch.equal(said, eagle) and not torch.allclose(said, state, atol=1e-3)
        draft.second.weight.zero_()
        said, state = draft(e, f, at)
        assert torch.equal(said, eagle) and torch.equal(state, eagle)
    assert not _Eagle(model.config).down.weight.any() and not _Eagle(model.config).second.weight.any()  # where training begins


def test_the_equation_written_out(model):
    """u, the gate, the layer's two halves from one doubled map, in float64, one row alone."""
    draft = noisy(_Eagle(model.config)).double()
    e, f = torch.randn(D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    w = {name: value.detach() for name, value in draft.named_parameters()}
    u = w["join.weight"] @ torch.cat([e, f])
    normed = u / (u.square().mean() + 1e-6).sqrt() * w["norm.weight"]
    gate = w["gate.weight"] @ e
    u = u + w["down.weight"] @ (gate * gate.sigmoid() * (w["up.weight"] @ normed))

    def norm(x, name):
        return x / (x.square().mean() + model.config.rms_norm_eps).sqrt() * w[f"layer.block.{name}.weight"]

    value = w["layer.block.self_attn.v_proj.weight"] @ norm(u, "input_layernorm")
    h = u + w["layer.block.self_attn.o_proj.weight"] @ torch.cat([value, value])  # one row attends to itself; 2 heads, 1 kv head
    x = norm(h, "post_attention_layernorm")
    g = w["layer.block.mlp.gate_proj.weight"] @ x
    inner = g * g.sigmoid() * (w["layer.block.mlp.up_proj.weight"] @ x)
    down = w["layer.block.mlp.down_proj.weight"]
    doubled = torch.cat([h, h]) + torch.cat([down, down + w["second.weight"]]) @ inner
    said, state = draft(e[None, None], f[None, None], torch.zeros(1, 1, dtype=torch.long))
    torch.testing.assert_close(torch.cat([said[0, 0], state[0, 0]]), doubled, rtol=1e-6, atol=1e-6)


def test_the_loss_is_the_two_terms_of_every_row(model):
    draft, ids = noisy(_Eagle(model.config)), some()
    method = FSPAD(noise=0.0, regression=0.7, classification=0.3)
    with torch.no_grad():
        f = model.base_model(ids).last_hidden_state
        made = method.loss(draft, model, ids, f)
        e = model.get_input_embeddings()(ids)
        expected = torch.zeros(2, 10, dtype=torch.float64)
        for b in range(2):
            for p in range(1, 11):
                said, state = draft(e[b : b + 1, 1 : p + 1], f[b : b + 1, :p], torch.arange(1, p + 1)[None])
                off = (state[0, -1] - f[b, p]).double().abs()
                smooth = torch.where(off < 1, off**2 / 2, off - 0.5).mean()
                law, mine = (model.lm_head(x).double() for x in (f[b, p], said[0, -1]))
                cross = -(law.softmax(-1) * mine.log_softmax(-1)).sum()
                expected[b, p - 1] = 0.7 * smooth + 0.3 * cross
    torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.allclose(FSPAD(regression=0.7, classification=0.3, noise=0.5).loss(draft, model, ids, f), made)


@pytest.mark.parametrize("form", ["tree", "chain"])
def test_a_draft_is_what_the_whole_path_read_at_once_says(model, form):
    """Rounds with 1, 3 and 2 kept tokens: memory, cut and refilled with the target's states, changes nothing."""
    draft, text = noisy(_Eagle(model.config)), some(1, 14)[0].tolist()
    grower = FSPAD(form=form, depth=3, width=3, nodes=99).grower(draft, model)
    table = model.get_input_embeddings()
    with torch.no_grad():
        f = model.base_model(torch.tensor([text])).last_hidden_state[0]
        grower.begin(text[:8], Choice([], False))
        for read, n in ((0, 9), (8, 10), (9, 13), (12, 14)):
            grower.kept(text[:n], read, f[read : n - 1])
            made = grower.draft(text[:n], 9)
            parents = range(-1, len(made.tokens) - 1) if made.parents is None else made.parents
            paths = [[]]
            for node, parent in enumerate(parents):
                paths.append([*paths[parent + 1], int(made.tokens[node])])
            for path in paths:
                if len(path) > 2:
                    continue
                states = f[: n - 1]
                for upto in range(len(path) + 1):
                    ids = torch.tensor(text[1:n] + path[:upto])
                    said, state = draft(table(ids)[None], states[None], torch.arange(1, len(ids) + 1)[None])
                    states = torch.cat([states, state[0, -1:]])
                best = model.lm_head(said[0, -1]).topk(3).indices.tolist()
                below = [int(made.tokens[i]) for i, parent in enumerate(parents) if paths[parent + 1] == path]
                assert below == best[: len(below)] and (below or form == "tree")


def test_the_two_halves_change_places_and_the_draft_changes(model):
    draft = noisy(_Eagle(model.config))
    swapped = noisy(_Eagle(model.config))
    swapped.load_state_dict(draft.state_dict())
    with torch.no_grad():
        last = swapped.layer.block.mlp.down_proj.weight
        last += swapped.second.weight
        swapped.second.weight.neg_()
        e, f, at = torch.randn(1, 5, D), torch.randn(1, 5, D), torch.arange(5)[None]
        (a, b), (c, d) = draft(e, f, at), swapped(e, f, at)
        torch.testing.assert_close(torch.stack([a, b]), torch.stack([d, c]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["tree", "chain"])
def test_greedy_text_is_the_targets(model, tmp_path, form):
    save(model, tiny_tokenizer(), tmp_path)
    method = FSPAD(form=form, depth=4, width=3, nodes=10).untrained(tmp_path, tmp_path / "draft")
    for at in range(12):
        ids = some(1, 1 + at)
        options = {"do_sample": False, "max_new_tokens": 24, "attention_mask": torch.ones_like(ids)}
        plain = model.generate(ids, **options)
        assert model.generate(ids, **options, **method.arguments(model, tiny_tokenizer())).tolist() == plain.tolist()


def test_logits_without_a_loss_are_refused():
    with pytest.raises(SmeltError, match="classification=0"):
        FSPAD(classification=0.0)
    assert isinstance(FSPAD().module(tiny().config).layer, Layer)


def test_the_cost_of_a_token_is_its_products(model):
    """2 FLOPs per weight forward and 4 back; the target's head once without and once with a way back to its input."""
    own = 2 * D * D + (3 + 1) * D * 48 + D  # join; gate, up, down and second; norm
    attention, feed, norms = D * (2 * 32 + 2 * 16), 3 * D * 48, 2 * D
    assert FSPAD().cost(_Eagle(model.config), model.config) == 6 * (own + attention + feed + norms) + (2 + 2 + 2) * V * D
