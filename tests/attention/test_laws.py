"""Laws of every attention method. None is named here."""

from __future__ import annotations

import pytest
import torch

from smelt import registry
from smelt.model._tiny import tiny
from smelt.runtime import bind

METHODS = registry.names("attention")
CLASSES = [registry.load("attention", name) for name in METHODS]
WORKING = [pytest.param(make(), id=registry.text(make())) for cls in CLASSES for make in (cls, cls.example)]
ALL = [pytest.param(cls.unlimited(), id=name) for name, cls in zip(METHODS, CLASSES)]
EXACT = [case for case in WORKING if case.values[0].exact]
NO_ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module")
def decoder():
    return tiny("llama", **NO_ENDS)


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(2, 320, (rows, tokens))


def logits(model, tokens, **more):
    with torch.no_grad():
        return model(tokens, **more).logits


def padded(rows: torch.Tensor, by: int) -> tuple[torch.Tensor, dict]:
    """The rows with `by` tokens of noise on their left, and the arguments that say so."""
    noise = torch.randint(2, 320, (rows.shape[0], by))
    mask = torch.cat([torch.zeros_like(noise), torch.ones_like(rows)], 1)
    return torch.cat([noise, rows], 1), {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("method", ALL + EXACT)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"])
def test_keeping_everything_equals_sdpa(method, architecture):
    model, tokens = tiny(architecture, **NO_ENDS), ids(2, 50)
    plain = logits(model, tokens)
    with bind(model, attention=method):
        torch.testing.assert_close(logits(model, tokens), plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ALL + EXACT)
def test_keeping_everything_in_an_encoder_equals_sdpa(method):
    model, tokens = tiny("bert"), ids(2, 40)
    mask = torch.ones_like(tokens)
    mask[0, 30:] = 0
    with torch.no_grad():
        plain = model(tokens, attention_mask=mask).last_hidden_state
        with bind(model, attention=method):
            torch.testing.assert_close(model(tokens, attention_mask=mask).last_hidden_state, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ALL)
def test_keeping_everything_writes_what_sdpa_writes(decoder, method):
    prompt = ids(2, 30)
    for settings in ({}, {"num_beams": 3}):
        plain = decoder.generate(prompt, max_new_tokens=15, do_sample=False, **settings)
        with bind(decoder, attention=method):
            assert torch.equal(decoder.generate(prompt, max_new_tokens=15, do_sample=False, **settings), plain)


@pytest.mark.parametrize("method", WORKING + ALL)
def test_a_later_token_leaves_earlier_logits_bit_identical(decoder, method):
    tokens = ids(2, 64)
    other = tokens.clone()
    other[:, 40:] = ids(2, 24)
    with bind(decoder, attention=method):
        one, two = logits(decoder, tokens), logits(decoder, other)
    assert torch.equal(one[:, :40], two[:, :40]) and not torch.equal(one[:, 40:], two[:, 40:])


@pytest.mark.parametrize("method", WORKING + ALL)
def test_padding_on_the_left_counts_for_nothing(decoder, method):
    tokens = ids(2, 50)
    with bind(decoder, attention=method):
        alone = logits(decoder, tokens)
        more, said = padded(tokens, 14)
        torch.testing.assert_close(logits(decoder, more, **said)[:, 14:], alone, atol=2e-5, rtol=1e-4)
        assert torch.isfinite(logits(decoder, more, **said)).all()


@pytest.mark.parametrize("method", WORKING + ALL)
def test_chunks_through_a_cache_equal_one_call(decoder, method):
    tokens = ids(2, 60)
    with bind(decoder, attention=method), torch.no_grad():
        whole = logits(decoder, tokens)
        past, pieces = None, []
        for start, stop in [(0, 25), (25, 26), (26, 50), (50, 60)]:
            out = decoder(tokens[:, start:stop], past_key_values=past, use_cache=True)
            past = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", WORKING)
def test_one_row_does_not_change_another(decoder, method):
    tokens = ids(2, 64)
    other = tokens.clone()
    other[1] = ids(1, 64)[0]
    with bind(decoder, attention=method):
        assert torch.equal(logits(decoder, tokens)[0], logits(decoder, other)[0])


@pytest.mark.parametrize("method", WORKING + ALL)
def test_gradients_are_finite(method):
    model = tiny("llama", **NO_ENDS)
    tokens = ids(2, 40)
    with bind(model, attention=method):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("method", WORKING)
def test_leaving_the_block_restores_the_model_bit_for_bit(decoder, method):
    tokens = ids(1, 64)
    plain = logits(decoder, tokens)
    with bind(decoder, attention=method):
        logits(decoder, tokens)
    assert torch.equal(logits(decoder, tokens), plain)
