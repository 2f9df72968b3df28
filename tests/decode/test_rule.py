"""The rules on a vocabulary of six: frequencies of many draws against p, and wrong rules that must not pass."""

from __future__ import annotations

import pytest
import torch

from smelt.decode._rule import drawn, keep_chain, keep_tree

V, TRIALS = 6, 12_000
P = torch.tensor([0.35, 0.25, 0.2, 0.1, 0.07, 0.03])
Q = torch.tensor([0.05, 0.45, 0.1, 0.25, 0.05, 0.1])
NEXT = torch.stack([P.roll(i) for i in range(V)])  # p of the second token, after each first


def distance(counts: torch.Tensor, law: torch.Tensor) -> float:
    return 0.5 * float((counts / counts.sum() - law).abs().sum())


def pairs(draft, sure=False, twist=1.0, trials=TRIALS):
    """Counts [V, V] of the first two tokens; the second is drawn from p when the round ended after one."""
    torch.manual_seed(3)
    counts = torch.zeros(V, V)
    for _ in range(trials):
        tokens, law = draft()
        scores = torch.stack([P, NEXT[tokens[0]], NEXT[tokens[1]]]).log()
        kept, token = keep_chain(tokens, scores, None if sure else law / twist, True)
        said = [*tokens[:kept].tolist(), token]
        if len(said) == 1:
            said.append(int(drawn(NEXT[said[0]])))
        counts[said[0], said[1]] += 1
    return counts


def sampled():
    first = drawn(Q)
    return torch.stack([first, drawn(Q)]), torch.stack([Q, Q])


def best():
    return torch.tensor([1, 1]), torch.stack([Q, Q])  # arg max q


JOINT = P[:, None] * NEXT


@pytest.mark.parametrize("draft, sure", [(sampled, False), (best, True), (sampled, True)])
def test_a_chain_has_the_law_of_the_target(draft, sure):
    counts = pairs(draft, sure)
    assert distance(counts.sum(1), P) < 0.02
    expected = JOINT * TRIALS
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 35 + 5 * (2 * 35) ** 0.5  # 35 degrees of freedom: five standard deviations


def test_wrong_rules_are_caught():
    """An arg-max draft taken for a draw from q; acceptance with twice the chance."""
    assert distance(pairs(best, trials=TRIALS // 3).sum(1), P) > 0.05
    assert distance(pairs(sampled, twist=2.0, trials=TRIALS // 3).sum(1), P) > 0.05


def test_acceptance_is_the_overlap():
    torch.manual_seed(0)
    scores = torch.stack([P, P]).log()
    kept = sum(keep_chain(drawn(Q)[None], scores, Q[None], True)[0] for _ in range(TRIALS)) / TRIALS
    a = float(torch.minimum(P, Q).sum())
    assert abs(kept - a) < 3 * (a * (1 - a) / TRIALS) ** 0.5


def test_a_draft_with_the_law_of_the_target_is_always_kept():
    torch.manual_seed(0)
    for _ in range(200):
        tokens = torch.stack([drawn(P), drawn(P)])
        assert keep_chain(tokens, torch.stack([P, P, P]).log(), torch.stack([P, P]), True)[0] == 2


@pytest.mark.parametrize("children", [1, 3])
@pytest.mark.parametrize("sure", [False, True])
def test_a_tree_has_the_law_of_the_target(children, sure):
    """k draws from q at the root and k below each, or different tokens that are certain of themselves."""
    torch.manual_seed(5)
    parents = [-1] * children + [i for i in range(children) for _ in range(children)]
    first, both = torch.zeros(V), torch.zeros(V, V)
    deep = 0
    for _ in range(TRIALS // 2):
        some = torch.cat([torch.randperm(V)[:children] for _ in range(1 + children)])
        tokens = some if sure else drawn(Q.expand(len(parents), V))
        scores = torch.stack([P, *(NEXT[t] for t in tokens[:children].tolist()), *(P for _ in parents[children:])]).log()
        path, token = keep_tree(tokens, parents, scores, None if sure else Q.expand(len(parents), V), True)
        said = [*tokens[path].tolist(), token]
        assert all(parents[b] == a for a, b in zip([-1, *path], path, strict=False))
        deep += len(path) > 1
        if len(said) == 1:
            said.append(int(drawn(NEXT[said[0]])))
        first[said[0]] += 1
        both[said[0], said[1]] += 1
    assert distance(first, P) < 0.02 and deep > 100
    expected = JOINT * (TRIALS // 2)
    assert ((both - expected) ** 2 / expected).sum() < 35 + 5 * (2 * 35) ** 0.5


def test_greedy_follows_the_arg_max():
    scores = torch.eye(V)[[2, 4, 1, 0]]
    assert keep_chain(torch.tensor([2, 4, 3]), scores, None, False) == (2, 1)
    assert keep_chain(torch.tensor([2, 4, 1]), scores, None, False) == (3, 0)
    assert keep_chain(torch.tensor([1, 4, 1]), scores, None, False) == (0, 2)
    assert keep_chain(torch.empty(0, dtype=torch.long), scores[:1], None, False) == (0, 2)
    parents = [-1, -1, 1, 1, 3]  # 0: 5; 1: 2; 2: 0, 3: 4 below 1; 4: 1 below 3
    scores = torch.eye(V)[[2, 0, 4, 0, 1, 3]]
    assert keep_tree(torch.tensor([5, 2, 0, 4, 1]), parents, scores, None, False) == ([1, 3, 4], 3)


def test_nothing_left_falls_back_to_the_target():
    """p = q up to rounding, and a draft refused all the same: the residual is all zero."""
    law = torch.tensor([[0.5, 0.5]])
    for _ in range(50):
        kept, token = keep_chain(torch.tensor([0]), torch.tensor([[0.0, 0.0], [0.0, 0.0]]), 2 * law, True)
        assert kept in (0, 1) and token in (0, 1)
