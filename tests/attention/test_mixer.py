"""The helper smelt/attention/_mixer.py with the plainest mixer there is: the mean of all values so far."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from smelt.attention._mixer import MixerModule, State, convert, place
from smelt.model._tiny import tiny
from smelt.model._walk import attention_of, blocks
from smelt.spec import SmeltError


class Mean(MixerModule):
    def __init__(self, was):
        super().__init__(was)
        self.v_proj = was.v_proj
        self.o_proj = was.o_proj
        self.groups = was.num_key_value_groups

    def settings(self):
        return {}

    @classmethod
    def build(cls, was):
        return cls(was)

    def mix(self, hidden, angles, state, real):
        value = self.v_proj(hidden)
        count = torch.ones(hidden.shape[:2]) if real is None else real.float()
        value = value * count[..., None]
        total, seen = value.cumsum(1), count.cumsum(1)
        if state is not None:
            if state.held:
                total, seen = total + state.held["total"][:, None], seen + state.held["seen"][:, None]
            state.held = {"total": total[:, -1], "seen": seen[:, -1]}
        mean = total / seen.clamp(min=1)[..., None]
        return self.o_proj(mean.unflatten(-1, (-1, 32)).repeat_interleave(self.groups, 2).flatten(2))


class Method:
    layers = None

    def mixer(self, was, config):
        return Mean(was)


def test_what_is_converted_keeps_its_parameters_and_goes_on_from_its_state():
    model = tiny("llama")
    value = attention_of(blocks(model)[0]).v_proj.weight
    made = convert(model, Method())
    assert isinstance(attention_of(blocks(model)[0]), nn.Module) and not isinstance(attention_of(blocks(model)[0]), Mean)
    place(model, made)
    assert attention_of(blocks(model)[0]).v_proj.weight is value
    ids = torch.randint(2, 300, (2, 20))
    with torch.no_grad():
        whole = model(ids).logits
        past = DynamicCache()
        first = model(ids[:, :13], past_key_values=past).logits
        rest = model(ids[:, 13:], past_key_values=past).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, atol=1e-5, rtol=1e-4)
    assert past.get_seq_length() == 20 and type(past.layers[0]) is State
    past.layers[0].batch_select_indices(torch.tensor([1]))
    assert past.layers[0].held["total"].shape[0] == 1
    with pytest.raises(SmeltError, match="cannot go back"):
        past.layers[0].crop(-1)
    past.layers[0].crop(0)
    with pytest.raises(SmeltError, match="takes no keys"):
        past.layers[0].update(None, None)


def test_layers_are_named_and_a_second_conversion_is_refused():
    model = tiny("llama")
    some = SimpleNamespace(layers=(1,), mixer=Method().mixer)
    place(model, convert(model, some))
    kinds = [isinstance(attention_of(block), Mean) for block in blocks(model)]
    assert kinds == [False, True]
    with pytest.raises(SmeltError, match="layer 1 has been converted already"):
        convert(model, some)
    with pytest.raises(SmeltError, match="layer 7 was asked for, and the model has 2"):
        convert(model, SimpleNamespace(layers=(7,), mixer=Method().mixer))
    past = DynamicCache()
    plain = tiny("llama")
    ids = torch.randint(2, 300, (1, 5))
    plain(ids, past_key_values=past)
    with pytest.raises(SmeltError, match="filled by another model"):
        model(ids, past_key_values=past)
