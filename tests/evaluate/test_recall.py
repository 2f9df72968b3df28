from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from smelt import registry
from smelt.evaluate import Variant
from smelt.evaluate.recall import Recall
from smelt.model._tiny import tiny
from smelt.runtime import bind
from smelt.spec import SmeltError


class Rememberer(torch.nn.Module):
    """Predicts what followed the last occurrence of the current token, among the last `reach` tokens; else token 0."""

    def __init__(self, reach: int):
        super().__init__()
        self.reach, self.device = reach, torch.device("cpu")
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=1000))
        self.eval()

    def get_output_embeddings(self):
        return SimpleNamespace(weight=torch.zeros(320, 1))

    def forward(self, input_ids, use_cache, logits_to_keep):
        scores = torch.zeros(*input_ids.shape, 320)
        for row, out in zip(input_ids.tolist(), scores):
            for at, token in enumerate(row):
                earlier = [i for i in range(max(0, at - self.reach), at) if row[i] == token]
                out[at, row[earlier[-1] + 1] if earlier else 0] = 1.0
        return SimpleNamespace(logits=scores[:, -logits_to_keep:])


def test_sequences_are_pairs_and_then_queries_of_them(tokenizer):
    probe = Recall(sequences=5, pairs=9, queries=4, seed=3)
    rows = probe.rows(tokenizer)
    assert len(rows) == 5 and len({tuple(r) for r in rows}) == 5
    for row in rows:
        start, shown, asked = row[0], row[1:19], row[19:]
        assert start == tokenizer.bos_token_id and len(asked) == 8
        pairs = dict(zip(shown[::2], shown[1::2]))
        assert len(set(shown)) == 18 and not set(shown) & set(tokenizer.all_special_ids)
        assert len(set(asked[::2])) == 4
        assert [pairs[k] for k in asked[::2]] == asked[1::2]
    assert rows == probe.rows(tokenizer) != Recall(sequences=5, pairs=9, queries=4, seed=4).rows(tokenizer)


def test_words_are_taken_where_there_are_enough():
    vocabulary = ["<s>", " abc", " defg", "x", " hi", "  ", " quux", "(", " what"]

    class Words:
        all_special_ids, bos_token_id, eos_token_id = (0,), 0, 0

        def __len__(self):
            return len(vocabulary)

        def decode(self, ids):
            return vocabulary[ids[0]]

    tokenizer = Words()
    words = {vocabulary.index(w) for w in (" abc", " defg", " quux", " what")}
    assert set(Recall(sequences=1, pairs=2, queries=2).rows(tokenizer)[0][1:]) == words
    assert len(set(Recall(sequences=1, pairs=3, queries=3).rows(tokenizer)[0][1:])) == 6
    with pytest.raises(SmeltError, match="10 different tokens"):
        Recall(sequences=1, pairs=5, queries=1).rows(tokenizer)


@pytest.mark.parametrize("reach", [1000, 14, 1])
def test_counts_the_queries_a_memory_of_some_reach_can_answer(tokenizer, reach):
    probe = Recall(sequences=6, pairs=8, queries=4, among="vocabulary")
    (found,) = probe(Variant("v", Rememberer(reach), tokenizer))
    right = []
    for row in probe.rows(tokenizer):
        asked = range(17, len(row), 2)
        right.append(sum(at - row.index(row[at]) <= reach for at in asked))
    assert list(found.samples) == right and set(found.weights) == {4.0}
    assert found.value == sum(right) / 24
    assert {1000: found.value == 1.0, 14: 0.0 < found.value < 1.0, 1: found.value == 0.0}[reach]


def test_the_answer_competes_with_the_values_shown_or_with_all_tokens(variant):
    for among in ("values", "vocabulary"):
        probe = Recall(sequences=8, pairs=5, queries=5, among=among)
        (found,) = probe(variant)
        right = []
        for row in probe.rows(variant.tokenizer):
            options, hits = row[2:11:2] if among == "values" else range(320), 0
            for at in range(11, len(row), 2):
                scores = variant.model(input_ids=torch.tensor([row[: at + 1]])).logits[0, -1].tolist()
                hits += max(options, key=lambda token: scores[token]) == row[at + 1]
            right.append(hits)
        assert list(found.samples) == right
        assert found.value > 0 or among == "vocabulary"


def test_reads_through_the_bound_cache(variant, measured):
    probe, seen = Recall(sequences=3, pairs=8, queries=4), []
    (plain,) = probe(variant)
    methods = [measured(registry.load("cache", name).unlimited()) for name in registry.names("cache")]
    handle = variant.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    for variant.cache in methods:
        seen.clear()
        with bind(variant.model, cache=variant.cache):
            assert probe(variant)[0].samples == plain.samples
        assert seen == [17] + [1] * 7
    handle.remove()


def test_what_cannot_be_asked_is_refused(tokenizer):
    with pytest.raises(SmeltError, match="queries=9"):
        Recall(pairs=8, queries=9)
    with pytest.raises(SmeltError, match="tokens of context"):
        Recall(pairs=60, queries=8)(Variant("v", tiny("llama", context=64), tokenizer))
