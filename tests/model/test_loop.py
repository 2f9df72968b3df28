"""Looped blocks: parameters once, passes by hand, a cache of their own for every pass, and the way through a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from smelt.data import Document
from smelt.model._load import load, save
from smelt.model.loop import Loop, Looped
from smelt.model.mistral import Mistral
from smelt.registry import parse, text
from smelt.runtime import bind, cache_bytes
from smelt.spec import SmeltError


@dataclass(frozen=True)
class Lines:
    def documents(self, split):
        for i in range(40 if split == "train" else 0):
            yield Document(str(i), f"def function_{i}(value):\n    return value + {i}\n")


SIZES = dict(hidden=64, ffn=48, heads=2, kv_heads=1, vocab=300, context=64, data=Lines())  # noqa: C408


def made(**more):
    """Weights large enough that every pass changes the logits clearly."""
    model, tokenizer = Loop(**(SIZES | {"layers": 2} | more)).create(0)
    with torch.no_grad():
        for p in model.model.layers.parameters():
            if p.dim() == 2:
                p *= 8
    return model.eval(), tokenizer


def ids(rows=2, tokens=24):
    return torch.randint(2, 290, (rows, tokens))


def logits(model, tokens, **more):
    with torch.no_grad():
        return model(tokens, **more).logits


def test_once_without_residual_is_mistral_bit_for_bit():
    plain, _ = Mistral(**(SIZES | {"layers": 2})).create(3)
    looped, _ = Loop(**SIZES, times=1, residual=False).create(3)
    tokens = ids()
    assert torch.equal(logits(looped.eval(), tokens), logits(plain.eval(), tokens))
    assert not torch.equal(logits(made(times=2)[0], tokens), logits(made(times=2, residual=False)[0], tokens))


@pytest.mark.parametrize(("times", "layers"), [(1, 2), (2, 1), (3, 2), (9, 1)])
def test_parameters_do_not_depend_on_the_passes(times, layers):
    model, _ = Loop(**SIZES, times=times, layers=layers).create(0)
    d, f, h, g = 64, 48, 2, 1
    assert sum(p.numel() for p in model.parameters()) == 300 * d + layers * (2 * d * (h + g) * 64 + 3 * d * f + 2 * d) + d
    assert model.config.num_hidden_layers == times * layers == Loop(**SIZES, times=times, layers=layers).config().num_hidden_layers


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("times", [1, 3])
def test_passes_equal_those_by_hand(times, residual):
    """The blocks copied to every pass of a plain model, run one by one."""
    model, _ = made(times=times, residual=residual)
    plain, _ = Mistral(**(SIZES | {"layers": 2 * times})).create(1)
    for at, block in enumerate(plain.model.layers):
        block.load_state_dict(model.model.layers[0].blocks[at % 2].state_dict())
    tokens = ids()
    with torch.no_grad():
        states = model.model.embed_tokens(tokens)
        angles = model.model.rotary_emb(states, position_ids=torch.arange(24)[None])
        for n in range(times):
            inside = states
            for block in plain.model.layers[2 * n : 2 * n + 2]:
                inside = block(inside, attention_mask=None, position_embeddings=angles)
            states = states + inside if residual else inside
        wanted = model.lm_head(model.model.norm(states))
    torch.testing.assert_close(logits(model, tokens), wanted, atol=1e-5, rtol=1e-4)


def test_every_pass_has_its_own_place_in_the_cache():
    model, _ = made(times=3)
    tokens, past = ids(), None
    whole = logits(model, tokens)
    pieces = []
    for start, stop in [(0, 10), (10, 11), (11, 12), (12, 24)]:
        with torch.no_grad():
            out = model(tokens[:, start:stop], past_key_values=past, use_cache=True)
        past = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-5, rtol=1e-4)
    assert type(past) is DynamicCache and len(past.layers) == 6 and all(layer.keys.shape == (2, 1, 24, 64) for layer in past.layers)
    assert cache_bytes(past) == 2 * 6 * 2 * 24 * 64 * 4
    assert [block.self_attn.layer_idx for block in model.model.layers[0].blocks] == [0, 1]
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    assert torch.equal(model.generate(tokens, **settings), model.generate(tokens, use_cache=False, **settings))


def test_caches_of_methods_have_room_for_every_pass():
    model, _ = made(times=3)
    tokens = ids()
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    plain = model.generate(tokens, **settings)
    with bind(model, cache="sink_window(sinks=2, window=60)"):
        assert torch.equal(model.generate(tokens, **settings), plain)
    with pytest.raises(SmeltError, match="no attention module"), bind(model, attention="top_k()"):
        pass


def test_an_error_inside_leaves_the_layers_numbered_as_they_were():
    model, _ = made(times=3)
    handle = model.model.layers[0].blocks[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, ids())
    handle.remove()
    assert [block.self_attn.layer_idx for block in model.model.layers[0].blocks] == [0, 1]


@pytest.mark.parametrize("layers", [1, 2])
def test_it_survives_saving_and_no_other_program_loads_it_wrong(tmp_path, layers):
    model, tokenizer = made(times=9, layers=layers, residual=False)
    save(model, tokenizer, tmp_path)
    again, tokens = load(tmp_path).model, ids()
    assert torch.equal(logits(again, tokens), logits(model, tokens)) and isinstance(again.model.layers, Looped)
    assert (again.model.layers[0].times, again.model.layers[0].residual) == (9, False)
    with pytest.raises((ValueError, KeyError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["smelt"]["modules"] == {"model.layers": ["model.loop", {"times": 9, "residual": False}]}
    said["smelt"]["modules"]["model.layers"][1]["times"] = 4
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(SmeltError, match="4 passes"):
        load(tmp_path)


def test_gradients_come_from_every_pass_and_checkpointing_changes_none():
    model, _ = made(times=3)
    tokens, found = ids(), []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*found, strict=True):
        assert torch.isfinite(one).all() and one.abs().sum() > 0
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_writers_to_the_residual_stream_start_smaller_with_more_passes():
    model, _ = Loop(**(SIZES | {"hidden": 256, "ffn": 512}), times=4).create(0)
    for block in model.model.layers[0].blocks:
        for module in (block.self_attn.o_proj, block.mlp.down_proj):
            n, spread = module.weight.numel(), 0.02 / (2 * 4 * 2) ** 0.5
            assert abs(module.weight.std().item() / spread - 1) < 5 / (2 * n) ** 0.5


def test_settings_and_errors():
    method = parse("loop(times=2, residual=False, layers=6, data=stdlib())", "model")
    assert text(method) == "loop(times=2, residual=False, layers=6, data=stdlib())"
    for bad in ("loop(times=0)", "loop(times=10)", "loop(layers=0)"):
        with pytest.raises(SmeltError):
            parse(bad, "model")
    with pytest.raises(SmeltError, match="loop needs a corpus"):
        Loop().create(0)
    with pytest.raises(SmeltError, match="loop: heads=3 is not a multiple"):
        Loop(**(SIZES | {"heads": 3, "kv_heads": 2})).config()
