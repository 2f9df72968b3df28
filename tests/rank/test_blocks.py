"""The helper smelt/rank/_blocks.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank._blocks import MARK, PAD, TAIL, Blocks, blocks, compose, mask, reach, read, stack
from smelt.rank._order import by_digest
from smelt.spec import SmeltError

RANDOM = torch.Generator().manual_seed(0)
REQUEST = f"Query: {MARK}\n\n{MARK}\nQuery: {MARK}\n"


def row(n):
    return torch.randint(2, 300, (n,), generator=RANDOM).tolist()


def questions():
    """Unequal in every respect."""
    return [
        blocks(row(7), [row(n) for n in (5, 9, 1, 4)], row(6)),
        blocks(row(3), [row(n) for n in (2, 11)], row(9), tail_at=100),
        blocks(row(12), [row(5) for _ in range(7)], row(1)),
        blocks(row(4), [], row(5)),
    ]


@torch.no_grad()
def dense(model, one):
    batch = stack([one])
    return model.base_model(batch.ids, attention_mask=mask(batch.segment), position_ids=batch.positions, use_cache=False).last_hidden_state[
        0
    ]


def test_the_layout_by_hand():
    one = blocks([10, 11], [[20, 21, 22], [30]], [40, 41])
    assert one.ids.tolist() == [10, 11, 20, 21, 22, 30, 40, 41]
    assert one.positions.tolist() == [0, 1, 2, 3, 4, 2, 5, 6]
    assert one.segment.tolist() == [0, 0, 1, 1, 1, 2, TAIL, TAIL]
    assert blocks([10, 11], [[20]], [40, 41], tail_at=64).positions.tolist() == [0, 1, 2, 64, 65]
    for wrong in (([], [[1]], [1]), ([1], [[1], []], [1]), ([1], [[1]], [])):
        with pytest.raises(SmeltError, match="at least one token"):
            blocks(*wrong)
    with pytest.raises(SmeltError, match="cannot begin at position 3: the longest part ends at 4"):
        blocks([1, 2], [[1, 2]], [1], tail_at=3)


def test_the_mask_is_that_of_the_loop():
    batch = stack(questions())
    found = mask(batch.segment, torch.float64)
    assert found.dtype == torch.float64 and found.shape == (4, 1, batch.ids.shape[1], batch.ids.shape[1])
    for b, segment in enumerate(batch.segment.tolist()):
        for i, mine in enumerate(segment):
            for j, other in enumerate(segment):
                allowed = j <= i and other != PAD and (mine == TAIL or other in (0, mine) or i == j)
                assert (found[b, 0, i, j].item() == 0) == (allowed or i == j)


def test_one_part_is_the_plain_causal_model():
    model, one = tiny("llama"), blocks(row(5), [row(8)], row(4))
    with torch.no_grad():
        plain = model.base_model(one.ids[None], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(dense(model, one), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma", "gemma2", "phi3"])
@pytest.mark.parametrize("tokens", [20, 60, 1 << 13])
def test_the_caches_give_what_the_dense_mask_gives(architecture, tokens):
    """Hidden states of every token, and the logits after the tail, for questions read together in calls of any size."""
    model = tiny(architecture, layers=3)
    loaded, asked, done = Loaded(model, tiny_tokenizer(), None), questions(), []
    for found in read(loaded, asked, tokens=tokens):
        for at, which in enumerate(found.which):
            expected, held = dense(model, asked[which]), found.segment[at] != PAD
            tail = int((asked[which].segment == TAIL).sum())
            torch.testing.assert_close(found.hidden[at][held], expected[:-tail], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.output.last_hidden_state[at, :tail], expected[-tail:], atol=1e-5, rtol=1e-5)
            assert found.segment[at][held].tolist() == asked[which].segment[:-tail].tolist()
            done.append(which)
    assert sorted(done) == [0, 1, 2, 3]
    for found in read(loaded, asked, logits=True, tokens=tokens):
        for at, which in enumerate(found.which):
            batch = stack([asked[which]])
            with torch.no_grad():
                logits = model(batch.ids, attention_mask=mask(batch.segment), position_ids=batch.positions).logits[0, -1]
            torch.testing.assert_close(found.output[at], logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_batch_of_the_dense_mask_is_each_alone(implementation):
    model, asked = tiny("llama"), questions()
    model.set_attn_implementation(implementation)
    batch = stack(asked)
    with torch.no_grad():
        found = model.base_model(batch.ids, attention_mask=mask(batch.segment), position_ids=batch.positions, use_cache=False)
    assert torch.isfinite(found.last_hidden_state).all()
    for at, one in enumerate(asked):
        torch.testing.assert_close(found.last_hidden_state[at, : len(one.ids)], dense(model, one), atol=1e-5, rtol=1e-5)


def test_the_tail_is_the_same_in_every_order_of_the_parts_and_needs_mask_and_positions_for_it():
    """All 24 orders of four parts. With one of the two edits alone the order shows."""
    model, parts, prefix, tail = tiny("llama"), [row(n) for n in (6, 3, 8, 5)], row(4), row(5)

    def moved(change):
        found = [dense(model, change(blocks(prefix, list(order), tail)))[-1] for order in itertools.permutations(parts)]
        return max(float((f - found[0]).abs().max()) for f in found)

    assert moved(lambda one: one) < 3e-6
    assert moved(lambda one: one._replace(positions=torch.arange(len(one.ids)))) > 1e-3
    assert moved(lambda one: one._replace(segment=torch.full_like(one.segment, TAIL))) > 1e-3


def test_another_passage_leaves_the_states_of_a_passage_alone_to_the_bit():
    loaded = Loaded(tiny("llama"), tiny_tokenizer(), None)
    parts, prefix, tail = [row(6) for _ in range(5)], row(4), row(5)
    before, after = (next(read(loaded, [blocks(prefix, [*parts[:2], p, *parts[3:]], tail)])) for p in (parts[2], row(6)))
    same, other = before.segment[0] != 3, before.segment[0] == 3
    assert torch.equal(before.hidden[0][same], after.hidden[0][same])
    assert not torch.allclose(before.hidden[0][other], after.hidden[0][other], atol=1e-3)
    assert not torch.allclose(before.output.last_hidden_state, after.output.last_hidden_state, atol=1e-3)


class Counting(torch.nn.Module):
    """Counts tokens and pairs of the calls it passes on."""

    def __init__(self, model):
        super().__init__()
        self.model, self.tokens, self.pairs = model, 0, 0
        self.device, self.dtype, self.config, self.base_model = model.device, model.dtype, model.config, self

    def forward(self, input_ids, attention_mask, **options):
        self.tokens += input_ids.numel()
        self.pairs += len(input_ids) * attention_mask.shape[-2] * attention_mask.shape[-1]
        return self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, **options)


def test_the_cost_is_linear_in_the_number_of_parts():
    prefix, tail, size = row(4), row(3), 6
    for n in (5, 20, 80):
        counting = Counting(tiny("llama"))
        list(read(Loaded(counting, None, None), [blocks(prefix, [row(size) for _ in range(n)], tail)]))
        assert counting.tokens == 4 + n * size + 3
        assert counting.pairs == 4 * 4 + n * size * (4 + size) + 3 * (4 + n * size + 3)


def test_texts_are_laid_out_and_cut_to_the_context():
    loaded = Loaded(tiny("llama", context=128), tiny_tokenizer(), None)
    words = tiny_tokenizer()
    one = compose(loaded, REQUEST, "return x", [("a ", "def f", "\n"), ("b ", "import", "\n")], "best:", length=50)
    assert words.decode(one.ids[one.segment == 0]) == "Query: return x\n\n"
    assert words.decode(one.ids[one.segment == 1]) == "a def f\n" and words.decode(one.ids[one.segment == 2]) == "b import\n"
    assert words.decode(one.ids[one.segment == TAIL]) == "\nQuery: return x\n\nbest:"
    long = [("", "zq " * 900, "\n")] * 3
    for tail_at in (None, 64):
        found = compose(loaded, REQUEST, "vw " * 500, long, "best:", length=1000, tail_at=tail_at)
        assert found.positions.max() < 128 and (found.segment == 1).sum() > 10
        assert (found.positions[found.segment == TAIL][0] == 64) == (tail_at is not None)
    small = compose(loaded, REQUEST, "vw " * 500, long, "best:", length=1000, total=100)
    assert 60 < len(small.ids) <= 100
    assert (compose(loaded, REQUEST, "q", long, "best:", length=7).segment == 2).sum() == 7 + len(words("\n")["input_ids"])
    for tail_at in (None, 64):
        with pytest.raises(SmeltError, match=r"1 passages and the query find no room: .* takes 3\d\d of the 128 .* take a smaller window"):
            compose(loaded, REQUEST, "q", [("", "x", "")], "best " * 60, length=5, tail_at=tail_at)
        with pytest.raises(SmeltError, match=r"takes \d{3} of the 128 positions"):
            compose(loaded, REQUEST, "q", [("wordy " * 100, "x", "")], "best:", length=5, tail_at=tail_at)


def test_a_chat_template_stands_around_the_whole_and_a_sliding_window_is_no_room():
    tokenizer = tiny_tokenizer(vocab=319)  # of its own: the shared one is cached
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}ANSWER {% endif %}"
    one = compose(Loaded(tiny("llama"), tokenizer, None), REQUEST, "q", [("", "x", "")], "best:", length=5)
    assert tokenizer.decode(one.ids[one.segment == 0]) == "<Query: q\n\n"
    assert tokenizer.decode(one.ids[one.segment == TAIL]) == "\nQuery: q\n>ANSWER best:"
    assert reach(Loaded(tiny("mistral", context=256, sliding_window=40), None, None)) == 40
    assert isinstance(one, Blocks) and reach(Loaded(tiny("llama", context=77), None, None)) == 77


def test_the_order_by_digest_follows_the_texts():
    texts = [f"text {i}" for i in range(8)]
    found = [texts[i] for i in by_digest("q", texts)]
    assert sorted(found) == texts and found != texts
    assert [texts[::-1][i] for i in by_digest("q", texts[::-1])] == found
    assert [texts[i] for i in by_digest("other", texts)] != found
    turns = {tuple(by_digest("q", texts, turn)) for turn in range(20)}
    assert len(turns) > 10 and by_digest("q", texts, 0) == by_digest("q", texts)
    assert by_digest("q", ["\ud800", "\ud800"]) == [0, 1]
