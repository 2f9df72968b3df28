"""Tiny models differ by input and by seed, and the tokenizer knows every byte."""

from __future__ import annotations

import pytest
import torch

from smelt.model._tiny import ARCHITECTURES, tiny, tiny_tokenizer
from smelt.spec import SmeltError


def outputs(model, ids):
    with torch.no_grad():
        found = model(input_ids=ids)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_seed_is_the_same_model_and_outputs_differ_by_input(name):
    a, b, c = tiny(name), tiny(name), tiny(name, seed=1)
    ids = torch.arange(2, 18)[None]
    assert torch.equal(outputs(a, ids), outputs(b, ids)) and not torch.equal(outputs(a, ids), outputs(c, ids))
    changed = ids.clone()
    changed[0, 3] = 200
    difference = (outputs(a, ids) - outputs(a, changed)).abs().amax(-1)[0]
    assert difference[3] > 0.05 and difference[-1] > 1e-3
    assert (difference[:3].max() == 0) == (name != "bert")  # a decoder does not see the future
    assert not a.training and a.dtype == torch.float32


def test_making_one_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    tiny("llama")
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_unknown_one_names_the_nearest():
    with pytest.raises(SmeltError, match="did you mean 'llama'"):
        tiny("lama")


def test_the_tokenizer_fits_the_models():
    tokenizer = tiny_tokenizer()
    assert max(tokenizer.get_vocab().values()) < tiny("llama").config.vocab_size
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
