import pytest
import torch

from smelt.decode import _scorer
from smelt.decode._scorer import information, judged, likelihood, log_likelihoods, similarity
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError

MODEL, TOKENIZER = tiny("llama"), tiny_tokenizer()
PREFIX, SUFFIXES = [5, 6, 7, 8], [[9, 10, 11], [12], [13, 14], [9, 10, 11, 40, 41]]


def slow(prefix, suffix):
    """Token by token, each from a call of its own."""
    total = 0.0
    with torch.no_grad():
        for i, token in enumerate(suffix):
            total += float(MODEL(torch.tensor([prefix + suffix[:i]])).logits[0, -1].double().log_softmax(-1)[token])
    return total


def test_likelihoods_are_those_of_loops(monkeypatch):
    monkeypatch.setattr(_scorer, "ROWS", 3)
    found = log_likelihoods(MODEL, PREFIX, SUFFIXES)
    assert found.tolist() == pytest.approx([slow(PREFIX, s) for s in SUFFIXES], abs=1e-4)
    assert likelihood(MODEL)(PREFIX, SUFFIXES).tolist() == pytest.approx([slow(PREFIX, s) / len(s) for s in SUFFIXES], abs=1e-4)


def test_information_is_what_the_prefix_adds():
    found = information(MODEL, 0)(PREFIX, SUFFIXES)
    assert found.tolist() == pytest.approx([slow(PREFIX, s) - slow([0], s) for s in SUFFIXES], abs=1e-4)
    assert information(MODEL, 0)([0], SUFFIXES).tolist() == pytest.approx([0.0] * 4, abs=1e-5)  # a prefix that says nothing


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_similarity_is_the_cosine_of_mean_states(architecture):
    encoder = tiny(architecture, context=12)
    texts = ["import os\n", "class A:\n    pass\n    return x\nfor name in os.listdir('.'):\n    print(name)", "x"]
    prefix = TOKENIZER(texts[1], add_special_tokens=False)["input_ids"]
    suffixes = [TOKENIZER(one, add_special_tokens=False)["input_ids"] for one in texts]
    assert len(prefix) > 12 > len(suffixes[0])  # one is cut
    base = getattr(encoder, "base_model", encoder)

    def mean(ids):
        with torch.no_grad():
            return base(torch.tensor([ids])).last_hidden_state[0].double().mean(0)

    found = similarity(encoder, TOKENIZER, TOKENIZER)(prefix, suffixes)
    expected = [float(torch.cosine_similarity(mean(prefix[-12:]), mean(ids[:12]), dim=0)) for ids in suffixes]
    assert found.tolist() == pytest.approx(expected, abs=1e-5) and len({round(x, 4) for x in expected}) == 3


def test_a_judge_reads_texts_and_gives_one_number_for_each():
    ids = [TOKENIZER(t, add_special_tokens=False)["input_ids"] for t in ("class A:", "import os", "x")]
    seen = []
    score = judged(lambda prefix, texts: seen.append((prefix, texts)) or [len(t) for t in texts], TOKENIZER)
    assert score(ids[0], ids[1:]).tolist() == [9.0, 1.0]
    assert seen == [("class A:", ["import os", "x"])]
    with pytest.raises(SmeltError, match="1 scores for 2"):
        judged(lambda prefix, texts: [1.0], TOKENIZER)(ids[0], ids[1:])
