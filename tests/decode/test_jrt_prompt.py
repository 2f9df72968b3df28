from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList

from smelt.attention._mixer import convert, place
from smelt.attention.based import Based
from smelt.decode._count import count
from smelt.decode.jrt_prompt import JrtPrompt, repeated
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.registry import parse
from smelt.runtime import bind
from smelt.spec import SmeltError

NO_ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module", params=["softmax", "based"])
def model(request):
    made = tiny("llama", **NO_ENDS)
    if request.param == "based":
        torch.manual_seed(1)
        place(made, convert(made, Based(width=6)))
    return made.eval()


def run(model, ids, **more):
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, **more)


def test_it_writes_what_follows_the_prompt_read_so_often(model):
    tokenizer = tiny_tokenizer()
    start = tokenizer.bos_token_id
    different = 0
    for times in (1, 2, 3):
        arguments = JrtPrompt(times=times).arguments(model, tokenizer)
        for prompt in (torch.randint(2, 320, (1, 9)), torch.cat([torch.tensor([[start]]), torch.randint(2, 320, (1, 9))], 1)):
            body = prompt[:, 1:] if prompt[0, 0] == start else prompt
            again = torch.cat([prompt] + [body] * (times - 1), 1)
            wanted = run(model, again)[0, again.shape[1] :].tolist()
            with count(model) as seen:
                out = run(model, prompt, **arguments)
            assert out[0].tolist() == prompt[0].tolist() + wanted
            assert seen.calls == 12 and seen.positions == again.shape[1] + 11
            different += wanted != run(model, prompt)[0, prompt.shape[1] :].tolist()
    assert different  # or reading twice changes nothing here


def test_a_start_token_stands_once():
    assert repeated([0, 5, 6], 3, 0) == [0, 5, 6, 5, 6, 5, 6]
    assert repeated([5, 6], 2, 0) == repeated([5, 6], 2, None) == [5, 6, 5, 6]
    assert repeated([0], 2, 0) == [0, 0]
    assert repeated([0, 5], 1, 0) == [0, 5]


def test_rows_of_a_batch_come_out_as_alone(model):
    rows = torch.randint(2, 320, (2, 8))
    mask = torch.ones_like(rows)
    mask[1, :3] = 0
    how = {"do_sample": False, "max_new_tokens": 8, **JrtPrompt().arguments(model, None)}
    out = model.generate(rows, attention_mask=mask, **how)
    for row in range(2):
        alone = rows[row, mask[row].bool()][None]
        assert out[row, 8:].tolist() == model.generate(alone, attention_mask=torch.ones_like(alone), **how)[0, alone.shape[1] :].tolist()


def test_processors_see_the_prompt_once_and_scores_are_theirs(model):
    prompt, lengths = torch.randint(2, 320, (1, 7)), []

    def banned(ids, scores):
        lengths.append(ids.shape[1])
        return scores.index_fill(1, torch.tensor([3]), -torch.inf)

    with bind(model, decode="jrt_prompt()"):
        out = run(model, prompt, logits_processor=LogitsProcessorList([banned]), return_dict_in_generate=True, output_scores=True)
    assert lengths == list(range(7, 19)) and out.past_key_values is None
    assert [int(scores.argmax()) for scores in out.scores] == out.sequences[0, 7:].tolist()
    assert all(scores[0, 3] == -torch.inf for scores in out.scores)


def test_it_ends_at_an_end_token_and_draws_when_asked(model):
    prompt = torch.randint(2, 320, (1, 7))
    arguments = JrtPrompt().arguments(model, None)
    free = run(model, prompt, **arguments)[0, 7:].tolist()
    ended = run(model, prompt, eos_token_id=free[4], pad_token_id=1, **arguments)[0, 7:].tolist()
    assert ended == free[: free.index(free[4]) + 1]
    torch.manual_seed(3)
    drawn = {tuple(model.generate(prompt, do_sample=True, max_new_tokens=4, **arguments)[0, 7:].tolist()) for _ in range(4)}
    assert len(drawn) > 1


def test_what_cannot_be_is_refused(model):
    arguments = JrtPrompt().arguments(model, None)
    prompt = torch.randint(2, 320, (1, 10))
    read = model(prompt[:, :6], use_cache=True).past_key_values
    with pytest.raises(SmeltError, match="cannot continue a cache that has read text"):
        run(model, prompt, past_key_values=read, **arguments)
    with pytest.raises(SmeltError, match="has 260 tokens, and the model's context is 256"):
        run(model, torch.randint(2, 320, (1, 130)), **arguments)
    with pytest.raises(SmeltError, match="beam search"):
        run(model, prompt, num_beams=2, **arguments)
    with pytest.raises(SmeltError):
        parse("jrt_prompt(times=0)", "decode")
