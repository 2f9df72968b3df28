from __future__ import annotations

import itertools
import math
import random

import pytest

from smelt.evolution import evolve
from smelt.journal import Journal
from smelt.spec import SmeltError

SIZE = 6


def flip(bits, rng):
    """One or two places of a bit string changed."""
    made = list(bits)
    for at in rng.sample(range(len(made)), rng.randint(1, 2)):
        made[at] = 1 - made[at]
    return made


def table(seed, size=SIZE):
    """A random fitness over all bit strings, with `noise` of the first stage."""
    draw = random.Random(seed)
    last = {bits: draw.random() for bits in itertools.product((0, 1), repeat=size)}
    first = {bits: value + draw.gauss(0, 0.3) for bits, value in last.items()}
    return lambda bits, stage: (first, last)[stage][tuple(bits)]


SETTINGS = {"offspring": 5, "survivors": [2, 1], "generations": 12, "seed": 3}


def test_the_parent_never_gets_worse_and_is_the_best_of_what_reached_the_last_stage():
    for seed in range(5):
        fitness, reached, parents = table(seed), [], []

        def watched(bits, stage, fitness=fitness, reached=reached):
            if stage == 1:
                reached.append((fitness(bits, 1), bits))
            return fitness(bits, stage)

        found = evolve([[0] * SIZE], flip, watched, **SETTINGS, each=lambda g, c, f, parents=parents: parents.append((g, c, f)))
        assert all(a >= b for a, b in itertools.pairwise(found.history)) and found.history[-1] < found.history[0]
        assert found.fitness == min(reached)[0] == fitness(found.candidate, 1) == found.history[-1]
        assert [g for g, _, _ in parents] == list(range(13)) and [f for _, _, f in parents] == found.history
        assert all(fitness(c, 1) == f for _, c, f in parents)


def test_the_first_stage_chooses_among_the_offspring_only():
    """A parent that looks worst in the first stage stays all the same while nothing is better in the last."""
    best = [0] * SIZE
    found = evolve([best], flip, lambda bits, stage: (sum(bits), -sum(bits))[1 - stage], **SETTINGS)
    assert found.candidate == best and set(found.history) == {0.0}
    turned = evolve([best], flip, lambda bits, stage: -sum(bits), **SETTINGS)
    assert turned.fitness < 0.0


def test_each_stage_measures_what_the_one_before_kept():
    """Against the algorithm written out without the bookkeeping, on the same draws."""
    for seed in range(4):
        fitness = table(seed)
        parent = [0] * SIZE
        for generation in range(1, 9):
            rng, children = random.Random(f"7/{generation}"), []
            while len(children) < 4:
                child = flip(parent, rng)
                if child != parent and child not in children:
                    children.append(child)
            kept = sorted(children, key=lambda bits: fitness(bits, 0))[:2]
            parent = min([*kept, parent], key=lambda bits: fitness(bits, 1))
        settings = {"offspring": 4, "survivors": [2, 1], "generations": 8, "seed": 7}
        assert evolve([[0] * SIZE], flip, fitness, **settings).candidate == parent


def test_no_candidate_is_measured_twice_in_a_stage_and_the_calls_are_counted():
    asked = []
    found = evolve([[0] * 12], flip, lambda bits, stage: (asked.append((tuple(bits), stage)), table(0, 12)(bits, stage))[1], **SETTINGS)
    assert len(asked) == len(set(asked))
    assert found.calls == [sum(stage == s for _, stage in asked) for s in (0, 1)]
    assert found.calls[0] <= 1 + 12 * 5 and found.calls[1] <= 1 + 12 * 2


def test_an_offspring_equal_to_the_parent_is_drawn_again():
    def lazy(bits, rng):
        return list(bits) if rng.random() < 0.7 else flip(bits, rng)

    assert evolve([[0] * SIZE], lazy, table(0), **SETTINGS | {"generations": 1}).calls[0] == 1 + 5


def test_a_small_neighbourhood_gives_a_small_generation_and_none_leaves_the_parent():
    seen = []
    evolve([[0]], lambda bits, rng: [1 - bits[0]], lambda bits, stage: seen.append(bits) or bits[0], **SETTINGS)
    assert seen == [[0], [0], [1], [1]] and len(seen) == 4
    same = evolve([[1, 2]], lambda bits, rng: list(bits), lambda bits, stage: 5.0, **SETTINGS)
    assert same.candidate == [1, 2] and same.history == [5.0] * 13


def test_no_generations_is_a_search_among_the_parents():
    every = [list(bits) for bits in itertools.product((0, 1), repeat=SIZE)]
    fitness = table(1)
    found = evolve(every, flip, lambda bits, stage: fitness(bits, 1), offspring=1, survivors=[1], generations=0, seed=0)
    assert found.fitness == min(fitness(bits, 1) for bits in every) and found.calls == [len(every)]


def test_an_equal_offspring_takes_the_place_of_its_parent():
    assert evolve([[0] * SIZE], flip, lambda bits, stage: 1.0, **SETTINGS).candidate != [0] * SIZE


def test_the_seed_decides():
    runs = [evolve([[0] * SIZE], flip, table(0), **SETTINGS | {"seed": seed, "generations": 2}) for seed in (1, 1, 2, 3, 4)]
    assert runs[0] == runs[1] and any(run.history != runs[0].history for run in runs[2:])


@pytest.mark.parametrize("lives", [1, 2, 4])
def test_a_search_that_was_killed_goes_on_at_its_generation(lives, tmp_path):
    fitness, wanted = table(2), evolve([(0,) * SIZE], lambda c, r: tuple(flip(c, r)), table(2), **SETTINGS)
    left, asked = [0], []

    def dying(bits, stage):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        asked.append((bits, stage))
        return fitness(bits, stage)

    def go():
        book = Journal(tmp_path / "search.jsonl")
        before = len(book)
        return before, evolve([(0,) * SIZE], lambda c, r: tuple(flip(c, r)), dying, **SETTINGS, journal=book, decode=tuple)

    for _ in range(lives):
        left[0] = 9
        with pytest.raises(KeyboardInterrupt):
            go()
    left[0] = -1
    asked.clear()
    before, found = go()
    assert found[:3] == wanted[:3] and isinstance(found.candidate, tuple)
    assert before == 0 or len(asked) == sum(found.calls) < sum(wanted.calls)
    asked.clear()
    assert go()[1][:3] == wanted[:3] and not asked, "a finished search asks for nothing"


def test_a_journal_serves_more_generations_and_refuses_another_search(tmp_path):
    book = Journal(tmp_path / "search.jsonl")
    wanted = evolve([[0] * SIZE], flip, table(2), **SETTINGS)
    evolve([[0] * SIZE], flip, table(2), **SETTINGS | {"generations": 4}, journal=book)
    assert evolve([[0] * SIZE], flip, table(2), **SETTINGS, journal=book)[:3] == wanted[:3]
    for change in ({"seed": 4}, {"offspring": 6}, {"survivors": [1, 1]}):
        with pytest.raises(SmeltError, match="other candidates"):
            evolve([[0] * SIZE], flip, table(2), **SETTINGS | change, journal=book)
    with pytest.raises(SmeltError, match="other candidates"):
        evolve([[1] * SIZE], flip, table(2), **SETTINGS, journal=book)


def test_out_of_bounds_is_infinite_and_not_a_number_is_refused(tmp_path):
    bound = evolve([[0] * SIZE], flip, lambda bits, stage: -sum(bits) if sum(bits) <= 3 else math.inf, **SETTINGS)
    assert bound.fitness == -3
    lost = [evolve([[0] * SIZE], flip, lambda bits, stage: math.inf, **SETTINGS, journal=Journal(tmp_path / "j.jsonl")) for _ in range(2)]
    assert lost[0][:3] == lost[1][:3] and lost[0].fitness == math.inf
    with pytest.raises(SmeltError, match=r"the fitness of \[0, 0, 0, 0, 0, 0\] in stage 0 is not a number"):
        evolve([[0] * SIZE], flip, lambda bits, stage: math.nan, **SETTINGS)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"survivors": [3, 2]}, "end with 1"),
        ({"survivors": []}, "end with 1"),
        ({"survivors": [1, 2, 1]}, "must fall"),
        ({"offspring": 0}, "offspring=0"),
        ({"generations": -1}, "generations=-1"),
    ],
)
def test_settings_that_contradict_each_other(change, said):
    with pytest.raises(SmeltError, match=said):
        evolve([[0]], flip, lambda bits, stage: 0.0, **SETTINGS | change)
    with pytest.raises(SmeltError, match="0 parents"):
        evolve([], flip, lambda bits, stage: 0.0, **SETTINGS)
