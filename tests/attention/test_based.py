from __future__ import annotations

import pytest
import torch

from smelt.attention._mixer import MixerModule, State, convert, place
from smelt.attention.based import Based
from smelt.model._tiny import tiny
from smelt.model._walk import attention_of, blocks
from smelt.registry import parse
from smelt.spec import SmeltError

NO_ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


def mixed(method, **more):
    model = tiny("llama", **NO_ENDS, **more)
    place(model, convert(model, method))
    return model.eval()


def slow(module, hidden):
    """The weighted mean written out, float64, one query at a time."""
    hidden = hidden.double()
    maps = {name: getattr(module, name).weight.double() for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    size = maps["v_proj"].shape[0] // module.groups
    rows = []
    for row in hidden:
        out = torch.zeros(len(row), module.heads * size).double()
        for h in range(module.heads):
            g = h * module.groups // module.heads
            query = row @ maps["q_proj"][h * module.width : (h + 1) * module.width].T
            key = row @ maps["k_proj"][g * module.width : (g + 1) * module.width].T
            value = row @ maps["v_proj"][g * size : (g + 1) * size].T
            for i in range(len(row)):
                s = key[: i + 1] @ query[i] / module.width**0.5
                weight = 1 + s + s**2 / 2
                out[i, h * size : (h + 1) * size] = weight @ value[: i + 1] / weight.sum()
        rows.append(out @ maps["o_proj"].T)
    return torch.stack(rows)


@pytest.mark.parametrize("width", [1, 5, 16])
def test_it_is_the_weighted_mean_of_the_values_so_far(width):
    module = attention_of(blocks(mixed(Based(width=width)))[1])
    hidden = torch.randn(2, 150, 64)  # more than one chunk
    with torch.no_grad():
        made = module.mix(hidden, (hidden, hidden), None, None)
    torch.testing.assert_close(made.double(), slow(module, hidden), atol=1e-5, rtol=1e-4)


def test_values_and_output_are_the_models_own_and_no_position_is_known():
    model = tiny("llama", **NO_ENDS)
    was = attention_of(blocks(model)[0])
    place(model, convert(model, Based(layers=(0,))))
    module = attention_of(blocks(model)[0])
    assert module.v_proj.weight is was.v_proj.weight and module.o_proj.weight is was.o_proj.weight
    assert isinstance(module, MixerModule) and not isinstance(attention_of(blocks(model)[1]), MixerModule)
    hidden = torch.randn(1, 9, 64)
    with torch.no_grad():
        one = module.mix(hidden, (hidden, hidden), None, None)[:, -1]
        other = module.mix(hidden[:, [3, 1, 0, 2, 6, 5, 7, 4, 8]], (hidden, hidden), None, None)[:, -1]
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [(0,), (1,)])
def test_beside_softmax_layers_it_writes_what_full_recomputation_writes(layers):
    model = mixed(Based(layers=layers))
    ids = torch.randint(2, 320, (2, 30))
    how = {"max_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        out = model.generate(ids, **how, return_dict_in_generate=True)
        assert torch.equal(out.sequences, model.generate(ids, **how, use_cache=False))
    held = [layer for layer in out.past_key_values.layers if isinstance(layer, State)]
    groups, size = 2, 16
    assert [tuple(layer.held["sums"].shape) for layer in held] == [(2, groups, 153, size + 1)]
    assert Based(layers=layers).state_bytes(model.config, 41, batch=2) == 4 * 2 * groups * 153 * (size + 1)


def test_an_empty_one_draws_no_random_numbers():
    was = attention_of(blocks(tiny("llama"))[0])
    state = torch.get_rng_state()
    Based.module.build(was, width=7)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_is_refused():
    with pytest.raises(SmeltError, match="no such 'v_proj'"):
        convert(tiny("phi3"), Based())
    for bad in ("based(width=0)", "based(layers=1)"):
        with pytest.raises(SmeltError):
            parse(bad, "attention")
    assert parse("based(width=8, layers=(1,))", "attention") == Based(width=8, layers=(1,))
