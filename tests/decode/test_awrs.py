import itertools
import json
import math
import random
import re

import pytest
import torch
from scipy.stats import chi2

from smelt.decode._constraint import pieces
from smelt.decode.awrs import AWRS, adaptive, likeliest, masked
from smelt.model._load import load
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.registry import check, parse, text
from smelt.runtime import bind
from smelt.spec import SmeltError


def random_law(size: int, seed: int, sharp: float = 1.5) -> torch.Tensor:
    return (sharp * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(-1)


def by_the_book(law: list[float], order: tuple[int, ...], good: set[int]) -> tuple[int | None, float]:
    """The recursive estimator over one order of drawing."""
    rejected, weight = 0.0, 1.0
    for at, token in enumerate(order):
        q = law[token] / (1 - rejected)
        if token in good:
            following = order[at + 1 : at + 2]
            return token, weight * (1.0 if not following or following[0] in good else q)
        weight *= 1 - q
        rejected += law[token]
    return None, 0.0


def chance_of(law: list[float], order: tuple[int, ...]) -> float:
    chance, left = 1.0, 1.0
    for token in order:
        chance *= law[token] / left if left > 1e-12 else 1.0
        left -= law[token]
    return chance


@pytest.mark.parametrize("good", [{0}, {1, 3}, {0, 2, 4}, {0, 1, 2, 3, 4}, set()])
def test_exact_over_every_order(good, monkeypatch):
    """E[w 1(x)] = p(x) C(x) and P(x) = p(x) C(x) / Z, with the drawing planted: keys p / E fall with E = p rank."""
    law = random_law(5, 1)
    z = sum(float(law[i]) for i in good)
    weighted, chosen, total = [0.0] * 5, [0.0] * 5, 0.0
    for order in itertools.permutations(range(5)):
        rank = torch.empty(5, dtype=torch.float64)
        rank[list(order)] = torch.arange(1.0, 6.0, dtype=torch.float64)
        monkeypatch.setattr(torch.Tensor, "exponential_", lambda given, rank=rank: given.copy_(law * rank))
        asked: list[int] = []
        token, weight = adaptive(law, lambda i, asked=asked: asked.append(i) or i in good)
        monkeypatch.undo()
        expected = by_the_book(law.tolist(), order, good)
        assert token == expected[0] and weight == pytest.approx(expected[1], abs=1e-9)
        assert asked == list(order[: len(asked)])
        assert len(asked) == min(5, next((at for at, i in enumerate(order) if i in good), 5) + 2)
        chance = chance_of(law.tolist(), order)
        total += chance
        if token is not None:
            weighted[token] += chance * weight
            chosen[token] += chance
    assert total == pytest.approx(1)
    for i in range(5):
        assert weighted[i] == pytest.approx(float(law[i]) * (i in good), abs=1e-9)
        assert chosen[i] == pytest.approx(float(law[i]) * (i in good) / z if z else 0.0, abs=1e-9)


@pytest.mark.parametrize("size, draws", [(8, 12_000), (50, 8_000), pytest.param(50, 200_000, marks=pytest.mark.slow)])
def test_drawn_weights_and_tokens(size, draws):
    law = random_law(size, 2)
    good = set(range(0, size, 3))
    z = float(law[sorted(good)].sum())
    torch.manual_seed(3)
    counts, weights, tests = torch.zeros(size), torch.empty(draws, dtype=torch.float64), 0
    for i in range(draws):
        asked: list[int] = []
        token, weights[i] = adaptive(law, lambda t, asked=asked: asked.append(t) or t in good)
        counts[token] += 1
        tests += len(asked)
    assert abs(weights.mean() - z) < 3 * weights.std() / math.sqrt(draws)
    exact = torch.tensor([float(law[i]) / z if i in good else 0.0 for i in range(size)])
    assert float(counts[exact == 0].sum()) == 0
    misfit = float(((counts - draws * exact) ** 2 / (draws * exact))[exact > 0].sum())
    assert chi2.sf(misfit, len(good) - 1) > 1e-3
    if draws >= 1_500 * size:  # or the distance is that of sampling alone
        assert 0.5 * float((counts / draws - exact).abs().sum()) < 0.01
    assert tests < draws * size / 2


def test_without_a_constraint_the_weight_is_one():
    law = random_law(300, 4)
    for _ in range(50):
        assert adaptive(law, lambda t: True)[1] == 1.0
    assert masked(law, lambda t: True)[1] == 1.0


def test_tests_do_not_grow_with_the_vocabulary():
    """Uniform law, every second token allowed: the first of K among V comes after (V + 1) / (K + 1) tests, and one more is made."""
    for size in (50, 5000):
        good, asked = set(range(0, size, 2)), []
        law = torch.full((size,), 1 / size, dtype=torch.float64)
        torch.manual_seed(5)
        for _ in range(1500):
            before = len(asked)
            adaptive(law, lambda t: asked.append(t) or t in good)  # noqa: B023
            assert len(asked) - before >= 2
        expected = (size + 1) / (len(good) + 1) + 1
        assert abs(len(asked) / 1500 - expected) < 3 * math.sqrt(2 / 1500)  # a geometric number's variance is 2 at 1/2


def test_a_sharp_law_loses_no_digits():
    """Nearly all the mass is rejected: w = what is left, which 1 - sum would round away."""
    law = torch.zeros(200, dtype=torch.float64)
    law[7], law[150] = 1.0, 1e-30
    for rule in (adaptive, masked):
        token, weight = rule(law, lambda t: t == 150)
        assert token == 150 and (weight == pytest.approx(1e-30) if rule is masked else weight < 1e-15)
    assert adaptive(law, lambda t: t == 3) == masked(law, lambda t: t == 3) == likeliest(law, lambda t: t == 3) == (None, 0.0)  # p = 0


def test_masking_tests_all_and_greedy_tests_from_the_top():
    law = random_law(1000, 6)
    good = set(range(0, 1000, 7))
    asked: list[int] = []
    token, weight = masked(law, lambda t: asked.append(t) or t in good)
    assert token in good and weight == pytest.approx(float(law[sorted(good)].sum())) and asked == list(range(1000))
    best = max(good, key=lambda t: float(law[t]))
    above = int((law > law[best]).sum())
    asked.clear()
    assert likeliest(law, lambda t: asked.append(t) or t in good) == (best, 1.0) and len(asked) == above + 1
    assert masked(law, lambda t: t in good, sample=False)[0] == best
    ties = torch.full((300,), 1 / 300, dtype=torch.float64)
    assert likeliest(ties, lambda t: t in (120, 130))[0] == 120
    rare = int(law.argmin())
    assert likeliest(law, lambda t: t == rare)[0] == rare


def language(seed: int) -> set[str]:
    random_ = random.Random(seed)
    return {"".join(random_.choice("ab1 é\n") for _ in range(random_.randint(1, 6))) for _ in range(random_.randint(1, 12))}


@pytest.mark.parametrize("particles, sample", [(1, False), (1, True), (4, True)])
def test_never_violates_a_random_language(particles, sample):
    target, tokenizer = tiny("llama"), tiny_tokenizer()
    for seed in range(8):
        words = language(seed)

        def says(said: str, words=words) -> str:
            if not any(word.startswith(said) for word in words):
                return "dead"
            longer = any(word.startswith(said) and word != said for word in words)
            return ("complete" if longer else "final") if said in words else "viable"

        torch.manual_seed(seed)
        ids = torch.tensor([[5, 6, 7]])
        method = AWRS(check=says, particles=particles)
        with bind(target, decode=method, tokenizer=tokenizer):
            out = target.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=sample, max_new_tokens=12, return_dict_in_generate=True
            )
        for new in out.particles[0]:
            whole = tokenizer.decode([t for t in new if t != 0])
            assert whole in words if new[-1] == 0 else any(word.startswith(whole.rstrip("�")) for word in words), (words, whole)


@pytest.mark.parametrize("seed", range(4))
def test_never_violates_a_random_expression(seed):
    pytest.importorskip("llguidance")
    random_ = random.Random(seed)
    parts = [random_.choice(["[0-9]{1,3}", "(foo|bar|b)", "-?", "é{1,2}", "[^a-z]{2}", " "]) for _ in range(4)]
    regex = "".join(parts)
    target, tokenizer = tiny("llama"), tiny_tokenizer()
    torch.manual_seed(seed)
    ids = torch.tensor([[5, 6, 7]])
    with bind(target, decode=AWRS(regex=regex, particles=3), tokenizer=tokenizer):
        out = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=40, return_dict_in_generate=True)
    assert out.log_evidence.item() > -math.inf
    for new in out.particles[0]:
        assert new[-1] == 0 and re.fullmatch(regex, tokenizer.decode(new[:-1]), re.DOTALL), tokenizer.decode(new)


PROMPT = '"""Read a file."""\nimport os\n\n\ndef read(path):\n    return '
OBJECT = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


def brackets(said: str) -> str:
    """Every bracket is closed by its own kind, and nothing else is looked at."""
    left: list[str] = []
    for letter in said:
        if letter in "([{":
            left.append(")]}"["([{".index(letter)])
        elif letter in ")]}" and (not left or left.pop() != letter):
            return "dead"
    return "viable" if left else "complete"


@pytest.fixture(scope="module")
def embedded():
    loaded = load("embedded")
    return loaded.model, loaded.tokenizer


def evaluations_per_token(embedded, method: AWRS, most: int) -> tuple[float, list[str]]:
    model, tokenizer = embedded
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(9)
    with bind(model, decode=method, tokenizer=tokenizer):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=most, return_dict_in_generate=True)
    tokens = sum(len(new) for new in out.particles[0])
    return float(out.evaluations.sum()) / tokens, [tokenizer.decode(new, skip_special_tokens=True) for new in out.particles[0]]


METHODS = {
    "check": (AWRS(check=brackets, particles=2), 24),
    "regex": ({"regex": r"\[[0-9]{1,2}(, [0-9]{1,2}){0,3}\]", "particles": 2}, 24),
    "schema": ({"schema": json.dumps(OBJECT), "particles": 2}, 60),
}


@pytest.mark.parametrize("kind", METHODS)
def test_ten_times_fewer_evaluations_than_masking(kind, embedded):
    """On the vocabulary of 4,096 tokens of the embedded model; masking makes one for every token that is no special one."""
    if kind != "check":
        pytest.importorskip("llguidance")
    given, most = METHODS[kind]
    method = given if isinstance(given, AWRS) else AWRS(**given)
    per_token, texts = evaluations_per_token(embedded, method, most)
    print(f"{kind}: {per_token:.1f} evaluations per token; {texts}")
    vocab = embedded[0].config.vocab_size
    assert vocab >= 4000
    assert 1.0 <= per_token <= vocab / 10
    if kind == "check":
        masking, _ = evaluations_per_token(embedded, AWRS(check=brackets, tests="all"), 3)
        assert vocab - 100 < masking <= vocab


def begins_text(given: bytes) -> bool:
    """Whether some text begins with these bytes: none to three more make it one."""
    try:
        given.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


@torch.no_grad()
def test_greedy_is_the_likeliest_allowed_token():
    target, tokenizer = tiny("llama", eos_token_id=None, bos_token_id=None), tiny_tokenizer()
    ids = torch.tensor([[5, 6, 7]])
    method = AWRS(check=lambda said: "dead" if "e" in said else "complete")
    found = [
        target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            **AWRS(check=method.check, tests=tests).arguments(target, tokenizer),
        )[0].tolist()
        for tests in ("adaptive", "all")
    ]
    said, spelled = ids[0].tolist(), pieces(tokenizer, 320)
    for _ in range(12):
        logits = target(torch.tensor([said])).logits[0, -1]
        bytes_of = [spelled[i] for i in said[3:]]
        good = [i for i in range(2, len(tokenizer)) if b"e" not in spelled[i] and begins_text(b"".join([*bytes_of, spelled[i]]))]
        said.append(max(good, key=lambda i: float(logits[i])))
    assert found == [said, said]


def test_recipe_text_and_what_is_refused():
    assert text(parse("awrs(regex='[0-9]{3}-[0-9]{4}', particles=4)", "decode")) == "awrs(regex='[0-9]{3}-[0-9]{4}', particles=4)"
    check(AWRS(check=brackets))
    for bad in (
        "awrs",
        "awrs(regex='a', schema='b')",
        "awrs(regex='a', particles=0)",
        "awrs(regex='a', ess=1.5)",
        "awrs(regex='a', tests='some')",
    ):
        with pytest.raises(SmeltError):
            parse(bad, "decode")
    with pytest.raises(SmeltError, match="which bytes"):
        AWRS(check=brackets).arguments(tiny("llama"), None)
