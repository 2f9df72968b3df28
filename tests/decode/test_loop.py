"""Loops built on it are tested each in its own file; here what all of them get."""

from __future__ import annotations

import pytest
import torch

from smelt.decode._loop import Row, Written, looped
from smelt.model._tiny import tiny
from smelt.spec import SmeltError

NO_ENDS = {"eos_token_id": None, "bos_token_id": None}


def greedy(model, row: Row) -> Written:
    """Plain greedy search, the slow way: the whole text anew for every token."""
    new: list[int] = []
    scores = []
    while not new or not row.over(new):
        with torch.no_grad():
            found = row.choice.scores([row.text + new], model(torch.tensor([row.text + new])).logits[0, -1:])
        scores += [found] * row.scored
        new.append(int(found.argmax()))
        row.show(new[-1:])
    return Written(new, None, scores)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", **NO_ENDS)


def test_it_is_plain_greedy_search_in_a_batch_with_processors_ends_and_lengths(model):
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7], [0, 9, 9, 9, 9]])
    mask = (ids != 0).long()
    free = model.generate(ids[1:2], attention_mask=mask[1:2], do_sample=False, max_new_tokens=12)[0, 5:].tolist()
    for more in (
        {},
        {"eos_token_id": free[6], "pad_token_id": 1},
        {"repetition_penalty": 1.3},
        {"max_new_tokens": 3},
        {"eos_token_id": free[2], "pad_token_id": 1, "min_new_tokens": 8},
    ):
        given = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, **more}
        ours = model.generate(ids, custom_generate=looped("it", greedy), **given)
        plain = model.generate(ids, **given)
        assert ours.tolist() == plain.tolist()


def test_scores_and_dictionaries(model):
    ids = torch.tensor([[3, 4, 5]])
    given = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True}
    ours = model.generate(ids, custom_generate=looped("it", greedy), **given)
    plain = model.generate(ids, **given)
    torch.testing.assert_close(torch.cat(ours.scores), torch.cat(plain.scores), rtol=1e-4, atol=1e-4)
    told = model.generate(ids, custom_generate=looped("it", greedy, result=lambda s, rows, config: (s, len(rows))), **given)
    assert told[1] == 1 and told[0].tolist() == plain.sequences.tolist()


def test_what_is_not_kept_is_refused_by_name(model):
    ids = torch.tensor([[3, 4, 5]])

    def run(loop, **more):
        return model.generate(ids, custom_generate=loop, do_sample=False, max_new_tokens=2, **more)

    for more, said in (
        ({"num_beams": 2}, "it cannot be combined with beam search"),
        ({"use_cache": False}, "it needs the key/value cache"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states is not kept; output_scores is"),
    ):
        with pytest.raises(SmeltError, match=said):
            run(looped("it", greedy), **more)
    with pytest.raises(SmeltError, match=r"output_scores is not kept$"):
        run(looped("it", greedy, scores=False), output_scores=True, return_dict_in_generate=True)
