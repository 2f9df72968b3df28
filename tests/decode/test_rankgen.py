import random

import pytest
import torch
from scipy.stats import chi2
from transformers import LogitsProcessor

from smelt.data.stdlib import Stdlib
from smelt.decode.rankgen import RankGen, ranked
from smelt.model._load import load, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.registry import check, parse, text
from smelt.runtime import bind
from smelt.spec import SmeltError

NO_ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
MODEL, TOKENIZER = tiny("llama", **NO_ENDS), tiny_tokenizer()
SMALL = tiny("llama", layers=1, hidden=16, ffn=16, heads=2, kv_heads=1, vocab=6, initializer_range=0.5, **NO_ENDS)
PROMPT = [5, 17, 40, 9, 300, 2]


def write(arguments, ids=PROMPT, seed=0, model=MODEL, **more):
    torch.manual_seed(seed)
    given = torch.tensor([ids]) if isinstance(ids[0], int) else torch.tensor(ids)
    settings = {"attention_mask": torch.ones_like(given), "do_sample": True, "top_k": 0, "max_new_tokens": 12}
    return model.generate(given, **{**settings, **more}, **arguments)


def looped(scorer, beam, samples, step):
    return {"custom_generate": ranked(scorer, beam, samples, step)}


def equal(prefix, suffixes):
    return torch.zeros(len(suffixes), dtype=torch.float64)


class Recorded:
    """A scorer that is any function of the ids, and what it was asked."""

    def __init__(self, of):
        self.of, self.asked = of, []

    def __call__(self, prefix, suffixes):
        scores = [float(self.of(s)) for s in suffixes]
        self.asked.append((list(prefix), [list(s) for s in suffixes], scores))
        return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "top_p": 0.9}, {"repetition_penalty": 1.5}])
def test_one_beam_of_one_sample_is_plain_sampling_draw_for_draw(settings):
    scorer = Recorded(sum)
    for seed in range(4):
        assert write(looped(scorer, 1, 1, 5), seed=seed, **settings).tolist() == write({}, seed=seed, **settings).tolist()
    assert not scorer.asked and write({}, seed=0).tolist() != write({}, seed=1).tolist()


def misfit(arguments, rows=200):
    """The chance of counts at least as far from the law of the first two tokens."""
    prompt = [0, 3, 1, 5]
    made = write(arguments, ids=[prompt] * rows, model=SMALL, max_new_tokens=2)[:, 4:]
    with torch.no_grad():
        first = SMALL(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        second = SMALL(torch.tensor([[*prompt, a] for a in range(6)])).logits[:, -1].double().softmax(-1)
    expected = (rows * first[:, None] * second).flatten()
    counts = torch.bincount(made[:, 0] * 6 + made[:, 1], minlength=36).double()
    enough = expected > 5
    statistic = ((counts - expected)[enough] ** 2 / expected[enough]).sum()
    return float(chi2.sf(float(statistic), int(enough.sum()) - 1))


def test_equal_scores_leave_the_law_unchanged():
    assert misfit(looped(equal, 2, 2, 1)) > 1e-4
    assert misfit(looped(Recorded(lambda new: new.count(4)), 2, 2, 1)) < 1e-4  # or the test could not fail


@pytest.mark.parametrize("beam, samples, step", [(1, 4, 3), (2, 3, 5), (3, 2, 4), (2, 3, 50)])
def test_the_best_are_kept_and_the_best_of_the_last_is_the_answer(beam, samples, step):
    scorer = Recorded(lambda new: sum(token * (i % 3 - 1) for i, token in enumerate(new)))
    out = write(looped(scorer, beam, samples, step))[0, len(PROMPT) :].tolist()
    assert len(scorer.asked) == -(-12 // step)
    kept = [[]]
    for prefix, candidates, scores in scorer.asked:
        assert prefix == PROMPT
        parents = [parent for parent in kept for _ in range(samples)]
        assert [c[: len(p)] for c, p in zip(candidates, parents, strict=True)] == parents
        assert all(len(c) == min(12, len(p) + step) for c, p in zip(candidates, parents))
        kept = [c for _, _, c in sorted((-score, i, c) for i, (score, c) in enumerate(zip(scores, candidates)))][:beam]
    assert out == kept[0] and max(scorer.asked[-1][2]) == scorer.of(out)


def test_of_equal_scores_the_earlier_stays():
    scorer = Recorded(lambda new: 0.0)
    out = write(looped(scorer, 2, 3, 4))[0, len(PROMPT) :].tolist()
    assert out == scorer.asked[-1][1][0]


def test_an_ended_text_stays_as_it_is():
    ends = list(range(0, 320, 12))

    def ended(new):
        return new[-1] in ends

    scorer, rounds = Recorded(lambda new: ended(new) * 100 - len(new)), 0
    for seed in range(4):
        scorer.asked.clear()
        out = write(looped(scorer, 2, 4, 4), seed=seed, eos_token_id=ends, pad_token_id=1, max_new_tokens=60)[0, len(PROMPT) :].tolist()
        for (_, before, scores), (_, after, _) in zip(scorer.asked, scorer.asked[1:]):
            best = [before[i] for i in sorted(range(len(before)), key=lambda i: (-scores[i], i))[:2]]
            assert sum(map(ended, best)) < 2  # else there would be no further round
            assert sum(4 - 3 * ended(one) for one in best) == len(after)
            assert all(after.count(one) >= 1 for one in best if ended(one))
        assert not any(set(c[:-1]) & set(ends) for _, candidates, _ in scorer.asked for c in candidates)
        assert ended(out)
        rounds += len(scorer.asked)
    assert rounds > 6


class Seen(LogitsProcessor):
    """Looks at the text before each token, as a penalty would, and changes nothing."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.tolist(), scores.clone()))
        return scores


def test_every_row_reads_its_own_text_through_the_cache():
    seen = Seen()
    write(looped(Recorded(lambda new: new[-1] % 7), 3, 3, 2), logits_processor=[seen])
    assert len({tuple(ids[0]) for ids, _ in seen.calls}) > 40
    for ids, scores in seen.calls:
        with torch.no_grad():
            assert torch.allclose(MODEL(torch.tensor(ids)).logits[:, -1], scores, atol=1e-4)


def test_greedy_search_stays_plain_greedy_search():
    scorer = Recorded(sum)
    assert write(looped(scorer, 3, 4, 3), do_sample=False).tolist() == write({}, do_sample=False).tolist()
    assert not scorer.asked


def test_rows_of_a_batch_are_written_one_by_one():
    """Padded on the left; the first row as if alone, and each filled up after its end."""
    rows = [PROMPT[:3], PROMPT]
    ids, mask = torch.ones(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 6 - len(row) :], mask[i, 6 - len(row) :] = torch.tensor(row), 1
    end = write(looped(equal, 2, 2, 4), ids=rows[0])[0, 5].item()
    more = {"eos_token_id": end, "pad_token_id": 1}
    scorer = Recorded(lambda new: end not in new)
    alone = write(looped(scorer, 2, 2, 4), ids=rows[0], **more)[0, 3:].tolist()
    out = write(looped(Recorded(scorer.of), 2, 2, 4), ids=ids.tolist(), **{"attention_mask": mask}, **more)[:, 6:].tolist()
    assert out[0][: len(alone)] == alone and set(out[0][len(alone) :]) <= {1}
    assert len(out[0]) == len(out[1])


class Follower:
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, tokens):
        self.tokens += tokens.tolist()

    def end(self):
        self.ended += 1


def test_a_streamer_sees_the_answer_once():
    for beam in (1, 3):
        follower = Follower()
        out = write(looped(Recorded(sum), beam, 3, 4), follower=follower)
        assert follower.tokens == out[0, len(PROMPT) :].tolist() and follower.ended == 1


def test_stopping_criteria_end_a_text():
    rule = lambda ids, scores: torch.tensor([ids.shape[1] >= len(PROMPT) + 5] * len(ids))  # noqa: E731
    out = write(looped(Recorded(sum), 2, 2, 3), stopping_criteria=[rule], return_dict_in_generate=True)
    assert out.sequences.shape == (1, len(PROMPT) + 5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a decoder with the same tokenizer, an encoder)."""
    found = []
    for name, model in (("decoder", tiny("llama", seed=1)), ("encoder", tiny("bert"))):
        found.append(tmp_path_factory.mktemp(name))
        save(model, TOKENIZER, found[-1])
    return found


@pytest.mark.parametrize("scorer", ["pmi", "likelihood", "embedding"])
def test_scorers_of_models(scorer, folders):
    decoder, encoder = folders
    method = RankGen(beam=2, samples=3, step=4, scorer=scorer, model=str(encoder if scorer == "embedding" else decoder))
    score = method._scorer(MODEL, TOKENIZER)
    suffixes = [[40, 41, 42], [7, 8], [100]]
    values = score(PROMPT, suffixes)
    assert values.shape == (3,) and len(set(values.tolist())) == 3
    if scorer != "embedding":
        own = RankGen(scorer=scorer)._scorer(MODEL, TOKENIZER)(PROMPT, suffixes)
        assert not torch.allclose(values, own)  # the folder's law, not the bound model's
    with bind(MODEL, decode=method, tokenizer=TOKENIZER):
        assert write({})[0].shape == (len(PROMPT) + 12,)


def test_a_function_of_texts_as_scorer():
    asked = []
    method = RankGen(
        beam=1, samples=4, step=12, scorer=lambda prefix, texts: asked.append((prefix, texts)) or [t.count("e") for t in texts]
    )
    check(method)
    with bind(MODEL, decode=method, tokenizer=TOKENIZER):
        out = write({})[0, len(PROMPT) :]
    prefix, texts = asked[0]
    assert prefix == TOKENIZER.decode(PROMPT, skip_special_tokens=True) and len(texts) == 4
    assert TOKENIZER.decode(out, skip_special_tokens=True).count("e") == max(t.count("e") for t in texts)


def test_errors_say_what_is_wrong(folders):
    with pytest.raises(SmeltError, match="needs model="):
        RankGen(scorer="embedding")
    with pytest.raises(SmeltError, match="leave model= out"):
        RankGen(scorer=lambda prefix, texts: texts, model="embedded")
    with pytest.raises(SmeltError, match="no decoder with the model's own tokenizer"):
        RankGen(scorer="pmi", model=str(folders[1])).arguments(MODEL, TOKENIZER)
    with pytest.raises(SmeltError, match="needs the model's tokenizer"):
        RankGen().arguments(MODEL, None)
    bare = tiny_tokenizer.__wrapped__()
    bare.bos_token = bare.eos_token = None
    with pytest.raises(SmeltError, match="needs a start token"):
        RankGen().arguments(MODEL, bare)
    for more, message in (
        ({"num_beams": 2}, "num_beams=1"),
        ({"use_cache": False}, "key/value cache"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores is not kept"),
    ):
        with pytest.raises(SmeltError, match=message):
            write(looped(equal, 2, 2, 3), **more)
    with pytest.raises(SmeltError, match="not a number"):
        write(looped(Recorded(lambda new: float("nan")), 2, 2, 3))


def test_written_in_a_recipe():
    method = parse("rankgen(beam=1, samples=5, step=8, scorer='likelihood')", "decode")
    check(method)
    assert parse(text(method), "decode") == method
    with pytest.raises(SmeltError, match="scorer"):
        parse("rankgen(scorer='t5')", "decode")


@pytest.mark.slow
def test_information_knows_the_true_continuation_more_often_than_likelihood():
    """20 tokens of held-out modules against three other places of the same module, 64 tokens before them; chance is 1/4."""
    model, tokenizer, _ = load("embedded")
    scorers = {name: RankGen(scorer=name)._scorer(model, tokenizer) for name in ("pmi", "likelihood")}
    generator, hits, asked = random.Random(0), dict.fromkeys(scorers, 0), 0
    for document in Stdlib().documents("test"):
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        for _ in range(3 if len(ids) > 600 else 0):
            true, *others = (generator.randrange(64, len(ids) - 20) for _ in range(4))
            if any(abs(other - true) < 20 for other in others):
                continue
            prefix, suffixes = [tokenizer.bos_token_id, *ids[true - 64 : true]], [ids[at : at + 20] for at in (true, *others)]
            asked += 1
            for name, score in scorers.items():
                hits[name] += int(score(prefix, suffixes).argmax()) == 0
    assert asked > 60 and hits["pmi"] > hits["likelihood"] > asked / 4
