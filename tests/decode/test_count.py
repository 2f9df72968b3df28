"""The helper smelt/decode/_count.py."""

import pytest
import torch

from smelt.decode._count import count


def test_plain_greedy_is_one_call_a_token(model):
    ids = torch.arange(2, 9)[None]
    with count(model) as seen:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=11, min_new_tokens=11, do_sample=False)
    assert (seen.calls, seen.positions) == (11, 7 + 10)
    assert seen.tokens_per_call(out.shape[1] - 7) == 1.0


def test_positions_count_rows_however_the_input_is_given(model):
    ids = torch.ones(3, 5, dtype=torch.long)
    with count(model) as seen:
        model(ids)
        model(input_ids=ids[:, :2])
        model(inputs_embeds=model.get_input_embeddings()(ids[:1]))
    assert (seen.calls, seen.positions) == (3, 15 + 6 + 5)


def test_the_hook_goes_even_after_an_error(model):
    with pytest.raises(ZeroDivisionError), count(model) as seen:
        raise ZeroDivisionError
    model(torch.ones(1, 2, dtype=torch.long))
    assert seen.calls == 0 and not model._forward_pre_hooks
