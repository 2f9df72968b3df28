from __future__ import annotations

import functools
import inspect
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import smelt._train_loop
from smelt.data._tokens import tokenize
from smelt.data.files import Files
from smelt.distill import Equipped
from smelt.distill._alignment import END, distances, nearest, pieces, ranked, shared, spans, warped
from smelt.distill.dskd import DSKD
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.mined import MinED
from smelt.distill.uld import ULD
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model.mistral import byte_level_bpe
from smelt.spec import SmeltError
from smelt.train import Training, teach

TEXT = "def f(x):\n\treturn x**2  # naïve 数学 🙂\n"


def slow_distance(a, b):
    @functools.cache
    def between(i, j):
        if not i or not j:
            return i + j
        return min(between(i - 1, j) + 1, between(i, j - 1) + 1, between(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return between(len(a), len(b))


def test_pieces_of_a_byte_level_tokenizer_spell_the_text():
    tokenizer = tiny_tokenizer()
    made = pieces(tokenizer, 400)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(made[i] for i in ids) == TEXT.encode()
    assert made[tokenizer.eos_token_id] == END
    assert made[tokenizer.pad_token_id] == b""
    assert made[len(tokenizer) :] == [b""] * (400 - len(tokenizer))
    assert {bytes([b]) for b in range(256)} <= set(made)


def test_pieces_of_a_sentencepiece_vocabulary():
    table = {"</s>": 0, "<unk>": 1, "<0x0A>": 2, "\u2581the": 3, "x": 4, "é": 5, "[user]": 6}
    tokenizer = SimpleNamespace(
        all_special_ids=[0, 1], eos_token_id=0, get_vocab=lambda: table, get_added_vocab=lambda: {"[user]": 6}
    )  # fmt: skip
    assert pieces(tokenizer, 8) == [END, b"", b"\n", b" the", b"x", "é".encode(), b"[user]", b""]


def test_distances_equal_the_recursion():
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 100, random.integers(0, 9)).tolist()) for _ in range(40)] + [b"", b"abc" * 21 + b"a"]
    found = distances(words, words[5:])
    for (i, a), (j, b) in itertools.product(enumerate(words), enumerate(words[5:])):
        assert found[i, j] == slow_distance(a, b), (a, b)


def test_nearest_prefers_the_same_token_then_the_fewest_changes():
    student = [END, b"", b"a", b"ret", b"return", b" the", b"xy"]
    teacher = [b"return", b"", b"returns", b" then", END, b"xx", b"reu"]
    assert shared(teacher, student).tolist() == [4, -1, -1, -1, 0, -1, -1]
    found = nearest(teacher, student).tolist()
    assert found == [4, -1, 4, 5, 0, 6, 3]
    for at, token in enumerate(teacher):
        if token and token != END:
            best = min(slow_distance(token, other) for other in student if other and other != END)
            assert slow_distance(token, student[found[at]]) == best


def test_ranked_pairs_the_kept_positions_in_their_order():
    made = torch.Generator().manual_seed(0)
    keep, other = torch.rand(6, 9, generator=made) < 0.6, torch.rand(6, 7, generator=made) < 0.5
    found = ranked(keep, other)
    for row in range(6):
        theirs = torch.nonzero(other[row]).flatten().tolist()
        expected = [-1] * 9
        for k, at in enumerate(torch.nonzero(keep[row]).flatten().tolist()):
            expected[at] = theirs[k] if k < len(theirs) else -1
        assert found[row].tolist() == expected


def test_spans_say_where_the_next_token_starts():
    lengths = torch.tensor([3, 1, 2])
    assert spans(torch.tensor([[0, 2, 1]]), lengths).tolist() == [[3, 5, 6]]


def slow_path(cost):
    """(cost of the cheapest path, every cheapest path as a set of pairs) by trying all."""
    n, m = cost.shape

    @functools.cache
    def after(i, j):
        if (i, j) == (n - 1, m - 1):
            return cost[i, j], [((i, j),)]
        steps = [after(i + a, j + b) for a, b in ((1, 1), (1, 0), (0, 1)) if i + a < n and j + b < m]
        best = min(step[0] for step in steps)
        return cost[i, j] + best, [((i, j), *path) for total, paths in steps if total == best for path in paths]

    return after(0, 0)


def test_warped_follows_a_cheapest_path():
    random = np.random.default_rng(1)
    for n, m in ((1, 1), (1, 4), (5, 1), (4, 6), (6, 4), (5, 5)):
        cost = random.integers(0, 9, (3, n, m)).astype(np.int32)
        rows, columns = random.integers(1, n + 1, 3), random.integers(1, m + 1, 3)
        found = warped(cost, rows, columns)
        for b in range(3):
            _, paths = slow_path(cost[b, : rows[b], : columns[b]])
            ways = []
            for path in paths:
                visited = [[j for i, j in path if i == at] for at in range(n)]
                ways.append([v[0] if len(v) == 1 else -1 for v in visited])
            assert found[b].tolist() in ways


def test_warped_takes_the_diagonal_of_equals_and_nothing_of_an_empty_row():
    cost = np.zeros((3, 4, 4), np.int32)
    found = warped(cost, np.array([4, 0, 2]), np.array([4, 3, 0]))
    assert found.tolist() == [[0, 1, 2, 3], [-1] * 4, [-1] * 4]


@pytest.mark.parametrize("word", [b"", b"a" * 64, b"a" * 80])
def test_long_words_count_their_first_64_bytes(word):
    assert distances([word], [b"b" * 70])[0, 0] == 64
    assert distances([word], [word])[0, 0] == 0


# two tokenizers, whole trainings


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for index, file in enumerate(sorted(Path(inspect.__file__).parent.glob("*.py"))[:20]):
        (folder / f"{index}.txt").write_text(file.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return Files(str(folder / "*.txt"), validation=0.2, test=0.2)


def sides(folder, corpus):
    """A student and a teacher of another tokenizer and another width, and the student's ids."""
    foreign = byte_level_bpe([Path(inspect.__file__).read_text(encoding="utf-8")[:20_000]], 400, 256)
    student = Loaded(tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1), tiny_tokenizer(), folder)
    teacher = Loaded(tiny(layers=1, hidden=24, ffn=24, heads=2, kv_heads=1, vocab=400, seed=7), foreign, folder)
    return student, teacher, tokenize(corpus, "train", student.tokenizer, folder / "tokens")


def trained(method, folder, corpus, monkeypatch, **more):
    student, teacher, tokens = sides(folder, corpus)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    settings = Training(**{"tokens": 5 * 4 * 32, "context": 32, "batch": 4, "lr": 1e-2, "save_seconds": 1e9, **more})
    kept = {}
    if isinstance(method, Equipped):
        make = type(method).equipment

        def keeping(self, *pair):
            kept["made"] = make(self, *pair)
            return kept["made"]

        monkeypatch.setattr(type(method), "equipment", keeping)
    log = teach(student, teacher, tokens, method, settings, folder / "run", seed=1)
    monkeypatch.undo()
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    return student.model.state_dict(), kept["made"].state_dict() if kept else {}, log


FOREIGN = [ULD(), MinED(), DSKD(alignment="cma"), DSKD(version="v2", alignment="eta")]


@pytest.mark.parametrize("method", FOREIGN, ids=["uld", "mined", "cma", "eta"])
def test_a_student_learns_from_a_teacher_of_another_tokenizer_killed_or_not(method, tmp_path, corpus, monkeypatch):
    model, made, log = trained(method, tmp_path / "whole", corpus, monkeypatch)
    start = tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1).state_dict()
    assert any(not torch.equal(model[name], start[name]) for name in start)
    assert log["log"][-1]["loss"] < log["log"][0]["loss"]
    ended = smelt._train_loop._Watch.on_step_end

    def killed(self, args, state, control, **kwargs):
        ended(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(smelt._train_loop, "SAVING", 1e9)
        patch.setattr(smelt._train_loop._Watch, "on_step_end", killed)
        student, teacher, tokens = sides(tmp_path / "cut", corpus)
        settings = Training(tokens=5 * 4 * 32, context=32, batch=4, lr=1e-2, save_seconds=1e-9)
        teach(student, teacher, tokens, method, settings, tmp_path / "cut" / "run", seed=1)
    again, made_again, log = trained(method, tmp_path / "cut", corpus, monkeypatch)
    assert log["resumed_at"] == 3
    assert set(made) == set(made_again)
    for whole, resumed in ((model, again), (made, made_again)):
        for name in whole:
            assert torch.equal(whole[name], resumed[name]), name


@pytest.mark.parametrize("method", [ForwardKL(), DSKD(), DSKD(version="v2")], ids=["forward_kl", "dskd", "v2"])
def test_objectives_of_one_vocabulary_refuse_such_a_teacher_in_one_line(method, tmp_path, corpus):
    student, teacher, tokens = sides(tmp_path, corpus)
    with pytest.raises(SmeltError, match=r"the tokenizers differ.*needs a teacher of the same vocabulary") as said:
        teach(student, teacher, tokens, method, Training(tokens=128, context=32, batch=4), tmp_path / "run")
    assert "\n" not in str(said.value)
