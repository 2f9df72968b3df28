import math

import pytest
import torch

from smelt.data import Document
from smelt.decode import knn_lm
from smelt.decode._datastore import Datastore, keys_of
from smelt.decode.knn_lm import KNNLM
from smelt.decode.prompt_lookup import PromptLookup
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.registry import check, parse, text
from smelt.runtime import bind
from smelt.spec import SmeltError

MODEL = tiny("llama", eos_token_id=None, bos_token_id=None)
TOKENIZER = tiny_tokenizer()
VOCAB = MODEL.config.vocab_size
TEXT = "def f(x):\n    return x + 1\nclass A:\n    pass\nimport os\nfor name in os.listdir('.'):\n    print(name)\n"
IDS = [TOKENIZER.bos_token_id, *TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]]


class Texts:
    """A corpus of given texts; only the train split has any."""

    def __init__(self, *texts: str):
        self.texts, self.read = texts, 0

    def documents(self, split):
        assert split == "train"
        self.read += 1
        yield from (Document(str(i), t) for i, t in enumerate(self.texts))

    def digest(self):
        return str(hash(self.texts))


@pytest.fixture(autouse=True)
def forgotten():
    knn_lm._last.clear()
    yield
    knn_lm._last.clear()


def logits_of(ids, method=None, **more):
    with torch.no_grad():
        if method is None:
            return MODEL(torch.tensor([ids]), **more).logits[0]
        with bind(MODEL, decode=method, tokenizer=TOKENIZER):
            return MODEL(torch.tensor([ids]), **more).logits[0]


def slow(plain, states, store, method):
    """p by loops over positions and stored keys, in float64."""
    rows = []
    for logit, query in zip(plain.double(), states.double()):
        law = logit.softmax(-1)
        pairs = sorted((float(((key.double() - query) ** 2).sum()), int(v)) for key, v in zip(store.keys, store.values))[: method.k]
        scale = method.temperature or sum(d for d, _ in pairs) / len(pairs) / 8
        shares = [math.exp(-(d - pairs[0][0]) / scale) for d, _ in pairs]
        mixed = (1 - method.weight) * law
        for share, (_, token) in zip(shares, pairs):
            mixed[token] += method.weight * share / sum(shares)
        rows.append(mixed)
    return torch.stack(rows)


@pytest.mark.parametrize("settings", [{"k": 5}, {"k": 5, "temperature": 3.0}, {"k": 1000, "weight": 0.9}, {"k": 9, "weight": 1.0}])
def test_the_mixture_is_that_of_loops(settings, monkeypatch):
    monkeypatch.setattr(knn_lm, "POSITIONS", 7)
    method = KNNLM(data=Texts(TEXT, TEXT[30:]), **settings)  # the second text stores many tokens twice: they add up
    store = method.built(MODEL, TOKENIZER)
    ids = IDS[4:30]
    found = logits_of(ids, method)
    expected = slow(logits_of(ids), keys_of(MODEL, ids), store, method)
    assert torch.allclose(found.exp().double(), expected, atol=1e-5)
    assert torch.allclose(found.exp().sum(-1), torch.ones(len(ids)), atol=1e-5)


def test_equal_tokens_add_up():
    store = Datastore(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([4, 5, 4]))
    law = KNNLM(temperature=1.0).law(*store.nearest(torch.tensor([[0.0]]), 3), 8)[0]
    parts = [1.0, math.exp(-1), math.exp(-4)]
    assert law.tolist() == pytest.approx([0, 0, 0, 0, (parts[0] + parts[2]) / sum(parts), parts[1] / sum(parts), 0, 0])


@pytest.mark.parametrize("temperature", [0.0, 1e-20])
def test_law_is_finite_at_every_temperature(temperature):
    distances = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 1e30], [7.0, 7.0, 7.0]])
    law = KNNLM(temperature=temperature).law(distances, torch.tensor([[1, 2, 3]] * 3), 5)
    assert torch.isfinite(law).all() and torch.allclose(law.sum(-1), torch.ones(3))
    assert torch.allclose(law[0], torch.tensor([0, 1, 1, 1, 0]) / 3)


def test_weight_zero_is_the_plain_model_bit_for_bit_and_builds_nothing():
    corpus = Texts(TEXT)
    assert torch.equal(logits_of(IDS, KNNLM(data=corpus, weight=0.0)), logits_of(IDS)) and not corpus.read


def test_a_stored_text_says_itself():
    method = KNNLM(data=Texts(TEXT), weight=1.0, k=1, temperature=1e-6)
    store = method.built(MODEL, TOKENIZER)
    assert len(torch.unique(store.keys, dim=0)) == len(store) == len(IDS) - 1  # or a key would not say which token follows
    assert logits_of(IDS, method)[:-1].argmax(-1).tolist() == IDS[1:]
    assert logits_of(IDS)[:-1].argmax(-1).tolist() != IDS[1:]
    with bind(MODEL, decode=method, tokenizer=TOKENIZER):
        start = torch.tensor([IDS[:10]])
        out = MODEL.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=len(IDS) - 10)
    assert out[0].tolist() == IDS


@pytest.mark.parametrize("keep", [1, 3, 0, torch.tensor([2, 0, 11])])
def test_only_the_positions_asked_for(keep):
    method = KNNLM(data=Texts(TEXT), k=4)
    full, part = logits_of(IDS[:12], method), logits_of(IDS[:12], method, logits_to_keep=keep)
    rows = keep if isinstance(keep, torch.Tensor) else slice(-keep if keep else None, None)
    assert torch.allclose(part, full[rows], atol=1e-5)


def test_a_text_is_the_same_alone_and_in_company():
    method = KNNLM(data=Texts(TEXT), k=6, weight=0.5)
    rows = [IDS[:8], IDS[20:28]]
    with torch.no_grad(), bind(MODEL, decode=method, tokenizer=TOKENIZER):
        together = MODEL(torch.tensor(rows)).logits
    for row, found in zip(rows, together):
        assert torch.allclose(found, logits_of(row, method), atol=1e-4)


def test_drafts_are_verified_by_the_mixture():
    method = KNNLM(data=Texts(TEXT), k=4, weight=0.6)
    ids = torch.tensor([IDS[:20] + IDS[:12]])
    more = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 30}
    plain = MODEL.generate(ids, **more)
    with bind(MODEL, decode=method, tokenizer=TOKENIZER):
        mixed = MODEL.generate(ids, **more)
        with bind(MODEL, decode=PromptLookup(), tokenizer=TOKENIZER):
            assert MODEL.generate(ids, **more).tolist() == mixed.tolist() != plain.tolist()


def test_kept_in_the_process_and_on_the_disk(tmp_path, monkeypatch):
    corpus, calls = Texts(TEXT), []
    collect = knn_lm.collect
    monkeypatch.setattr(knn_lm, "collect", lambda *given: calls.append(1) or collect(*given))
    method = KNNLM(data=corpus, store=str(tmp_path))
    store = method.built(MODEL, TOKENIZER)
    assert KNNLM(data=corpus, weight=0.5, k=2).built(MODEL, TOKENIZER) is store and len(calls) == 1
    knn_lm._last.clear()  # another process
    again = method.built(MODEL, TOKENIZER)
    assert torch.equal(again.keys, store.keys) and torch.equal(again.values, store.values) and len(calls) == 1
    for changed, model in (
        (KNNLM(data=corpus, tokens=20), MODEL),
        (KNNLM(data=corpus, document=9), MODEL),
        (KNNLM(data=corpus, keys="float16"), MODEL),
        (KNNLM(data=Texts(TEXT + "x")), MODEL),
        (method, tiny("llama", seed=1)),
    ):
        before = len(calls)
        changed.built(model, TOKENIZER)
        assert len(calls) == before + 1
    assert len(list(tmp_path.iterdir())) == 2  # of the two models


def test_at_most_so_much_of_a_document():
    other = [TOKENIZER.bos_token_id, *TOKENIZER(TEXT[30:], add_special_tokens=False)["input_ids"]]
    for document, expected in ((5, IDS[1:6] + other[1:6]), (0, IDS[1:] + other[1:])):
        assert KNNLM(data=Texts(TEXT, TEXT[30:]), document=document).built(MODEL, TOKENIZER).values.tolist() == expected


def test_what_else_is_bound_makes_another_store():
    corpus = Texts(TEXT)
    plain = KNNLM(data=corpus).built(MODEL, TOKENIZER)
    handle = MODEL.model.layers[0].register_forward_hook(lambda _, __, out: out + 0.1)
    try:
        assert KNNLM(data=corpus).built(MODEL, TOKENIZER) is not plain
    finally:
        handle.remove()


def test_errors_say_what_is_wrong():
    for data in (7, Texts):
        with pytest.raises(SmeltError, match="is not a corpus"):
            KNNLM(data=data)
    with pytest.raises(SmeltError, match="needs the model's tokenizer"), bind(MODEL, decode=KNNLM(data=Texts(TEXT))):
        pass
    with pytest.raises(SmeltError, match="train split of the data is empty"):
        KNNLM(data=Texts()).built(MODEL, TOKENIZER)
    with bind(MODEL, decode=KNNLM(data=Texts(TEXT)), tokenizer=TOKENIZER), torch.no_grad():
        ids = torch.tensor([IDS[:9]])
        with pytest.raises(SmeltError, match="labels"):
            MODEL(ids, labels=ids)
        with pytest.raises(SmeltError, match="return_dict"):
            MODEL(ids, return_dict=False)


def test_written_in_a_recipe():
    method = parse("knn_lm(data=stdlib(), tokens=10_000, weight=0.25, keys='float16')", "decode")
    check(method)
    assert parse(text(method), "decode") == method and method.data.digest().startswith("stdlib")
