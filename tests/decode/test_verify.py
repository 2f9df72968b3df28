from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, TextStreamer

from smelt.decode._count import count
from smelt.decode._loop import Choice
from smelt.decode._verify import Draft, Drafter, verified
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.runtime import new_cache
from smelt.spec import SmeltError

NO_ENDS = {"eos_token_id": None, "bos_token_id": None}
IDS = torch.arange(2, 22)[None]


class Told(Drafter):
    """Drafts what it is told to: a function of the text, and a check of what it is told back."""

    def __init__(self, say, reads=False):
        self.say, self.reads, self.heard = say, reads, []

    def begin(self, text, choice):
        assert isinstance(choice, Choice)
        self.heard = []

    def draft(self, text, room):
        return self.say(text, room)

    def kept(self, text, read, hidden):
        self.heard.append((list(text), read, hidden))


@pytest.fixture(scope="module")
def target():
    return tiny("llama", **NO_ENDS)


@pytest.fixture(scope="module")
def answer(target):
    return run(target)[0].tolist()


def run(model, drafter=None, ids=IDS, new=64, **more):
    extra = {} if drafter is None else {"custom_generate": verified(drafter)}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{"do_sample": False, "max_new_tokens": new} | extra | more)


def oracle(answer, length):
    return lambda text, room: Draft(torch.tensor(answer[len(text) : len(text) + min(length, room)]))


def bushy(answer, rng):
    """A random tree in which the right path hides, at a random place, for a random depth."""

    def say(text, room):
        right = answer[len(text) : len(text) + int(torch.randint(0, min(4, room) + 1, (), generator=rng))]
        tokens, parents, at = [], [], -1
        for depth in range(min(4, room)):
            wrong = torch.randint(2, 320, (3,), generator=rng).tolist()
            below = [w for w in dict.fromkeys(wrong) if depth >= len(right) or w != right[depth]]
            place = int(torch.randint(0, len(below) + 1, (), generator=rng))
            level = below[:place] + right[depth : depth + 1] + below[place:]
            parents += [at] * len(level)
            tokens += level
            at = len(tokens) - len(level) + (place if depth < len(right) else 0)
        return Draft(torch.tensor(tokens), parents) if tokens else None

    return say


def test_an_oracle_needs_the_fewest_calls_and_no_draft_plain_ones(target, answer):
    with count(target) as seen:
        assert run(target, Told(oracle(answer, 8)))[0].tolist() == answer
    assert seen.calls == -(-64 // 9)
    with count(target) as seen:
        assert run(target, Told(lambda text, room: None))[0].tolist() == answer
    assert seen.calls == 64 and seen.positions == 20 + 63


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "mistral"])
def test_random_trees_leave_the_greedy_text_alone(architecture):
    """Also where a window makes trees impossible: there their first path is read."""
    model = tiny(architecture, **NO_ENDS)
    plain = run(model)[0].tolist()
    for seed in range(3):
        drafter = Told(bushy(plain, torch.Generator().manual_seed(seed)))
        with count(model) as seen:
            out = run(model, drafter, return_dict_in_generate=True)
        assert out.sequences[0].tolist() == plain
        assert out.past_key_values.get_seq_length() == len(plain) - 1
        assert seen.calls < 64
        assert run(model, drafter, new=40, eos_token_id=plain[30], pad_token_id=0)[0].tolist() == plain[: plain.index(plain[30], 20) + 1]


def test_a_cache_that_cannot_be_moved_in_reads_again(target, answer):
    cache = new_cache(target, "kivi(bits=4, group=16, window=128)")
    drafter = Told(bushy(answer, torch.Generator().manual_seed(4)))
    with count(target) as seen:
        assert run(target, drafter, past_key_values=cache)[0].tolist() == answer
    assert seen.calls < 64


def test_the_hidden_states_are_those_of_the_text(target, answer):
    drafter = Told(bushy(answer, torch.Generator().manual_seed(1)), reads=True)
    run(target, drafter)
    with torch.no_grad():
        whole = target.base_model(torch.tensor([answer])).last_hidden_state[0]
    known = 0
    for text, read, hidden in drafter.heard:
        assert text == answer[: len(text)] and read <= known
        torch.testing.assert_close(hidden, whole[read : read + len(hidden)], rtol=1e-4, atol=1e-4)
        known = read + len(hidden)
        assert known == len(text) - 1
    assert not target.base_model._forward_hooks


class Word(StoppingCriteria):
    """Stops once a token has been said, wherever in a round."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 20:] == self.token).any(1)


def test_a_custom_criterion_cuts_at_its_first_hit(target, answer):
    for at in (22, 27, 40):
        out = run(target, Told(oracle(answer, 8)), stopping_criteria=[Word(answer[at])])[0].tolist()
        assert out == run(target, stopping_criteria=[Word(answer[at])])[0].tolist() and len(out) < len(answer)


def test_scores_are_one_per_token(target, answer):
    plain = run(target, new=20, return_dict_in_generate=True, output_scores=True)
    ours = run(target, Told(bushy(answer, torch.Generator().manual_seed(2))), new=20, return_dict_in_generate=True, output_scores=True)
    assert len(ours.scores) == 20
    torch.testing.assert_close(torch.cat(ours.scores), torch.cat(plain.scores), rtol=1e-4, atol=1e-4)


def test_a_streamer_gets_every_token_in_order(target, answer, capsys):
    tokenizer = tiny_tokenizer()
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    run(target, Told(oracle(answer, 5)), streamer=streamer, follower=streamer)
    ours = capsys.readouterr().out
    run(target, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert ours == capsys.readouterr().out and ours.strip()


def test_a_cache_is_continued(target, answer):
    first = run(target, Told(oracle(answer, 4)), new=10, return_dict_in_generate=True)
    more = run(target, Told(oracle(answer, 4)), ids=first.sequences, new=54, past_key_values=first.past_key_values)
    assert more[0].tolist() == answer


def test_what_cannot_be_done_is_refused(target):
    drafter = Told(lambda text, room: None)
    with pytest.raises(SmeltError, match="num_beams=1"):
        run(target, drafter, num_beams=2)
    with pytest.raises(SmeltError, match="use_cache"):
        run(target, drafter, use_cache=False)
    with pytest.raises(SmeltError, match="output_attentions"):
        run(target, drafter, output_attentions=True, return_dict_in_generate=True)
