"""Order-free prompts: every order of the members gives the same logits, on models of several architectures, in calls and in generate."""

from __future__ import annotations

import copy
import gc
import itertools
import random

import pytest
import torch
from transformers import DynamicCache

import smelt
from smelt.attention.set_based import SetBased
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import attention_of, blocks
from smelt.registry import parse, text
from smelt.runtime import bind
from smelt.spec import SmeltError

NO_ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
TOKENIZER = tiny_tokenizer()
MEMBERS = ["return x + 1", "import os", "for name in os", "print(name) and pass"]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}  # float32: another order of the same sums


def model(architecture="llama", **more):
    return tiny(architecture, **NO_ENDS, **more)


def ids(*texts):
    rows = [TOKENIZER(t, add_special_tokens=False)["input_ids"] for t in texts]
    assert len({len(row) for row in rows}) == 1
    return torch.tensor(rows)


def prompt(members, before="def f(x):", after=" class A:"):
    return f"{before} <set> {' <or> '.join(members)} </set>{after}"


def logits(some, tokens, **more):
    with torch.no_grad():
        return some(tokens, **more).logits


def bound(some, **more):
    return bind(some, attention="set_based()", tokenizer=TOKENIZER, **more)


def orders(members):
    return ids(*(prompt(order) for order in itertools.permutations(members)))


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"])
def test_all_orders_of_four_give_the_same_logits(architecture, kind):
    some, rows = model(architecture), orders(MEMBERS)
    some.set_attn_implementation(kind)
    tail = len(ids(" class A:")[0])
    plain = logits(some, rows)[:, -tail:]
    with bound(some):
        found = logits(some, rows)[:, -tail:]
    torch.testing.assert_close(found, found[:1].expand_as(found), **TOLERANCE)
    assert (plain - plain[:1]).abs().max() > 1e-2 and torch.equal(logits(some, rows)[:, -tail:], plain)
    assert (found[0] - plain[0]).abs().max() > 1e-2


def test_mask_and_positions_are_both_needed():
    """The hook's mask with plain positions, and its positions with a plain mask, both move with the order."""
    some, rows, given = model(), orders(MEMBERS)[:6], {}
    handle = some.base_model.register_forward_pre_hook(lambda m, a, k: given.update(k), with_kwargs=True)
    with bound(some):
        logits(some, rows)
    handle.remove()
    for one in (
        {"attention_mask": given["attention_mask"]},
        {"position_ids": given["position_ids"], "attention_mask": torch.ones_like(rows)},
    ):
        last = logits(some, rows, **one)[:, -1]
        assert (last - last[:1]).abs().max() > 1e-3
    last = logits(some, rows, attention_mask=given["attention_mask"], position_ids=given["position_ids"])[:, -1]
    torch.testing.assert_close(last, last[:1].expand_as(last), **TOLERANCE)


def test_twenty_shuffles_of_ten_and_what_they_write():
    members, rng, texts = [f"x{i} in name" + " pass" * (i % 4) for i in range(10)], random.Random(0), []
    for _ in range(20):
        rng.shuffle(members)
        texts.append(prompt(members, "import os", " print"))
    rows, some = ids(*texts), model()
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    plain = some.generate(rows, **settings)[:, rows.shape[1] :]
    with bound(some):
        last = logits(some, rows)[:, -1]
        written = some.generate(rows, **settings)[:, rows.shape[1] :]
        beams = some.generate(rows[:4], num_beams=3, **settings)[:, rows.shape[1] :]
    torch.testing.assert_close(last, last[:1].expand_as(last), **TOLERANCE)
    assert torch.equal(written, written[:1].expand_as(written)) and torch.equal(beams, beams[:1].expand_as(beams))
    assert not torch.equal(plain, plain[:1].expand_as(plain))


def test_several_sets_are_each_free_of_order():
    some, rows = model(), []
    for first in itertools.permutations(MEMBERS[:3]):
        for second in itertools.permutations(["pass", "x + x", "return"]):
            rows.append(prompt(first) + prompt(second, " import", " def"))
    rows = ids(*rows)
    with bound(some):
        found = logits(some, rows)
    tail = len(ids(" def")[0])
    torch.testing.assert_close(found[:, -tail:], found[:1, -tail:].expand_as(found[:, -tail:]), **TOLERANCE)
    start = len(ids("def f(x):")[0])
    assert torch.equal(found[:, :start], found[:1, :start].expand(len(rows), -1, -1))


def test_it_equals_members_read_by_themselves():
    """No markers at all: prefix and each member in a row of its own, their keys and values joined, the tail over all of them."""
    some = model()
    before, after, members = ids("def f(x):")[0], ids(" class A:")[0], [ids(" " + m)[0] for m in MEMBERS]
    joined = DynamicCache()
    with torch.no_grad():
        for at, member in enumerate(members):
            past = some(torch.cat([before, member])[None], use_cache=True).past_key_values
            for index, layer in enumerate(past.layers):
                first = len(before) if at else 0
                joined.update(layer.keys[:, :, first:], layer.values[:, :, first:], index)
        start = len(before) + max(map(len, members))
        wanted = some(after[None], past_key_values=joined, position_ids=torch.arange(len(after))[None] + start).logits
    with bound(some):
        found = logits(some, ids(prompt(MEMBERS)))[:, -len(after) :]
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_text_without_markers_is_untouched():
    some, rows = model(), torch.randint(5, 300, (2, 30))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    plain, written = logits(some, rows), some.generate(rows, **settings)
    with bound(some):
        assert torch.equal(logits(some, rows), plain) and torch.equal(some.generate(rows, **settings), written)
        logits(some, rows, attention_mask=torch.zeros(2, 1, 30, 30))  # not ours to judge
        logits(some, rows[:, :5], past_key_values=some(rows, use_cache=True).past_key_values)
    assert not some.base_model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_padding_and_company_count_for_nothing(kind):
    some = model()
    some.set_attn_implementation(kind)
    long, short = ids(prompt(MEMBERS))[0], ids("for name in os: pass")[0]
    other = ids(prompt(MEMBERS[:2], "x"))[0]
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 1}
    with bound(some):
        alone = [some.generate(row[None], **settings)[0, len(row) :] for row in (long, short, other)]
        rows, mask = torch.full((3, len(long) + 5), 7), torch.zeros(3, len(long) + 5, dtype=torch.long)
        for at, row in enumerate((long, short, other)):
            rows[at, -len(row) :], mask[at, -len(row) :] = row, 1
        last = logits(some, rows, attention_mask=mask)
        for at, row in enumerate((long, short, other)):
            torch.testing.assert_close(last[at, -1], logits(some, row[None])[0, -1], **TOLERANCE)
        assert torch.equal(some.generate(rows, attention_mask=mask, **settings)[:, rows.shape[1] :], torch.stack(alone))
    assert torch.isfinite(last).all()


def test_steps_through_a_cache_equal_full_recomputation_with_a_tail_of_text():
    some, first, more = model(), ids(prompt(MEMBERS)), ids(" import os for name in os print")
    with bound(some), torch.no_grad():
        whole = logits(some, torch.cat([first, more], 1))[:, first.shape[1] :]
        out = some(first, use_cache=True)
        past, pieces = out.past_key_values, []
        copied = copy.deepcopy(past)
        for start, stop in [(0, 1), (1, 2), (2, 6), (6, more.shape[1])]:
            pieces.append(some(more[:, start:stop], past_key_values=past).logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, **TOLERANCE)
        torch.testing.assert_close(some(more, past_key_values=copied).logits, whole, **TOLERANCE)
        past.crop(-4)  # what speculative decoding does
        torch.testing.assert_close(some(more[:, -4:], past_key_values=past).logits, whole[:, -4:], **TOLERANCE)
        past.reset()
        torch.testing.assert_close(some(first, past_key_values=past).logits, logits(some, first), **TOLERANCE)


def test_it_works_with_caches_and_decoding_that_keep_every_token():
    some, rows = model(), orders(MEMBERS)[:3]
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 1}
    with bound(some):
        plain = some.generate(rows, **settings)
        first = some.generate(rows[:1], **settings)
    with bound(some, decode="prompt_lookup()"):
        assert torch.equal(some.generate(rows[:1], **settings), first)
    with bound(some, cache="sink_window(sinks=4, window=1000)"):
        assert torch.equal(some.generate(rows, **settings), plain)
    with bound(some, cache="sink_window(sinks=4, window=20)"), pytest.raises(SmeltError, match="drops tokens"):
        some.generate(rows, **settings)


def test_gradients_are_those_of_the_mask_and_the_model_is_restored():
    some, rows = model(), ids(prompt(MEMBERS))
    some.train()
    with bound(some):
        some(rows, labels=rows).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in some.parameters())


def test_loading_binds_for_good(tmp_path):
    some = model()
    save(some, TOKENIZER, tmp_path)
    loaded = smelt.load(tmp_path, attention="set_based()").model
    gc.collect()
    rows = orders(MEMBERS)
    last = logits(loaded, rows)[:, -1]
    torch.testing.assert_close(last, last[:1].expand_as(last), **TOLERANCE)


def test_markers_of_another_kind():
    some, method = model(), SetBased(open="\n\n[", split="\n[", close="\n\nimport")
    texts = [
        "def f" + "".join(("\n\n[" if at == 0 else "\n[") + m for at, m in enumerate(o)) + "\n\nimport os" for o in (MEMBERS, MEMBERS[::-1])
    ]
    with bind(some, attention=method, tokenizer=TOKENIZER):
        one, two = logits(some, ids(*texts))[:, -1]
    torch.testing.assert_close(one, two, **TOLERANCE)
    assert text(parse("set_based(open='{', split=';', close='}')", "attention")) == "set_based(open='{', split=';', close='}')"


def test_what_would_come_out_wrong_is_refused_by_name():
    some, rows = model(), ids(prompt(MEMBERS))
    with pytest.raises(SmeltError, match="tokenizer=tokenizer"), bind(some, attention="set_based()"):
        pass
    with pytest.raises(SmeltError, match="window"), bound(tiny("gemma2")):
        pass
    with pytest.raises(SmeltError, match="for decoders"), bound(tiny("bert")):
        pass
    with pytest.raises(SmeltError, match="three different texts"):
        SetBased(open="<or>")
    with pytest.raises(SmeltError, match="three different texts"):
        SetBased(split=" ")
    with bound(some), torch.no_grad():
        with pytest.raises(SmeltError, match="never closed"):
            some(ids("x <set> import os"))
        with pytest.raises(SmeltError, match="given embeddings"):
            some(inputs_embeds=some.get_input_embeddings()(rows))
        with pytest.raises(SmeltError, match="makes the mask itself"):
            some(rows, attention_mask=torch.zeros(1, 1, rows.shape[1], rows.shape[1]))
        with pytest.raises(SmeltError, match="later call"):
            some(rows, past_key_values=some(ids("import os"), use_cache=True).past_key_values)
        past = some(rows, use_cache=True).past_key_values
        with pytest.raises(SmeltError, match="other rows"):
            some(ids("import", "import"), past_key_values=past)
        past.crop(-20)
        with pytest.raises(SmeltError, match="cut inside the prompt"):
            some(ids("import"), past_key_values=past)
    assert attention_of(blocks(some)[0]).config._attn_implementation == "sdpa"
