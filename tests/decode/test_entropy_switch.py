import copy
import itertools
import math
import random

import pytest
import torch

from smelt.data import Document
from smelt.decode._count import count
from smelt.decode._given import rows_of
from smelt.decode.entropy_switch import EntropySwitch, Switch, entropy, switched
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.registry import parse, text
from smelt.runtime import bind
from smelt.spec import SmeltError

FREE = {"eos_token_id": None, "bos_token_id": None}
TOKENIZER = tiny_tokenizer()
PROMPTS = [torch.randint(2, 320, (1, n), generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3, 5, 8, 13, 16, 17, 21, 24, 28, 30)]


class Texts:
    def documents(self, split):
        yield Document("a", "import os\nfor name in os.listdir('.'):\n    print(name)\n")
        yield Document("b", "class A:\n    pass\n")


class Puts:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.told = []

    def put(self, value):
        self.told += value.flatten().tolist()

    def end(self):
        self.told.append("end")


@pytest.fixture(scope="module")
def models():
    """(small, large): both of them sure in places, and not of the same."""
    small, large = tiny("llama", layers=1, seed=1, **FREE).double(), tiny("llama", seed=2, **FREE).double()
    with torch.no_grad():
        for model in (small, large):
            model.model.norm.weight *= 4.0
    return small, large


def write(model, ids, arguments, new=24, **more):
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new, **more}
    return model.generate(ids, **settings, **arguments)


def arguments(small, tau, window=5, least=10):
    return {"custom_generate": switched(small, lambda: Switch((tau, tau), window, least))}


@torch.no_grad()
def eager(models, ids, taus, window, least, new):
    """(text, large wrote it) with both models run on the whole text at each step, without caches."""
    said, entropies, who, active, since = ids[0].tolist(), [], [], 0, 0
    for _ in range(new):
        both = [model(torch.tensor([said])).logits[0, -1] for model in models]
        law = both[active].softmax(-1)
        said.append(int(law.argmax()))
        entropies.append((active, -sum(float(p) * math.log2(p) for p in law if p > 0)))
        who.append(active)
        since += 1
        own = [bits for by, bits in entropies[-since:][-window:] if by == active]
        wanted = int(sum(own) / len(own) > taus[active])
        if since >= least and wanted != active:
            active, since = wanted, 0
    return said, who


@pytest.mark.parametrize("tau, window, least", [(3.0, 5, 1), (2.0, 1, 1), (3.0, 3, 4), (2.5, 5, 2)])
def test_lazy_is_eager(models, tau, window, least):
    """Token by token; each model is called once for each of its own tokens and reads no position twice."""
    small, large = models
    switches = 0
    for ids in PROMPTS[::3]:
        wanted, who = eager(models, ids, (tau, tau), window, least, 24)
        with count(large) as big, count(small) as little:
            assert write(large, ids, arguments(small, tau, window, least))[0].tolist() == wanted
        assert (big.calls, little.calls) == (sum(who), 24 - sum(who))
        for seen, own in ((big, 1), (little, 0)):
            last = max((t for t, by in enumerate(who) if by == own), default=-ids.shape[1])
            assert seen.positions == ids.shape[1] + last
        switches += sum(a != b for a, b in itertools.pairwise(who))
    assert switches >= 4


def test_the_ends(models):
    """tau = inf is the small model's text; below 0 the large one writes from the second token on."""
    small, large = models
    for ids in PROMPTS:
        assert torch.equal(write(large, ids, arguments(small, math.inf, least=1)), write(small, ids, {}))
        first = write(small, ids, {}, 1)
        with count(large) as seen:
            made = write(large, ids, arguments(small, -1.0, least=1))
        assert torch.equal(made, write(large, first, {}, 23))
        assert seen.calls == 23


def test_no_two_switches_are_closer_than_least():
    draw = random.Random(0)
    for _ in range(200):
        least, window = draw.randint(1, 6), draw.randint(1, 6)
        switch, gaps, since = Switch((draw.random(), draw.random()), window, least), [], 0
        for _ in range(60):
            before = switch.large
            switch.wrote(draw.random())
            since += 1
            if switch.large != before:
                gaps.append(since)
                since = 0
        assert all(gap >= least for gap in gaps)
        assert gaps or least > 1 or window > 1


def test_the_large_model_writes_less_under_a_higher_tau(models):
    small, large = models
    shares = []
    for tau in (0.5, 2.0, 3.0, 4.0, 6.0):
        with count(large) as seen:
            for ids in PROMPTS:
                write(large, ids, arguments(small, tau, least=2))
        shares.append(seen.calls / (24 * len(PROMPTS)))
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.6 and shares[-1] < 0.2


def test_entropy_in_bits():
    assert entropy(torch.zeros(3, 8)).tolist() == pytest.approx([3.0] * 3)
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert float(entropy(p.log() + 7)) == pytest.approx(1.75)
    assert float(entropy(torch.tensor([0.0, -math.inf]))) == 0.0


@torch.no_grad()
def test_thresholds_from_quantiles(models, tmp_path):
    small, large = models
    save(small, TOKENIZER, tmp_path)
    method = EntropySwitch(str(tmp_path), quantile=0.6, window=3, data=Texts(), tokens=25)
    for model, tau in zip((small, large), method.measured(small, large, TOKENIZER), strict=True):
        means = []
        for ids in rows_of(Texts(), model, TOKENIZER, 25, "m"):
            bits = [float(entropy(row)) for row in model(ids).logits[0]]
            means += [sum(bits[i : i + 3]) / 3 for i in range(len(bits) - 2)]
        at = 0.6 * (len(means) - 1)
        low, high = sorted(means)[math.floor(at)], sorted(means)[math.ceil(at)]
        assert tau == pytest.approx(low + (high - low) * (at - math.floor(at)))
    made = method.arguments(large, TOKENIZER)
    taus = method.measured(small, large, TOKENIZER)
    ids = PROMPTS[4]
    assert write(large, ids, made)[0].tolist() == eager(models, ids, taus, 3, 10, 24)[0]


def test_a_batch_is_its_rows(models):
    small, large = models
    rows = [PROMPTS[i][0] for i in (1, 5, 8)]
    ids, mask = torch.zeros(3, 30, dtype=torch.long), torch.zeros(3, 30, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 30 - len(row) :], mask[i, 30 - len(row) :] = row, 1
    made = arguments(small, 3.0, least=2)
    ends = int(write(large, rows[1][None], made)[0, -9])
    out = write(large, ids, made, attention_mask=mask, eos_token_id=ends, pad_token_id=1)
    lengths = set()
    for i, row in enumerate(rows):
        alone = write(large, row[None], made, eos_token_id=ends, pad_token_id=1)[0, len(row) :].tolist()
        assert out[i, 30:].tolist() == alone + [1] * (out.shape[1] - 30 - len(alone))
        lengths.add(len(alone))
    assert len(lengths) > 1


def test_streams_scores_and_sampling(models):
    small, large = models
    ids, made, told = PROMPTS[3], arguments(small, 3.0, least=2), Puts()
    plain = write(large, ids, made)[0, 5:].tolist()
    out = write(large, ids, {**made, "follower": told}, return_dict_in_generate=True, output_scores=True)
    assert told.told == [*plain, "end"]
    assert torch.cat(out.scores).argmax(-1).tolist() == plain
    sampled = [write(large, ids, made, do_sample=True, top_k=k, temperature=5.0)[0, 5:].tolist() for k in (1, 50)]
    assert sampled[0] == plain != sampled[1]
    again = write(large, out.sequences, made, 3, past_key_values=out.past_key_values)
    assert again[0, : 5 + 24].tolist() == out.sequences[0].tolist() and again.shape[1] == 5 + 24 + 3


def test_bound_to_a_model(models, tmp_path):
    small, large = models
    save(copy.deepcopy(small).float(), TOKENIZER, tmp_path)
    ids, told = PROMPTS[6], Puts()
    wanted = write(large, ids, arguments(small, 3.0, least=2))
    with bind(large, decode=EntropySwitch(str(tmp_path), 3.0, least=2), tokenizer=TOKENIZER):
        assert torch.equal(write(large, ids, {}, streamer=told), wanted)
    assert told.told == [*wanted[0].tolist(), "end"]  # transformers itself shows it the prompt


def test_refusals_and_recipe_text(models, tmp_path):
    small, large = models
    for option, match in (
        ({"num_beams": 2}, "num_beams=1"),
        ({"use_cache": False}, "use_cache"),
        ({"output_logits": True}, "output_logits"),
    ):
        with pytest.raises(SmeltError, match=match):
            write(large, PROMPTS[3], arguments(small, 3.0), **option)
    save(tiny("llama", vocab=384), TOKENIZER, tmp_path)
    with pytest.raises(SmeltError, match="384 output tokens and the model has 320"):
        EntropySwitch(str(tmp_path), 1.0).arguments(large, TOKENIZER)
    with pytest.raises(SmeltError, match="another tokenizer"):
        EntropySwitch(str(tmp_path), 1.0).arguments(large, None)
    with pytest.raises(SmeltError, match="no such folder"):
        EntropySwitch("nowhere").arguments(large, TOKENIZER)
    with pytest.raises(SmeltError, match="is not a corpus"):
        EntropySwitch(data=3)
    assert text(parse("entropy_switch(threshold=2.0, small='a/b')", "decode")) == "entropy_switch(small='a/b', threshold=2.0)"
    for bad in ("entropy_switch(quantile=2.0)", "entropy_switch(window=0)", "entropy_switch(least=0)"):
        with pytest.raises(SmeltError):
            parse(bad, "decode")
