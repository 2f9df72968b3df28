"""Laws of every attention method. None is named here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from smelt import registry
from smelt.attention import Attention
from smelt.attention._mixer import Converting, MixerModule, State, Transferring, convert, place
from smelt.model._load import load, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.runtime import bind, cache_bytes
from smelt.spec import SmeltError

METHODS = registry.names("attention")
EVERY = [registry.load("attention", name) for name in METHODS]
CLASSES = [cls for cls in EVERY if issubclass(cls, Attention)]  # the other kinds have laws below
CONVERTING = [cls for cls in EVERY if issubclass(cls, Converting)]
TRANSFERRING = [cls for cls in CONVERTING if issubclass(cls, Transferring)]
WORKING = [pytest.param(make(), id=registry.text(make())) for cls in CLASSES for make in (cls, cls.example)]
ALL = [pytest.param(cls.unlimited(), id=name) for name, cls in zip([registry.name_of(c.unlimited())[1] for c in CLASSES], CLASSES)]
EXACT = [case for case in WORKING if case.values[0].exact]
STEADY = [case for case in WORKING if not case.values[0].prompt_wide]  # a key is read or not whatever comes later
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


@pytest.mark.parametrize("method", STEADY + ALL)
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


@pytest.mark.parametrize("method", [case for case in WORKING if case.values[0].prompt_wide])
def test_what_is_read_may_follow_from_the_whole_prompt_but_nothing_later_is_read(method):
    """Other values behind position 40, keys and queries the same: outputs before it do not move by a bit."""
    torch.manual_seed(0)
    for tokens in (64, 300, 333):
        query, key = torch.randn(1, 4, tokens, 32), torch.randn(1, 2, tokens, 32)
        value, other = torch.randn(2, 1, 2, tokens, 32).unbind(0)
        other = torch.cat([value[:, :, : tokens - 24], other[:, :, tokens - 24 :]], 2)
        module = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
        one, two = (method(module, query, key, v, None, scaling=32**-0.5)[0] for v in (value, other))
        assert torch.equal(one[:, : tokens - 24], two[:, : tokens - 24]) and not torch.equal(one[:, -1], two[:, -1])


@pytest.mark.parametrize("method", STEADY + ALL)
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


# Methods that put other modules in the place of attention.


def converted(cls, architecture="llama", **more):
    torch.manual_seed(1)
    model = tiny(architecture, **NO_ENDS, **more).eval()
    place(model, convert(model, cls.example()))
    return model.eval()


def conversions(function):
    return pytest.mark.parametrize("cls", [pytest.param(cls, id=registry.name_of(cls.example())[1]) for cls in CONVERTING])(function)


@conversions
def test_step_by_step_and_in_chunks_equals_the_parallel_form(cls):
    model, tokens = converted(cls), ids(2, 60)
    whole = logits(model, tokens, use_cache=False)
    first = max(module.prefix for module in model.modules() if isinstance(module, MixerModule))
    for cuts in ([(0, 25), (25, 26), (26, 50), (50, 60)], [(0, first), *((i, i + 1) for i in range(first, 60))]):
        past, pieces = DynamicCache(), []
        with torch.no_grad():
            for start, stop in cuts:
                pieces.append(model(tokens[:, start:stop], past_key_values=past, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=5e-5, rtol=1e-4)
        assert past.get_seq_length() == 60 and all(type(layer) is State for layer in past.layers)


@conversions
def test_a_converted_model_is_causal_and_its_rows_are_apart(cls):
    model, tokens = converted(cls), ids(2, 64)
    other = tokens.clone()
    other[0, 40:] = ids(1, 24)[0]
    one, two = logits(model, tokens), logits(model, other)
    torch.testing.assert_close(one[0, :40], two[0, :40], atol=1e-6, rtol=1e-5)
    assert torch.equal(one[1], two[1]) and not torch.allclose(one[0, 40:], two[0, 40:], atol=1e-4)


@conversions
def test_padding_on_the_left_leaves_no_trace(cls):
    model, tokens = converted(cls), ids(2, 50)
    more, said = padded(tokens, 14)
    torch.testing.assert_close(logits(model, more, **said)[:, 14:], logits(model, tokens), atol=5e-5, rtol=1e-4)
    settings = {"max_new_tokens": 10, "do_sample": False}
    alone = model.generate(tokens, **settings)[:, 50:]
    assert torch.equal(model.generate(more, attention_mask=said["attention_mask"], **settings)[:, 64:], alone)


@conversions
def test_generation_is_what_full_recomputation_gives_with_beams_too(cls):
    model, tokens = converted(cls), ids(2, 40)
    for settings in ({}, {"num_beams": 3}):
        written = model.generate(tokens, max_new_tokens=12, do_sample=False, **settings)
        assert torch.equal(written, model.generate(tokens, max_new_tokens=12, do_sample=False, use_cache=False, **settings))


@conversions
def test_the_states_are_as_large_as_the_formula_says(cls):
    model = converted(cls)
    for tokens in (1, 31, 64, 100):
        past = DynamicCache()
        with torch.no_grad():
            model(ids(3, tokens), past_key_values=past, use_cache=True)
        assert cache_bytes(past) == cls.example().state_bytes(model.config, tokens, batch=3), tokens
    past.reset()
    assert cache_bytes(past) == 0
    with pytest.raises(SmeltError, match="cannot go back"):
        past.layers[0].crop(-1)


@conversions
def test_a_converted_checkpoint_loads_as_it_was_and_no_other_program_loads_it_wrong(cls, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokens = converted(cls), ids(1, 30)
    save(model, tiny_tokenizer(), tmp_path)
    assert torch.equal(logits(load(tmp_path).model, tokens), logits(model, tokens))
    with pytest.raises((ValueError, KeyError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@conversions
def test_what_is_kept_of_the_model_is_the_same_and_gradients_are_finite(cls):
    torch.manual_seed(1)
    model = tiny("llama", **NO_ENDS)
    kept = {name: p.clone() for name, p in model.named_parameters()}
    place(model, convert(model, cls.example()))
    for name, p in model.named_parameters():
        if name in kept and kept[name].shape == p.shape and "self_attn" not in name:
            assert torch.equal(p, kept[name])
    tokens = ids(2, 40)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("cls", [pytest.param(cls, id=registry.name_of(cls.example())[1]) for cls in TRANSFERRING])
def test_a_transfer_has_finite_losses_and_gradients_for_what_it_trains_alone(cls):
    torch.manual_seed(1)
    model, method = tiny("llama", **NO_ENDS), cls.example()
    made = convert(model, method)
    model.requires_grad_(False)
    read = {}
    hooks = [w.register_forward_pre_hook(lambda m, a, k, i=i: read.update({i: k}), with_kwargs=True) for i, (w, _) in made.items()]
    logits(model, ids(2, 48))
    for hook in hooks:
        hook.remove()
    for index, (was, mixer) in made.items():
        mixer.requires_grad_(False)
        learned = method.learned(mixer)
        assert learned
        for p in learned:
            p.requires_grad_(True)
        for progress in (0.0, 0.99):  # stages may differ; together they reach all that is learned
            before = [0.0 if p.grad is None else p.grad.clone() for p in learned]
            loss = method.lost(mixer, was, read[index]["hidden_states"], read[index]["position_embeddings"], progress)
            assert loss.shape == (2, 48) and loss.dtype == torch.float32 and (loss >= 0).all()
            loss.mean().backward()
            assert any(p.grad is not None and float((p.grad - was_).abs().sum()) > 0 for p, was_ in zip(learned, before))
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learned)
