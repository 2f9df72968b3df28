from __future__ import annotations

import pytest
import torch

from smelt.distill._capture import Capture
from smelt.model._tiny import tiny
from smelt.model._walk import blocks, projections_of
from smelt.spec import SmeltError


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "bert"])
def test_it_reads_what_the_three_maps_make(architecture):
    model = tiny(architecture)
    ids = torch.randint(320, (2, 7))
    capture = Capture(model)
    out = model(input_ids=ids, output_hidden_states=True)
    taken = capture.take()
    assert len(taken) == 2
    heads, kv = (4, 4) if architecture == "bert" else (4, 2)
    for query, key, value in taken:
        assert query.shape == (2, 7, heads * 16)
        assert key.shape == value.shape == (2, 7, kv * 16)
    if architecture == "llama":  # the first layer by hand
        layer = model.model.layers[0]
        torch.testing.assert_close(taken[0][0], layer.self_attn.q_proj(layer.input_layernorm(out.hidden_states[0])))
        taken[1][2].sum().backward()
        assert model.model.layers[1].self_attn.v_proj.weight.grad.abs().sum() > 0
    capture.close()
    model(input_ids=ids)
    assert not capture._found
    assert not any(module._forward_hooks for block in blocks(model) for module in projections_of(block))


def test_one_fused_map_is_refused():
    with pytest.raises(SmeltError, match="not three separate maps"):
        Capture(tiny("phi3"))
