from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smelt import registry
from smelt.data._tokens import Tokens
from smelt.distill._sampling import Sampler, finish, holds, sampling, spoken
from smelt.distill.gkd import GKD
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import multiplied
from smelt.runtime import bind
from smelt.spec import SmeltError
from smelt.train import Course, Training

EOS = 0


def batch(rows=4, context=10, first=0):
    whole = torch.randint(2, 50, (rows, context + 1), generator=torch.Generator().manual_seed(first))
    return {"input_ids": whole[:, :-1], "labels": whole[:, 1:], "row": torch.arange(first, first + rows)}


def writer(length=None, eos_at=None):
    """Goes on with 100, 101, ...; `eos_at[i]`: row i ends after so many tokens."""

    def write(start, new, temperature, seed):
        made = 100 + torch.arange(new if length is None else min(length, new)).repeat(len(start), 1)
        for i, at in (eos_at or {}).items():
            if i < len(start):
                made[i, at:] = EOS
        return torch.cat([start, made], 1)

    return write


def slow_row(ids, labels, prompt, new, ends):
    """One replaced row, token by token."""
    t = len(ids)
    made = list(ids[:prompt])
    kept = [False] * prompt
    for step in range(min(new or t, t + 1 - prompt)):
        made.append(EOS if ends is not None and step >= ends else 100 + step)
        kept.append(ends is None or step <= ends)
    while len(made) < t + 1:
        made.append(EOS)
        kept.append(False)
    return made[:-1], [token if keep else -100 for token, keep in zip(made[1:], kept[1:], strict=True)]


@pytest.mark.parametrize("prompt, new", [(1, 0), (4, 0), (4, 3), (4, 99), (10, 0)])
def test_a_replaced_row_holds_prompt_and_sample_and_only_the_sample_counts(prompt, new):
    inputs = batch()
    before = {name: value.clone() for name, value in inputs.items()}
    ends = {1: 0, 2: 2}
    change = Sampler(writer(eos_at=ends), EOS, 0, share=1.0, prompt=prompt, new=new)
    made = change(inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in before)
    assert made.keys() == inputs.keys()
    wide = made["input_ids"].shape[1]
    for i in range(4):
        ids, labels = slow_row(inputs["input_ids"][i].tolist(), inputs["labels"][i].tolist(), prompt, new, ends.get(i))
        assert made["input_ids"][i].tolist() == ids[:wide]
        assert made["labels"][i].tolist() == labels[:wide]
        assert labels[wide:] == [-100] * (10 - wide)  # what was cut counted for nothing
    assert wide == min(10, prompt + (new or 99) - 1)


def test_rows_that_are_not_chosen_stay_and_the_choice_is_of_the_row_alone():
    share, seed = 0.5, 3
    change = Sampler(writer(), EOS, seed, share=share, prompt=3)
    inputs = batch(rows=64)
    made = change(inputs)
    replaced = (made["input_ids"] != inputs["input_ids"]).any(1)
    assert 16 < replaced.sum() < 48
    assert torch.equal(made["labels"][~replaced], inputs["labels"][~replaced])
    alone = [change({name: value[i : i + 1] for name, value in inputs.items()}) for i in range(64)]
    assert replaced.tolist() == [bool((one["labels"] == -100).any()) for one in alone]
    other = Sampler(writer(), EOS, seed + 1, share=share, prompt=3)(inputs)
    assert not torch.equal((other["input_ids"] != inputs["input_ids"]).any(1), replaced)
    for none, share in ((True, 0.0), (False, 1.0)):
        made = Sampler(writer(), EOS, seed, share=share, prompt=3)(inputs)
        assert (made is inputs) == none


def test_the_seed_follows_from_the_rows():
    seeds = []

    def write(start, new, temperature, seed):
        seeds.append(seed)
        return writer()(start, new, temperature, seed)

    change = Sampler(write, EOS, 0, share=1.0, prompt=3)
    for inputs in (batch(), batch(), batch(first=4)):
        change(inputs)
    Sampler(write, EOS, 1, share=1.0, prompt=3)(batch())
    assert seeds[0] == seeds[1] and len(set(seeds)) == 3
    one = Sampler(write, EOS, 0, share=1.0, prompt=3, single=True)
    assert torch.equal(one(batch())["input_ids"], change(batch())["input_ids"])
    assert len(set(seeds[4:8])) == 4  # row by row, each with a seed of its own


def test_samples_of_unequal_length_are_filled_row_by_row():
    def write(start, new, temperature, seed):
        return writer(length=2 + int(start[0, 0]) % 3)(start, new, temperature, seed)

    made = Sampler(write, EOS, 0, share=1.0, prompt=3, single=True)(batch())
    lengths = [2 + int(first) % 3 for first in batch()["input_ids"][:, 0]]
    assert made["input_ids"].shape[1] == 3 + max(lengths) - 1
    for row, length in zip(made["labels"].tolist(), lengths, strict=True):
        shown = [100 + i for i in range(length)] + ([EOS] if length < max(lengths) else [])
        assert row == [-100, -100, *shown, *[-100] * (len(row) - 2 - len(shown))]


def test_spoken_is_a_loop():
    tokens = torch.randint(0, 3, (50, 9))
    for row, said in zip(tokens.tolist(), spoken(tokens, 4, EOS).tolist(), strict=True):
        expected, over = [False] * 4, False
        for token in row[4:]:
            expected.append(not over)
            over = over or token == EOS
        assert said == expected


@pytest.fixture(scope="module")
def model():
    return tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1)


def test_finish_at_low_temperature_is_greedy_search_row_by_row(model):
    tokens = torch.randint(2, 320, (4, 12))
    known = torch.tensor([3, 12, 7, 5])
    model.train()
    made = finish(model, tokens, known, 1e-6, 0, EOS)
    assert model.training
    model.eval()
    for i in range(4):
        row = tokens[i, : known[i]]
        for _ in range(12 - known[i]):
            last = row[-1] if len(row) > known[i] else torch.tensor(-1)
            following = torch.tensor(EOS) if last == EOS else model(input_ids=row[None]).logits[0, -1].argmax()
            row = torch.cat([row, following[None]])
        assert torch.equal(made[i], row)


def test_finish_draws_from_the_model_and_from_the_seed_alone(model):
    start = torch.randint(2, 320, (1, 4))
    p = (model(input_ids=start).logits[0, -1] / 1.5).softmax(-1).detach()
    many = torch.cat([start, torch.zeros(1, 1, dtype=torch.long)], 1).repeat(4000, 1)
    state = torch.get_rng_state()
    made = finish(model, many, torch.full((4000,), 4), 1.5, 7, EOS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made, finish(model, many, torch.full((4000,), 4), 1.5, 7, EOS))
    assert not torch.equal(made, finish(model, many, torch.full((4000,), 4), 1.5, 8, EOS))
    share = made[:, 4].bincount(minlength=320) / 4000
    assert ((share - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


def test_finish_ends_a_text_that_ended(model):
    tokens = torch.randint(2, 320, (2, 8))
    tokens[0, 3] = EOS
    made = finish(model, tokens, torch.tensor([4, 4]), 1.0, 0, EOS)
    assert made[0, 3:].tolist() == [EOS] * 5
    assert torch.equal(made[:, :4], tokens[:, :4])


def test_finish_goes_through_the_cache_that_is_bound():
    model, tokens, known = tiny(), torch.randint(2, 320, (2, 40)), torch.tensor([20, 24])
    plain = finish(model, tokens, known, 1.0, 0, EOS)
    cls = registry.load("cache", "sink_window")
    for method, same in ((cls.unlimited(), True), (cls.example(), False)):
        with bind(model, cache=method):
            assert torch.equal(finish(model, tokens, known, 1.0, 0, EOS), plain) == same


def test_parameters_that_multiply():
    tied, untied = (tiny(hidden=16, heads=2, kv_heads=1, tie_word_embeddings=tie) for tie in (True, False))
    table = 320 * 16
    assert multiplied(tied) == sum(p.numel() for p in tied.parameters())
    assert multiplied(untied) == sum(p.numel() for p in untied.parameters()) - table


@pytest.fixture
def course(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    (np.arange(4000) % 300 + 2).astype(np.uint16).tofile(folder / "ids.bin")
    np.array([0, 4000]).tofile(folder / "starts.bin")
    (folder / "tokens.json").write_text(json.dumps({"tokens": 4000, "bytes": 4000, "documents": 1, "dtype": "uint16"}))
    student = Loaded(tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1), tiny_tokenizer(), tmp_path)
    return Course(student, (), Tokens(folder), Training(tokens=4 * 16 * 2, context=16, batch=4), tmp_path / "course")


@pytest.mark.parametrize("decode", [None, "prompt_lookup(tokens=3)"])
@pytest.mark.parametrize("cache", [None, "sink_window()"])
def test_samples_are_those_of_the_runtime(course, cache, decode):
    if cache and decode:
        return  # the window cannot give tokens back, which the runtime refuses
    method = GKD(
        prompt=5,
        cache=cache and registry.parse(cache, "cache"),
        decode=decode and registry.parse(decode, "decode"),
    )
    inputs = batch(rows=3, context=16)
    with sampling(course, method, 1.0) as (change, flops):
        made = change(inputs)
        again = change(inputs)
    assert torch.equal(made["input_ids"], again["input_ids"]) and torch.equal(made["labels"], again["labels"])
    assert torch.equal(made["input_ids"][:, :5], inputs["input_ids"][:, :5])
    assert (made["labels"][:, :4] == -100).all()
    assert flops == 2 * multiplied(course.student.model) * 1.0 * 2 * 4 * 17
    assert "generate" not in vars(course.student.model)


def test_what_cannot_be_sampled_is_refused(course):
    for settings, prompt, message in (
        ({"boundaries": "mask"}, 5, "leave out 'boundaries: mask'"),
        ({"shard": "fsdp2"}, 5, "leave out 'shard: fsdp2'"),
        ({}, 17, "prompt=17 leaves nothing to sample in rows of context=16"),
    ):
        course.settings = Training(tokens=128, context=16, batch=4, **settings)
        with pytest.raises(SmeltError, match=message):
            with sampling(course, GKD(prompt=prompt), 1.0):
                pass
    held = registry.parse("sink_window", "cache")
    for wrong in ({"objective": GKD()}, {"objective": "forward_kl()"}, {"objective": 3}):
        with pytest.raises(SmeltError, match="it trains by an objective"):
            GKD(**wrong)
    for wrong in ({"cache": "sink_window()"}, {"decode": held}):
        with pytest.raises(SmeltError, match="no method of the family"):
            GKD(**wrong)
    holds(dataclasses.replace(GKD(), cache=held), GKD().objective)
    with pytest.raises(SmeltError, match="not a method of smelt"):
        holds(SimpleNamespace(), GKD().objective)
