"""JRT-RNN with a prefix of 16: what test_laws.py asks of every mixer, as far as a prefix lets it, and what the prefix adds."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from smelt.attention._mixer import State, convert, place
from smelt.attention.based import Based
from smelt.attention.jrt import Jrt
from smelt.model._load import load, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import attention_of, blocks
from smelt.registry import parse
from smelt.runtime import cache_bytes
from smelt.spec import SmeltError

M = 16
NO_ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    made = tiny("llama", **NO_ENDS)
    place(made, convert(made, Jrt(width=6, prefix=M)))
    with torch.no_grad():
        for block in blocks(made):
            attention_of(block).encoder_v_proj.weight.normal_(std=0.1)  # no longer a copy of the values'
    return made.eval()


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(2, 320, (rows, tokens))


def logits(model, tokens, **more):
    with torch.no_grad():
        return model(tokens, **more).logits


def slow(module, hidden):
    """The weighted mean of the causal and the encoder's values written out, float64."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "encoder_k_proj", "encoder_v_proj")
    maps = {name: getattr(module, name).weight.double() for name in names}
    size, f = maps["v_proj"].shape[0] // module.groups, module.width
    rows = []
    for row in hidden.double():
        out = torch.zeros(len(row), module.heads * size).double()
        for h in range(module.heads):
            g = h * module.groups // module.heads
            query = row @ maps["q_proj"][h * f : (h + 1) * f].T
            key, encoded = (row @ maps[n][g * f : (g + 1) * f].T for n in ("k_proj", "encoder_k_proj"))
            value, more = (row @ maps[n][g * size : (g + 1) * size].T for n in ("v_proj", "encoder_v_proj"))
            for i in range(len(row)):
                read = torch.cat([key[: i + 1], encoded[: module.prefix]]) @ query[i] / f**0.5
                weight = 1 + read + read**2 / 2
                out[i, h * size : (h + 1) * size] = weight @ torch.cat([value[: i + 1], more[: module.prefix]]) / weight.sum()
        rows.append(out @ maps["o_proj"].T)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [5, 16, 40])
def test_it_is_the_mean_over_what_came_before_and_over_the_prefix(model, tokens):
    module, hidden = attention_of(blocks(model)[1]), torch.randn(2, tokens, 64)
    with torch.no_grad():
        made = module.mix(hidden, (hidden, hidden), None, None)
    torch.testing.assert_close(made.double(), slow(module, hidden), atol=1e-5, rtol=1e-4)


def test_the_prefix_sees_itself_and_no_token_sees_beyond(model):
    tokens = ids(1, 48)
    plain = logits(model, tokens)
    for at in (3, M - 1, M, 30):
        other = tokens.clone()
        other[0, at] = (tokens[0, at] + 1) % 320
        moved = (logits(model, other) - plain)[0].abs().amax(-1) > 1e-4
        first = 0 if at < M else at  # a change inside the prefix is seen from the first token on, one behind it from its place on
        assert moved[first:].all() and not moved[:first].any(), at


@pytest.mark.parametrize("cuts", [[M, 60], [25, 26, 50, 60], [*range(M, 61)]], ids=["two", "some", "single"])
def test_pieces_after_the_prefix_equal_one_call(model, cuts):
    tokens, past, pieces = ids(2, 60), DynamicCache(), []
    for start, stop in zip([0, *cuts], cuts):
        pieces.append(logits(model, tokens[:, start:stop], past_key_values=past, use_cache=True))
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, tokens, use_cache=False), atol=5e-5, rtol=1e-4)
    assert past.get_seq_length() == 60 and all(type(layer) is State for layer in past.layers)


@pytest.mark.parametrize("tokens", [7, 40])
def test_padding_is_no_part_of_the_prefix(model, tokens):
    rows = ids(2, tokens)
    noise = ids(2, 14)
    mask = torch.cat([torch.zeros_like(noise), torch.ones_like(rows)], 1)
    more, places = torch.cat([noise, rows], 1), (mask.cumsum(1) - 1).clamp(min=0)
    padded = logits(model, more, attention_mask=mask, position_ids=places)[:, 14:]
    torch.testing.assert_close(padded, logits(model, rows), atol=5e-5, rtol=1e-4)
    how = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(more, attention_mask=mask, **how)[:, 14 + tokens :], model.generate(rows, **how)[:, tokens:])


def test_what_is_written_is_causal_however_short_the_prompt(model):
    """From M tokens on, the same as reading it all again, with beams too; below, the prompt alone stays the prefix."""
    tokens = ids(2, 40)
    for settings in ({}, {"num_beams": 3}):
        how = {"max_new_tokens": 10, "do_sample": False, **settings}
        assert torch.equal(model.generate(tokens, **how), model.generate(tokens, **how, use_cache=False))
    short = ids(1, 6)
    out = model.generate(short, max_new_tokens=8, do_sample=False)
    past = DynamicCache()
    first = logits(model, short, past_key_values=past, use_cache=True)[:, -1:]
    rest = logits(model, out[:, 6:-1], past_key_values=past, use_cache=True)
    assert torch.cat([first, rest], 1).argmax(-1).tolist() == out[:, 6:].tolist()


def test_zero_maps_are_not_based_but_no_encoder_sums_are(model):
    """phi(0) = (1, 0, ..., 0): an encoder of zeros still adds the tokens of the prefix to every denominator."""
    module, hidden = attention_of(blocks(model)[0]), torch.randn(2, 40, 64)
    other = tiny("llama", **NO_ENDS)
    place(other, convert(other, Based(width=6, layers=(0,))))
    based = attention_of(blocks(other)[0])
    keep = {name: p.clone() for name, p in module.named_parameters() if "encoder" in name}
    with torch.no_grad():
        based.load_state_dict({name: p for name, p in module.state_dict().items() if "encoder" not in name})
        plain = based.mix(hidden, (hidden, hidden), None, None)
        for name in keep:
            module.get_parameter(name).zero_()
        zero = module.mix(hidden, (hidden, hidden), None, None)
        assert not torch.allclose(zero, plain, atol=1e-3)
        one = torch.eye(64)
        for made in (module, based):
            made.o_proj = torch.nn.Linear(64, 64, bias=False)
            made.o_proj.weight.copy_(one)
        zero, plain = module.mix(hidden, (hidden, hidden), None, None), based.mix(hidden, (hidden, hidden), None, None)
        query = (hidden @ module.q_proj.weight.T).unflatten(-1, (4, 6)).transpose(1, 2)
        key = (hidden @ module.k_proj.weight.T).unflatten(-1, (2, 6)).transpose(1, 2).repeat_interleave(2, 1)
        s = query @ key.mT / 6**0.5
        z = (1 + s + s**2 / 2).tril().sum(-1)
        wanted = plain.unflatten(-1, (4, 16)) * (z / (z + M)).transpose(1, 2)[..., None]
        torch.testing.assert_close(zero, wanted.flatten(2), atol=1e-5, rtol=1e-4)
        module._encoded = lambda hidden, real: None
        torch.testing.assert_close(module.mix(hidden, (hidden, hidden), None, None), plain)
        del module._encoded
        module.o_proj = other.model.layers[1].self_attn.o_proj
        for name, p in keep.items():
            module.get_parameter(name).copy_(p)


def test_the_state_is_as_large_as_that_of_based(model):
    for tokens in (1, 15, 50):
        past = DynamicCache()
        logits(model, ids(3, tokens), past_key_values=past, use_cache=True)
        size = Jrt(width=6, prefix=M).state_bytes(model.config, tokens, batch=3)
        assert cache_bytes(past) == size == Based(width=6).state_bytes(model.config, tokens, batch=3)


def test_the_encoders_values_start_as_a_copy_and_what_is_kept_is_the_models_own(tmp_path):
    made = tiny("llama", **NO_ENDS)
    was = attention_of(blocks(made)[1])
    place(made, convert(made, Jrt(prefix=M, layers=(1,))))
    module = attention_of(blocks(made)[1])
    assert module.v_proj.weight is was.v_proj.weight and module.o_proj.weight is was.o_proj.weight
    assert torch.equal(module.encoder_v_proj.weight, was.v_proj.weight) and module.encoder_v_proj.weight is not was.v_proj.weight
    with torch.no_grad():
        module.encoder_v_proj.weight.mul_(-1.0)
    save(made, tiny_tokenizer(), tmp_path)
    again = load(tmp_path).model
    tokens = ids(1, 40)
    assert attention_of(blocks(again)[1]).prefix == M and torch.equal(logits(again, tokens), logits(made, tokens))


def test_what_cannot_be_is_refused():
    with pytest.raises(SmeltError, match="jrt keeps linear maps"):
        convert(tiny("phi3"), Jrt())
    with pytest.raises(SmeltError):
        parse("jrt(prefix=0)", "attention")
