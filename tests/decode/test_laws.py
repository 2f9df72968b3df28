"""Laws of every decoding method that calls itself lossless, and of all of them. None is named here.

Sampling is tested on the tokens of a few long texts. Given the text before it, token t of an exact method has the
law p_t of the target, so 1[x_t = a] - p_t(a) are martingale differences: summed over the positions whose
predecessor is b, they are about normal with covariance sum(diag(p_t) - p_t p_t^T), and the squared norm under its
inverse, added over b, is about chi-square with V (V - 1) degrees of freedom. The same once more with tokens named by
their rank under p_t (V - 1 degrees); the smaller chance counts, doubled. No independence of positions is needed.
Refused at a chance of 1e-4 (fixed seed, so it either always passes or never does). Power: lossy rules are planted
below and must be refused with the same number of tokens.
"""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import chi2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LogitsProcessorList, PreTrainedTokenizerFast, RepetitionPenaltyLogitsProcessor

from smelt import registry
from smelt.decode import Decoding, Steered, _verify
from smelt.decode._count import count
from smelt.decode._rule import keep_chain, keep_tree
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.runtime import bind

METHODS = registry.names("decode")
LOSSLESS = [name for name in METHODS if registry.load("decode", name).lossless]
STEERED = [name for name in METHODS if issubclass(registry.load("decode", name), Steered)]
SYMBOLS, TOKENS = 6, 1600
NO_ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


def nearby(model, noise: float):
    """A model that often, and not always, agrees with `model`: its weights with noise on them."""
    other = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weight in other.parameters():
            weight += noise * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0.0
    return other


def symbols():
    """A tokenizer of six words."""
    words = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("abcdef")}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a")


@pytest.fixture(scope="module")
def writing(tmp_path_factory):
    """(target, tokenizer, folder of a draft) with the tiny byte-level vocabulary; the target never ends by itself."""
    target = tiny("llama", **NO_ENDS)
    folder = tmp_path_factory.mktemp("draft")
    save(nearby(target, 0.1), tiny_tokenizer(), folder)
    return target, tiny_tokenizer(), folder


@pytest.fixture(scope="module")
def spelling(tmp_path_factory):
    """The same over six tokens, for exact laws."""
    target = tiny("llama", layers=1, hidden=16, ffn=16, heads=2, kv_heads=1, vocab=SYMBOLS, context=512, initializer_range=0.5, **NO_ENDS)
    folder = tmp_path_factory.mktemp("draft6")
    save(nearby(target, 0.4), symbols(), folder)
    return target, symbols(), folder


def prompts(vocab: int, many: int = 12) -> list[torch.Tensor]:
    """Random prompts of 1 to 40 tokens; every second one says everything twice, so that there is something to look up."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for i in range(many):
        ids = torch.randint(2, vocab, (1, [1, 2, 3, 20][i % 4]), generator=generator)
        found.append(torch.cat([ids, ids], 1) if i % 2 else ids)
    return found


def run(model, ids, **more):
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **more)


@pytest.mark.parametrize("name", METHODS)
def test_arguments_leave_the_model_alone(name, writing):
    target, tokenizer, folder = writing
    weights, settings = {k: v.clone() for k, v in target.state_dict().items()}, target.generation_config.to_dict()
    method = registry.load("decode", name).example(folder)
    assert isinstance(method, Decoding)
    run(target, prompts(320)[3], max_new_tokens=8, **method.arguments(target, tokenizer))
    assert target.generation_config.to_dict() == settings
    assert all(torch.equal(weights[k], v) for k, v in target.state_dict().items())


@pytest.mark.parametrize("name", STEERED)
def test_hooks_come_off_and_leave_the_model_as_it_was(name, writing):
    target, tokenizer, folder = writing
    ids = prompts(320)[3]
    with torch.no_grad():
        before = target(ids).logits
        with bind(target, decode=registry.load("decode", name).example(folder), tokenizer=tokenizer):
            during = target(ids).logits
            run(target, ids, max_new_tokens=4)
        assert torch.isfinite(during).all() and not torch.equal(during, before)  # or it steers nothing
        assert torch.equal(target(ids).logits, before)
    hooks = [m for m in target.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks and "generate" not in vars(target)


@pytest.mark.parametrize("name", LOSSLESS)
def test_greedy_is_plain_greedy(name, writing):
    target, tokenizer, folder = writing
    arguments = registry.load("decode", name).example(folder).arguments(target, tokenizer)
    calls = 0
    for ids in prompts(320):
        plain = run(target, ids, max_new_tokens=40)
        with count(target) as seen:
            out = run(target, ids, max_new_tokens=40, return_dict_in_generate=True, **arguments)
        assert out.sequences.tolist() == plain.tolist()
        assert out.past_key_values.get_seq_length() == plain.shape[1] - 1
        calls += seen.calls
    assert calls < 12 * 40  # or drafts are never kept and the rest of this test shows nothing


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_batch_is_its_rows(name, writing):
    """Padded on the left, every row comes out as if it were alone, filled up after its end."""
    target, tokenizer, folder = writing
    arguments = registry.load("decode", name).example(folder).arguments(target, tokenizer)
    rows = [prompts(320)[i][0] for i in (0, 3, 6)]
    ids = torch.zeros(3, 40, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, 40 - len(row) :], mask[i, 40 - len(row) :] = row, 1
    ends = int(run(target, rows[1][None], max_new_tokens=20)[0, -5])
    out = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, eos_token_id=ends, pad_token_id=1, **arguments)
    for i, row in enumerate(rows):
        alone = run(target, row[None], max_new_tokens=20, eos_token_id=ends, pad_token_id=1)[0, len(row) :].tolist()
        assert out[i, 40:].tolist() == alone + [1] * (out.shape[1] - 40 - len(alone))


@pytest.mark.parametrize("name", LOSSLESS)
def test_greedy_with_a_processor(name, writing):
    target, tokenizer, folder = writing
    arguments = registry.load("decode", name).example(folder).arguments(target, tokenizer)
    for ids in prompts(320)[1::3]:
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1)])
        plain = run(target, ids, max_new_tokens=30, logits_processor=processors)
        assert run(target, ids, max_new_tokens=30, logits_processor=processors, **arguments).tolist() == plain.tolist()


@pytest.mark.parametrize("name", LOSSLESS)
def test_greedy_stops_where_plain_greedy_stops(name, writing):
    """The end-of-text token somewhere in the output, so that it falls inside drafts; and every maximal length."""
    target, tokenizer, folder = writing
    arguments = registry.load("decode", name).example(folder).arguments(target, tokenizer)
    inside = 0
    for ids in prompts(320)[:4]:
        free = run(target, ids, max_new_tokens=30)[0, ids.shape[1] :].tolist()
        for at in (0, 3, 9, 14, 19):
            plain = run(target, ids, max_new_tokens=30, eos_token_id=free[at], pad_token_id=1)
            out = run(target, ids, max_new_tokens=30, eos_token_id=free[at], pad_token_id=1, **arguments)
            assert out.tolist() == plain.tolist()
            inside += plain.shape[1] > ids.shape[1] + 2
        for most in (1, 2, 5):
            assert run(target, ids, max_new_tokens=most, **arguments)[0, ids.shape[1] :].tolist() == free[:most]
    assert inside >= 4


def misfit(model, texts: list[torch.Tensor], prompt: int, soften) -> float:
    """The chance of a misfit at least as large under the target's exact law, by (last token, token) and by rank under p_t."""
    excess, covariance = torch.zeros(SYMBOLS + 1, SYMBOLS).double(), torch.zeros(SYMBOLS + 1, SYMBOLS, SYMBOLS).double()
    for ids in texts:
        with torch.no_grad():
            law = soften(model(ids).logits[0].double()).softmax(-1)
        for t in range(prompt, ids.shape[1]):
            p, order = law[t - 1], law[t - 1].argsort(descending=True)
            hit = torch.nn.functional.one_hot(ids[0, t], SYMBOLS)
            for group, axes in ((ids[0, t - 1], torch.arange(SYMBOLS)), (SYMBOLS, order)):
                excess[group] += (hit - p)[axes]
                covariance[group] += torch.diag(p[axes]) - torch.outer(p[axes], p[axes])
    statistic, freedom = torch.zeros(SYMBOLS + 1), torch.zeros(SYMBOLS + 1)
    for group in range(SYMBOLS + 1):
        size, axes = torch.linalg.eigh(covariance[group])
        real = size > 5.0  # fewer than about five expected occurrences make no normal law
        statistic[group] = ((axes.T @ excess[group])[real] ** 2 / size[real]).sum()
        freedom[group] = real.sum()
    parts = chi2.sf(statistic[:-1].sum(), freedom[:-1].sum()), chi2.sf(statistic[-1], freedom[-1])
    return min(1.0, 2 * float(min(parts)))


def texts_of(model, arguments: dict, tokens: int, seed: int, **sampling) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5]])
    more = {"attention_mask": torch.ones_like(ids), "do_sample": True, "max_new_tokens": 400, **sampling, **arguments}
    return [model.generate(ids, **more) for _ in range(tokens // 400)]


def halved(logits: torch.Tensor) -> torch.Tensor:
    return logits / 2.0


def best_three(logits: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(logits < logits.topk(3, -1).values[..., -1:], -torch.inf)


SAMPLINGS = {"temperature": ({"temperature": 2.0, "top_k": 0}, halved), "top_k": ({"temperature": 1.0, "top_k": 3}, best_three)}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", LOSSLESS)
def test_sampling_has_the_law_of_the_target(name, sampling, spelling):
    target, tokenizer, folder = spelling
    arguments = registry.load("decode", name).example(folder).arguments(target, tokenizer)
    settings, soften = SAMPLINGS[sampling]
    with count(target) as seen:
        texts = texts_of(target, arguments, TOKENS, 11, **settings)
    assert seen.calls < 0.95 * TOKENS  # some drafted tokens are kept
    assert seen.positions > 1.05 * TOKENS  # and some are not: each position read is a kept token, a prompt's or a refused one
    assert misfit(target, texts, 6, soften) > 1e-4


def generous(law, many):
    """Drawn drafts are kept with probability min(1, 2 p / q)."""
    return None if law is None else law / 2


def credulous(law, many):
    """Drafts that are certain of themselves are taken for draws from the uniform law."""
    return torch.full((many, SYMBOLS), 1 / SYMBOLS) if law is None and many else law


def test_the_sampling_test_can_fail(spelling, monkeypatch):
    """Two lossy rules, for chains and trees, and a wrong temperature are refused; plain sampling is not."""
    target, tokenizer, folder = spelling
    refused = []
    for wrong in (generous, credulous):
        for name in LOSSLESS:
            arguments, used = registry.load("decode", name).example(folder).arguments(target, tokenizer), set()

            def chain(tokens, scores, law, sample, wrong=wrong, used=used):
                used |= {law is not None} if len(tokens) else set()
                return keep_chain(tokens, scores, wrong(law, len(tokens)), sample)

            def tree(tokens, parents, scores, law, sample, wrong=wrong, used=used):
                used.add(law is not None)
                return keep_tree(tokens, parents, scores, wrong(law, len(tokens)), sample)

            monkeypatch.setattr(_verify, "keep_chain", chain)
            monkeypatch.setattr(_verify, "keep_tree", tree)
            texts_of(target, arguments, 400, 11, temperature=2.0, top_k=0, max_new_tokens=40)  # does it draft so at all?
            texts = texts_of(target, arguments, TOKENS, 11, temperature=2.0, top_k=0) if (wrong is generous) in used else []
            monkeypatch.undo()
            if texts:
                assert misfit(target, texts, 6, halved) < 1e-4, name
                refused.append(wrong)
    assert {generous, credulous} == set(refused)
    for temperature, exact in ((1.5, False), (2.0, True)):
        texts = texts_of(target, {}, TOKENS, 11, temperature=temperature, top_k=0)
        assert (misfit(target, texts, 6, halved) > 1e-4) == exact
