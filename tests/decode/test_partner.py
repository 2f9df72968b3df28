"""What is refused is tested through test_speculative.py and test_entropy_switch.py."""

from __future__ import annotations

import torch

from smelt.decode._partner import partner
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer


def test_it_comes_in_the_precision_of_the_model(tmp_path):
    save(tiny("llama"), tiny_tokenizer(), tmp_path)
    model = tiny("llama").double()
    other = partner("a test's", str(tmp_path), model, tiny_tokenizer())
    assert other.dtype == torch.float64 and other is not model
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
