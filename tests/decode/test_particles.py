"""On a model whose law is a table, read through a cache that holds the text itself: a row in the wrong place changes the law."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import EosTokenCriteria, MaxLengthCriteria

from smelt.decode._constraint import checked
from smelt.decode._loop import Choice
from smelt.decode._particles import Weighted, constrained, resampled
from smelt.decode.awrs import AWRS, adaptive, likeliest, masked
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError

END, LETTERS = 0, "_abcd"  # token i is LETTERS[i]; token 0 ends a text
SPELLED = [None, *(letter.encode() for letter in LETTERS[1:])]
TRAP = {  # ids so far -> law of (end, a, b, c, d). "a" is likely and has few valid endings
    (): [0.0, 0.85, 0.15, 0.0, 0.0],
    (1,): [0.0, 0.02, 0.05, 0.03, 0.9],
    (2,): [0.1, 0.5, 0.4, 0.0, 0.0],
    (2, 1): [0.3, 0.0, 0.0, 0.3, 0.4],
}
WORDS = {"ab", "aba", "b", "ba", "bac", "bb"}


def law_after(new: tuple[int, ...]) -> list[float]:
    return TRAP.get(new, [0.6, 0.1, 0.1, 0.1, 0.1])


class Said:
    """A cache that holds ids [rows, length]."""

    def __init__(self):
        self.ids = torch.zeros(1, 0, dtype=torch.long)

    def get_seq_length(self):
        return self.ids.shape[1]

    def batch_select_indices(self, rows):
        self.ids = self.ids[rows]


class Table:
    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, past_key_values, **_):
        self.calls += 1
        past_key_values.ids = torch.cat([past_key_values.ids, input_ids], 1)
        laws = torch.tensor([law_after(tuple(row[1:])) for row in past_key_values.ids.tolist()], dtype=torch.float64)
        return SimpleNamespace(logits=laws.log()[:, None], past_key_values=past_key_values)


def check(text: str) -> str:
    if not any(word.startswith(text) for word in WORDS):
        return "dead"
    return "complete" if text in WORDS else "viable"


def everything(text: str) -> str:
    return "complete"


def write(count: int, ess: float, rule=adaptive, says=check, most: int = 4, **more) -> Weighted:
    loop = constrained(lambda: checked(says), SPELLED, rule, likeliest, count, ess)
    config = SimpleNamespace(num_beams=1, do_sample=True, return_dict_in_generate=True, _pad_token_tensor=None, **more)
    ends = [EosTokenCriteria(END), MaxLengthCriteria(most + 1)]
    return loop(Table(), torch.tensor([[4]]), stopping_criteria=ends, generation_config=config, past_key_values=Said())


def every_text(says=check, most: int = 4) -> dict[tuple[int, ...], float]:
    """{new tokens: chance} of all that plain sampling writes and the constraint calls complete, by going through all of them."""
    found, open_ = {}, [((), 1.0)]
    while open_:
        new, chance = open_.pop()
        for token, p in enumerate(law_after(new)):
            text = "".join(LETTERS[i] for i in new if i)
            if p and token == END and says(text) != "dead" and says(text) != "viable":
                found[(*new, END)] = chance * p
            elif p and token != END and len(new) + 1 < most:
                open_.append(((*new, token), chance * p))
            elif p and token != END and says(text + LETTERS[token]) in ("complete", "final"):
                found[(*new, token)] = chance * p
    return found


def law_of(out: Weighted) -> dict[tuple[int, ...], float]:
    weights = out.log_weights[0].softmax(0).tolist()
    found: dict[tuple[int, ...], float] = {}
    for new, weight in zip(out.particles[0], weights, strict=True):
        found[tuple(new)] = found.get(tuple(new), 0.0) + weight
    return found


def distance(a: dict, b: dict) -> float:
    return 0.5 * sum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in {*a, *b})


@pytest.mark.parametrize("most", [4, 2])  # with 2 every text of "a" is cut where it stands
def test_the_law_of_whole_texts(most):
    texts = every_text(most=most)
    z = sum(texts.values())
    truth = {text: chance / z for text, chance in texts.items()}
    torch.manual_seed(0)
    out = write(2000, 0.5, most=most)
    assert distance(law_of(out), truth) < 0.03
    assert out.log_evidence.exp().item() == pytest.approx(z, rel=0.1)
    local: dict[tuple[int, ...], float] = {}
    for new in write(2000, 0.0, masked, most=most).particles[0]:  # weights left out: masking token by token
        local[tuple(new)] = local.get(tuple(new), 0.0) + 1 / 2000
    assert distance(local, truth) > 0.25


@pytest.mark.parametrize("count, ess", [(1, 0.5), (4, 0.7), (4, 1.0)])
def test_evidence_is_unbiased(count, ess):
    """E[mean weight] = Z, and, with the text drawn by the weights, E[mean weight 1(text)] = P(text), for any N."""
    texts = every_text()
    z = sum(texts.values())
    torch.manual_seed(1)
    found, drawn = torch.empty(500).double(), []
    for i in range(500):
        out = write(count, ess)
        found[i] = out.log_evidence.exp()
        drawn.append(tuple(out.sequences[0, 1:].tolist()))
        assert list(drawn[-1]) in out.particles[0]
    assert abs(found.mean() - z) < 3 * found.std() / math.sqrt(500)
    assert found.std() > 0
    for text, chance in texts.items():
        part = torch.where(torch.tensor([one == text for one in drawn]), found, 0.0)
        assert abs(part.mean() - chance) < 4 * part.std() / math.sqrt(500), text


def test_no_constraint_is_plain_sampling():
    torch.manual_seed(3)
    out = write(1500, 0.5, says=everything)
    assert out.log_weights.tolist() == [[0.0] * 1500] and out.log_evidence.item() == 0
    truth = every_text(everything)
    assert sum(truth.values()) == pytest.approx(1)
    pairs = {}  # of the first two tokens: few enough to compare
    for text, chance in truth.items():
        pairs[text[:2]] = pairs.get(text[:2], 0.0) + chance
    seen = {}
    for new in out.particles[0]:
        seen[tuple(new[:2])] = seen.get(tuple(new[:2]), 0.0) + 1 / 1500
    assert distance(seen, pairs) < 0.05


def test_each_text_is_asked_about_once():
    """Particles with the same text share what is known of it, and an end token is no question."""
    torch.manual_seed(4)
    asked: list[str] = []

    def says(text: str) -> str:
        asked.append(text)
        return check(text)

    out = write(200, 0.0, says=says)
    assert len(asked) == len(set(asked)) == out.evaluations.item() + 1  # and the empty text at the beginning


def test_a_final_text_needs_no_test():
    torch.manual_seed(5)
    out = write(1, 0.5, says=lambda text: {"": "viable", "b": "final"}.get(text, "dead"))
    assert out.particles == [[[2, END]]] and out.evaluations.item() == 2
    assert out.log_weights.item() == pytest.approx(math.log(law_after(())[2] * law_after((2,))[END]))


def test_where_no_token_is_allowed():
    dead = lambda text: "viable" if len(text) < 2 else "dead"  # noqa: E731
    out = write(3, 0.5, says=dead)
    assert out.log_evidence.item() == -math.inf and out.log_weights.tolist() == [[-math.inf] * 3]
    loop = constrained(lambda: checked(dead), SPELLED, adaptive, likeliest, 3, 0.5)
    config = SimpleNamespace(num_beams=1, do_sample=True, return_dict_in_generate=False, _pad_token_tensor=None)
    with pytest.raises(SmeltError, match="allows no token"):
        loop(Table(), torch.tensor([[4]]), stopping_criteria=[MaxLengthCriteria(5)], generation_config=config, past_key_values=Said())


def test_what_is_cut_in_the_middle_has_no_weight_and_is_still_given():
    torch.manual_seed(6)
    out = write(3, 0.5, says=lambda text: "viable" if set(text) <= {"a", "b"} else "dead", most=3)
    assert out.log_evidence.item() == -math.inf and out.sequences.shape == (1, 4)


@pytest.mark.parametrize("wrong", ["num_beams", "use_cache", "output_scores", "do_sample"])
def test_what_is_refused(wrong):
    settings = {"num_beams": 1, "do_sample": True, "return_dict_in_generate": False, "_pad_token_tensor": None}
    settings |= {"num_beams": 2} if wrong == "num_beams" else {"output_scores": True} if wrong == "output_scores" else {}
    settings |= {"do_sample": False} if wrong == "do_sample" else {}
    loop = constrained(lambda: checked(check), SPELLED, adaptive, likeliest, 3, 0.5)
    with pytest.raises(SmeltError, match=wrong):
        loop(Table(), torch.tensor([[4]]), generation_config=SimpleNamespace(**settings), use_cache=wrong != "use_cache")


def test_resampling_is_systematic():
    torch.manual_seed(7)
    for _ in range(200):
        weights = torch.rand(9).double() ** 4
        weights[torch.rand(9) < 0.3] = 0
        if weights.sum() == 0:
            continue
        effective = weights.sum() ** 2 / (weights**2).sum()
        ancestors = resampled(weights.log().tolist(), 0.6)
        assert (ancestors is None) == bool(effective >= 0.6 * 9)
        for i, share in enumerate((weights / weights.sum() * 9).tolist()):
            assert ancestors is None or math.floor(share) <= ancestors.count(i) <= math.ceil(share)
    assert resampled([-math.inf] * 3, 1.0) is None
    assert resampled([0.0] * 5, 1.0) is None
    copies = torch.zeros(3)
    for _ in range(2000):
        copies += torch.bincount(torch.tensor(resampled([math.log(0.1), math.log(0.65), math.log(0.25)], 1.0)), minlength=3)
    assert torch.allclose(copies / 2000, torch.tensor([0.3, 1.95, 0.75]), atol=0.05)


def test_rows_of_the_cache_follow_their_particles(monkeypatch):
    """On a transformer: what every particle reads is what the model says of its whole text."""
    target, tokenizer = tiny("llama", eos_token_id=None, bos_token_id=None), tiny_tokenizer()
    inner, seen = Choice.scores, []

    def scores(self, texts, logits):
        for text, row in zip(texts, logits, strict=True):
            assert torch.allclose(row, target(torch.tensor([text])).logits[0, -1], atol=1e-4)
            seen.append(tuple(text))
        return inner(self, texts, logits)

    monkeypatch.setattr(Choice, "scores", scores)
    method = AWRS(check=lambda text: "dead" if "e" in text else "complete" if len(text) < 12 else "final", particles=5, ess=1.0)
    ids = torch.tensor([[5, 6, 7, 8], [1, 1, 9, 10]])
    torch.manual_seed(8)
    with torch.no_grad():
        out = target.generate(
            ids,
            attention_mask=(ids > 1).long(),
            do_sample=True,
            max_new_tokens=10,
            pad_token_id=1,
            return_dict_in_generate=True,
            **method.arguments(target, tokenizer),
        )
    assert len(set(seen)) > 40 and out.log_weights.shape == (2, 5)
    assert {text[:4] for text in seen} == {(5, 6, 7, 8), *(text[:4] for text in seen if text[:2] == (9, 10))}
    assert all("e" not in tokenizer.decode(new) for row in out.particles for new in row)
    for row, new in zip(out.sequences[:, 4:].tolist(), out.particles, strict=True):
        assert any(row[: len(one)] == one and set(row[len(one) :]) <= {1} for one in new)


def test_streams():
    class Follower:
        def __init__(self):
            self.said, self.ended = [], False

        def put(self, ids):
            self.said += ids.tolist()

        def end(self):
            self.ended = True

    for count, ess in itertools.product((1, 3), (0.5,)):
        loop = constrained(lambda: checked(everything), SPELLED, adaptive, likeliest, count, ess)
        follower = Follower()
        config = SimpleNamespace(num_beams=1, do_sample=True, return_dict_in_generate=False, _pad_token_tensor=None)
        out = loop(
            Table(),
            torch.tensor([[4]]),
            stopping_criteria=[EosTokenCriteria(END), MaxLengthCriteria(6)],
            generation_config=config,
            follower=follower,
            past_key_values=Said(),
        )
        assert follower.said == out[0, 1:].tolist() and follower.ended
