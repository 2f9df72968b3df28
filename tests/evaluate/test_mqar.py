from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from smelt import registry
from smelt.data.mqar import Mqar as Corpus
from smelt.evaluate import Variant
from smelt.evaluate.mqar import Mqar, spell
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.runtime import bind
from smelt.spec import SmeltError

SMALL = {"sequences": 6, "pairs": 4, "length": 32, "words": 30}


class Told(torch.nn.Module):
    """Knows the rows and predicts the next token, except that the last `missed` answers of every row come out wrong."""

    def __init__(self, tokenizer, probe, missed, first):
        super().__init__()
        self.device, self.rows = torch.device("cpu"), []
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4000))
        for words, places in islice(probe.corpus().sequences("test"), probe.sequences):
            ids, spans = spell(tokenizer, words)
            wrong = list(ids)
            for place in places[len(places) - missed :]:
                wrong[spans[place][0] if first else spans[place][1] - 1] = 0  # one token of the answer
            self.rows.append((ids, wrong))
        self.eval()

    def get_output_embeddings(self):
        return SimpleNamespace(weight=torch.zeros(320, 1))

    def forward(self, input_ids, use_cache, logits_to_keep):
        scores = torch.zeros(*input_ids.shape, 320)
        for given, out in zip(input_ids.tolist(), scores, strict=True):
            (said,) = [wrong for ids, wrong in self.rows if given[: len(ids) - 1] == ids[:-1]]
            for at, token in enumerate(said[1:]):
                out[at, token] = 1.0
        return SimpleNamespace(logits=scores)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("missed", [0, 1, 3])
def test_counts_the_answers_that_are_on_top(missed, first):
    probe, tokenizer = Mqar(**SMALL), tiny_tokenizer()
    (found,) = probe(Variant("v", Told(tokenizer, probe, missed, first), tokenizer))
    assert found.samples == (4.0 - missed,) * 6 and found.weights == (4.0,) * 6
    assert found.value == 1 - missed / 4


def test_a_random_model_knows_nothing():
    (found,) = Mqar(**SMALL)(Variant("v", tiny("llama"), tiny_tokenizer()))
    assert found.value < 0.1


def test_words_are_spelled_with_a_space_and_found_again():
    tokenizer = tiny_tokenizer()
    words = ["kaa", "vab", "xzz"]
    ids, spans = spell(tokenizer, words)
    assert ids[0] == tokenizer.bos_token_id
    assert [tokenizer.decode(ids[low:high]) for low, high in spans] == [" kaa", " vab", " xzz"]


def test_asks_what_a_model_trained_on_the_corpus_never_saw():
    probe = Mqar(**SMALL)
    trained = Corpus(pairs=4, length=32, words=30)
    asked = {" " + " ".join(words) + "\n" for words, _ in islice(probe.corpus().sequences("test"), 6)}
    assert asked <= {d.text for d in trained.documents("test")} and not asked & {d.text for d in trained.documents("train")}


def test_the_pairs_are_one_call_through_a_cache(variant):
    probe, seen = Mqar(sequences=3, pairs=3, length=16, words=20), []
    (plain,) = probe(variant)
    handle = variant.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    variant.cache = registry.load("cache", "sink_window").unlimited()
    with bind(variant.model, cache=variant.cache):
        assert probe(variant)[0].samples == plain.samples
    handle.remove()
    assert seen[0] > 6 and set(seen[1:]) == {1}


def test_what_does_not_fit_is_refused():
    with pytest.raises(SmeltError, match="slots"):
        Mqar(pairs=9, length=16)
    with pytest.raises(SmeltError, match="tokens of context"):
        Mqar()(Variant("v", tiny("llama", context=64), tiny_tokenizer()))
