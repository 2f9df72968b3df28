import math

import pytest
import torch

from smelt.decode._count import count
from smelt.decode.speculative import Speculative
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model.mistral import byte_level_bpe
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

FREE = {"eos_token_id": None, "bos_token_id": None}
IDS = torch.arange(2, 12)[None]


@pytest.fixture
def target():
    return tiny("llama", **FREE)


def calls(target, method, new: int) -> int:
    arguments = method.arguments(target, tiny_tokenizer())
    with count(target) as seen:
        target.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=new, do_sample=False, **arguments)
    return seen.calls


@pytest.mark.parametrize("length", [1, 4, 8])
def test_a_perfect_draft_needs_the_fewest_calls(target, tmp_path, length):
    save(target, tiny_tokenizer(), tmp_path)
    for new in (1, 9, 40):
        assert calls(target, Speculative(str(tmp_path), length=length), new) == math.ceil(new / (length + 1))


def test_a_useless_draft_costs_no_extra_calls(target, tmp_path):
    draft = tiny("llama", **FREE)
    with torch.no_grad():  # never says what the target says
        draft.lm_head.weight = torch.nn.Parameter(-target.lm_head.weight.clone())
        draft.config.tie_word_embeddings = False
    save(draft, tiny_tokenizer(), tmp_path)
    assert calls(target, Speculative(str(tmp_path), length=4), 20) == 20


def test_the_heuristic_lengthens_and_starts_anew(target, tmp_path):
    """A perfect draft: lengths 2, 4, 6, ..., so k calls give (2 + 1) + (4 + 1) + ... = k (k + 2) tokens; twice the same."""
    save(target, tiny_tokenizer(), tmp_path)
    method = Speculative(str(tmp_path), length=2, schedule="heuristic")
    arguments = method.arguments(target, tiny_tokenizer())
    for _ in range(2):
        with count(target) as seen:
            target.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5 * (5 + 2), do_sample=False, **arguments)
        assert seen.calls == 5


def test_acceptance_follows_the_formula(tmp_path):
    """Tokens per call under sampling = (1 - a^(length+1)) / (1 - a) where a = sum_x min(p, q) does not depend on the text."""

    def constant(logits):
        """A model whose next-token law is `logits` after any text."""
        model = tiny("llama", layers=1, hidden=16, ffn=16, heads=2, kv_heads=1, tie_word_embeddings=False, context=4096, **FREE)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
            model.lm_head.weight += logits[:, None] / 16  # the hidden state is all ones after the norm
        return model

    random = torch.Generator().manual_seed(5)
    mine, theirs = (torch.randn(320, generator=random) for _ in range(2))
    theirs = mine + 0.8 * theirs
    save(constant(theirs), tiny_tokenizer(), tmp_path)
    model = constant(mine)
    assert torch.allclose(model(IDS).logits[0, -1].softmax(-1), mine.softmax(-1), atol=1e-5)
    a = torch.minimum(mine.softmax(-1), theirs.softmax(-1)).sum().item()
    arguments = Speculative(str(tmp_path), length=3).arguments(model, tiny_tokenizer())
    new = 1200
    with count(model) as seen:
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=new, do_sample=True, top_k=0, **arguments)
    expected = (1 - a**4) / (1 - a)
    spread = 1.2 / math.sqrt(seen.calls)  # tokens of a call lie in 1..4: their standard deviation is below 1.5, here about 1.2
    assert 0.4 < a < 0.9 and abs(new / seen.calls - expected) < 4 * spread


def test_it_loads_in_the_precision_of_the_model(target, tmp_path):
    save(target, tiny_tokenizer(), tmp_path)
    assert Speculative(str(tmp_path)).drafter(target.double(), tiny_tokenizer()).model.dtype == torch.float64


def test_another_tokenizer_of_the_same_size_is_refused(target, tmp_path):
    save(target, byte_level_bpe(["zebra zebra zebra quagga\n"] * 9, 320, 256), tmp_path)
    with pytest.raises(SmeltError, match="has another tokenizer"):
        Speculative(str(tmp_path)).arguments(target, tiny_tokenizer())
    with pytest.raises(SmeltError, match="has another tokenizer"):
        Speculative(str(tmp_path)).arguments(target, None)


def test_another_vocabulary_size_is_refused(target, tmp_path):
    save(tiny("llama", vocab=384), tiny_tokenizer(), tmp_path)
    with pytest.raises(SmeltError, match="384 output tokens and the model has 320"):
        Speculative(str(tmp_path)).arguments(target, tiny_tokenizer())


def test_an_encoder_is_refused(target, tmp_path):
    save(tiny("bert"), tiny_tokenizer(), tmp_path)
    with pytest.raises(SmeltError, match="not a decoder"):
        Speculative(str(tmp_path)).arguments(target, tiny_tokenizer())


def test_a_missing_draft_is_named(target, tmp_path):
    with pytest.raises(SmeltError, match="no such folder"):
        Speculative(str(tmp_path / "none")).arguments(target, tiny_tokenizer())


def test_recipe_text_and_ranges():
    assert text(parse('speculative(draft="x/y", schedule="heuristic")', "decode")) == "speculative(draft='x/y', schedule='heuristic')"
    check(Speculative())
    for bad in ("speculative(length=0)", "speculative(schedule='heuristical')", "speculative(draft=3)"):
        with pytest.raises(SmeltError):
            parse(bad, "decode")
