from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from smelt import registry
from smelt.evaluate import Variant
from smelt.evaluate.needle import Needle, _place
from smelt.model._tiny import tiny
from smelt.runtime import bind
from smelt.spec import SmeltError


class Copier(torch.nn.Module):
    """Goes on as the text did after the longest earlier copy of what it ends with, within `reach` tokens."""

    def __init__(self, reach: int = 10_000, context: int = 4096):
        super().__init__()
        self.reach, self.device = reach, torch.device("cpu")
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=context))
        self.eval()

    def get_output_embeddings(self):
        return SimpleNamespace(weight=torch.zeros(320, 1))

    def forward(self, input_ids, use_cache, logits_to_keep):
        size = input_ids.shape[1]
        scores = torch.zeros(len(input_ids), logits_to_keep, 320)
        for row, out in zip(input_ids.tolist(), scores, strict=True):
            for place, end in enumerate(range(size - logits_to_keep, size)):
                best, token = 0, 0
                for at in range(max(1, end - self.reach), end):
                    same = 0
                    while same < 20 and same <= at and row[at - same] == row[end - same]:
                        same += 1
                    if same > best:
                        best, token = same, row[at + 1]
                out[place, token] = 20.0
        return SimpleNamespace(logits=scores)


def named(metrics):
    return {m.name: m for m in metrics}


@pytest.mark.parametrize("text", ["code", "text"])
@pytest.mark.parametrize("by", ["choice", "exact"])
def test_a_model_that_copies_finds_everything_and_one_that_forgets_finds_what_is_near(tokenizer, by, text):
    probe = Needle(lengths=(260, 300), depths=(0.0, 1.0), questions=3, choices=3, by=by, text=text)
    found = named(probe(Variant("v", Copier(), tokenizer)))
    assert {name: m.value for name, m in found.items() if name != "needle_bits"} == {
        "needle_recall": 1.0, "needle_260_0": 1.0, "needle_260_100": 1.0, "needle_300_0": 1.0, "needle_300_100": 1.0
    }  # fmt: skip
    assert found["needle_bits"].value < 0.001 and len(found["needle_bits"].samples) == 12
    near = named(
        Needle(lengths=(300,), depths=(0.0, 1.0), questions=3, choices=2, by="exact", text=text)(Variant("v", Copier(110), tokenizer))
    )
    assert near["needle_300_0"].value == 0.0 and near["needle_300_100"].value == 1.0


def test_a_random_model_is_near_chance(tokenizer):
    probe = Needle(lengths=(150,), depths=(0.2, 0.8), questions=40, choices=2)
    found = named(probe(Variant("v", tiny("llama"), tokenizer)))
    assert abs(found["needle_recall"].value - 0.5) < 4 * 0.5 / 80**0.5
    assert (
        named(Needle(lengths=(150,), depths=(0.5,), questions=8, choices=2, by="exact")(Variant("v", tiny("llama"), tokenizer)))[
            "needle_recall"
        ].value
        < 0.2
    )


@pytest.mark.parametrize("text", ["code", "text"])
def test_a_text_has_its_length_and_the_needle_at_its_depth(tokenizer, text):
    probe = Needle(questions=4, choices=3, text=text)
    for length in (260, 500):
        for depth in (0.0, 0.3, 1.0):
            for one in probe.asked(tokenizer, length, depth):
                assert len(one.row) == length + one.answer
                assert len(set(one.options)) == 3 and one.row[-one.answer :][one.lead] == one.options[0]
                value, question = one.row[-one.answer :], one.row[-one.answer - one.question : -one.answer]
                whole = [i for i in range(length - one.question) if one.row[i : i + one.question + one.answer] == question + value]
                assert len(whole) == 1, "the pair stands in the text once"
                assert abs(whole[0] / (length - one.question) - depth) < 60 / length
    assert [o.row for o in probe.asked(tokenizer, 260, 0.3)] == [o.row for o in probe.asked(tokenizer, 260, 0.3)]
    assert [o.row for o in probe.asked(tokenizer, 260, 0.3)] != [o.row for o in Needle(questions=4, seed=1).asked(tokenizer, 260, 0.3)]


def test_the_place_is_the_line_end_nearest_to_the_depth():
    lines = [[0] * 3, [0] * 10, [0] * 3]
    assert [_place(lines, depth) for depth in (0.0, 0.15, 0.5, 0.7, 1.0)] == [0, 1, 1, 2, 3]


def test_bits_are_those_of_the_value_and_the_question_goes_token_by_token_through_a_cache(variant):
    probe, seen = Needle(lengths=(200,), depths=(0.5,), questions=2, choices=2), []
    plain = named(probe(variant))
    for one, bits in zip(probe.asked(variant.tokenizer, 200, 0.5), plain["needle_bits"].samples, strict=True):
        with torch.no_grad():
            log = variant.model(torch.tensor([one.row])).logits[0].log_softmax(-1)
        at = range(len(one.row) - one.answer, len(one.row))
        assert bits == pytest.approx(-sum(float(log[i - 1, one.row[i]]) for i in at) / torch.tensor(2.0).log().item(), rel=1e-4)
    handle = variant.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    variant.cache = registry.load("cache", "sink_window").unlimited()
    with bind(variant.model, cache=variant.cache):
        assert named(probe(variant))["needle_bits"].value == pytest.approx(plain["needle_bits"].value, rel=1e-4)
    handle.remove()
    assert seen[0] > 180 and set(seen[1:]) == {1}
    variant.cache = registry.load("cache", "sink_window")(window=40)
    with bind(variant.model, cache=variant.cache):
        assert named(probe(variant))["needle_bits"].value != pytest.approx(plain["needle_bits"].value, rel=1e-3)


def test_what_cannot_be_asked_is_refused(tokenizer):
    small = Variant("v", tiny("llama", context=128), tokenizer)
    with pytest.raises(SmeltError, match="beyond=True"):
        Needle(lengths=(300,))(small)
    assert Needle(lengths=(300,), depths=(0.5,), questions=1, beyond=True)(small)
    with pytest.raises(SmeltError, match="too short"):
        Needle(lengths=(40,))(small)
    for wrong in ({"depths": (1.5,)}, {"lengths": ()}, {"lengths": (9, 9)}):
        with pytest.raises(SmeltError, match="needle: lengths"):
            Needle(**wrong)
