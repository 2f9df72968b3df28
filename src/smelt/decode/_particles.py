"""Weighted texts written side by side under a constraint: the loop of sequential Monte Carlo, as transformers' `custom_generate`.

Each of N particles takes a token that the constraint allows and multiplies its weight by an unbiased estimate of how much
of the model's law the constraint left. (sum w)^2 / sum w^2 < ess N: all are drawn anew in proportion to their weights
(systematic resampling: the expected number of copies is N w / sum w), and each gets the mean weight. A text ends with an
end token, which needs a complete text, or is cut (length, stopping criteria), and then counts if it is complete as it stands.

So the mean weight has the expectation Z = P(plain sampling with the same processors and the same limits gives a complete
text), and the weighted particles stand for the law of those texts. Rows of a batch are written one after the other.

Cost per step: one call of the model over the particles still writing; their cache rows are copied when some were drawn anew
or have ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from smelt.decode._constraint import State
from smelt.decode._loop import Row, Written, looped
from smelt.spec import SmeltError

__all__ = ["Particles", "Rule", "Weighted", "constrained", "resampled"]

Rule = Callable[[Tensor, Callable[[int], bool]], tuple[int | None, float]]  # (law [V] float64, is it allowed) -> (token or none, weight)


@dataclass
class Weighted(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` gives. `sequences` holds one particle per row, drawn by the weights.

    `log_evidence` [rows] is ln of an unbiased estimate of Z; -inf where no particle came to a complete text, and the row
    of `sequences` then is not one. Under greedy search both it and `log_weights` are None.
    """

    particles: list[list[list[int]]] | None = None  # [rows][N] new tokens
    log_weights: Tensor | None = None  # [rows, N] float64
    log_evidence: Tensor | None = None  # [rows] float64
    evaluations: Tensor | None = None  # [rows] how many tokens the constraint was asked about


class _Node:
    """A state of the constraint and what is known of the tokens after it. Particles with the same text share it."""

    def __init__(self, state: State, spelled: Sequence[bytes | None], ends: set[int]):
        self.state, self.spelled, self.ends = state, spelled, ends
        self.known: dict[int, bool] = {}
        self.next: dict[int, _Node] = {}
        self.asked = 0

    def allowed(self, token: int) -> bool:
        if token in self.ends:
            return self.state.verdict != "viable"
        if token not in self.known:
            piece = self.spelled[token]
            self.asked += piece is not None
            self.known[token] = piece is not None and self.state.allows(piece)
        return self.known[token]

    def after(self, token: int) -> _Node:
        if token not in self.next:
            piece = self.spelled[token]
            assert piece is not None
            self.next[token] = _Node(self.state.after(piece), self.spelled, self.ends)
        return self.next[token]


@dataclass
class _Particle:
    node: _Node
    new: list[int] = field(default_factory=list)
    log_weight: float = 0.0
    row: int = 0  # of the last call of the model
    writes: bool = True
    counts: bool = True  # not cut in the middle of a text

    @property
    def log_now(self) -> float:
        return self.log_weight if self.counts else -math.inf

    def copied(self, log_weight: float) -> _Particle:
        return _Particle(self.node, list(self.new), log_weight, self.row, self.writes, self.counts)


@dataclass
class Particles:
    """One row's answer."""

    chosen: list[int]
    all: list[list[int]]
    log_weights: list[float]
    evaluations: int
    dead: bool  # every particle came to where no token is allowed
    cache: Any

    @property
    def log_evidence(self) -> float:
        return _log_mean(self.log_weights)


def constrained(
    start: Callable[[], State], spelled: Sequence[bytes | None], drawn: Rule, greedy: Rule, count: int, ess: float
) -> Callable[..., Any]:
    """What `generate` takes as custom_generate. Of several particles a streamer sees the chosen one, at the end."""

    def refuse(config: Any) -> None:
        if count > 1 and not config.do_sample:
            raise SmeltError(f"awrs: {count} particles under greedy search would all be the same text; set do_sample=True or particles=1")

    def write(model: Any, row: Row) -> Written:
        made = _Swarm(model, row, drawn if row.choice.sample else greedy, spelled).write(start(), count, ess)
        return Written(made.chosen, made.cache if count == 1 else None, about=made)

    def result(sequences: Tensor, rows: list[Written], config: Any) -> Any:
        made: list[Particles] = [row.about for row in rows]
        if not config.return_dict_in_generate:
            for dead in (one for one in made if one.dead):
                raise SmeltError(
                    f"awrs: the constraint allows no token that the model and its logits processors leave, after {len(dead.chosen)} "
                    "new tokens; take off top_k, top_p and min_p, give it more particles, or let the constraint see dead ends earlier"
                )
            return sequences
        asked: dict[str, Any] = {"sequences": sequences, "particles": [one.all for one in made]}
        asked["evaluations"] = torch.tensor([one.evaluations for one in made])
        if config.do_sample:
            asked["log_weights"] = torch.tensor([one.log_weights for one in made], dtype=torch.float64)
            asked["log_evidence"] = torch.tensor([one.log_evidence for one in made], dtype=torch.float64)
        return Weighted(past_key_values=rows[0].cache if len(rows) == 1 else None, **asked)

    return looped("awrs", write, scores=False, refuse=refuse, result=result)


class _Swarm:
    """One prompt while its particles are written."""

    def __init__(self, model: Any, row: Row, rule: Rule, spelled: Sequence[bytes | None]):
        self.model, self.row, self.rule, self.spelled, self.cache = model, row, rule, spelled, row.cache
        self.ends = row.ends

    def write(self, state: State, count: int, ess: float) -> Particles:
        root = _Node(state, self.spelled, self.ends)
        swarm = [_Particle(root) for _ in range(count)]
        evaluations, batch = 0, 0
        while active := [one for one in swarm if one.writes]:
            logits = self._read(active, batch)
            batch = len(logits)
            by_row = {one.row: one for one in active}
            laws = _laws(self.row.choice.scores([self.row.text + by_row[row].new for row in range(batch)], logits))
            nodes = {id(one.node): one.node for one in active}
            before = sum(node.asked for node in nodes.values())
            for one in active:
                self._step(one, laws[one.row])
            evaluations += sum(node.asked for node in nodes.values()) - before
            if count == 1 and active[0].log_weight > -math.inf:
                self.row.show(active[0].new[-1:])
            if any(one.writes for one in swarm):
                swarm = _anew(swarm, ess)
        return self._answer(swarm, evaluations)

    def _read(self, active: list[_Particle], batch: int) -> Tensor:
        """Logits [rows, V] of the next token; all particles share one row of the prompt's call."""
        if not batch:
            known = self.cache.get_seq_length() if self.cache is not None else 0
            ids = torch.tensor([self.row.text[known:]], device=self.row.prompt.device)
        else:
            rows = [one.row for one in active]
            if rows != list(range(batch)):
                self.cache.batch_select_indices(torch.tensor(rows, device=self.row.prompt.device))
            for at, one in enumerate(active):
                one.row = at
            ids = torch.tensor([[one.new[-1]] for one in active], device=self.row.prompt.device)
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, return_dict=True)
        self.cache = out.past_key_values
        return out.logits[:, -1]

    def _step(self, one: _Particle, law: Tensor) -> None:
        """One more token and its weight, or the end."""
        if one.node.state.verdict == "final" and self.ends:  # nothing to ask: only an end token may follow
            ends = sorted(self.ends)
            weight = float(law[ends].sum())
            token = ends[int(torch.multinomial(law[ends], 1))] if weight > 0 else None
        else:
            token, weight = self.rule(law, one.node.allowed)
        one.log_weight += math.log(weight) if weight > 0 and token is not None else -math.inf
        if token is None or weight <= 0:
            one.writes = False
            return
        one.new.append(token)
        if token in self.ends:
            one.writes = False
            return
        one.node = one.node.after(token)
        verdict = one.node.state.verdict
        if len(one.new) >= self.row.room or (verdict == "final" and not self.ends) or self.row.stops(one.new):
            one.writes, one.counts = False, verdict != "viable"

    def _answer(self, swarm: list[_Particle], evaluations: int) -> Particles:
        weights = [one.log_now for one in swarm]
        shown = weights if max(weights) > -math.inf else [one.log_weight for one in swarm]  # none complete: one that was cut
        dead = max(shown) == -math.inf
        law = torch.tensor([math.exp(w - max(shown)) if not dead else 1.0 for w in shown], dtype=torch.float64)
        chosen = swarm[int(torch.multinomial(law, 1))] if len(swarm) > 1 else swarm[0]
        if len(swarm) > 1 and not dead:
            self.row.show(chosen.new)
        return Particles(chosen.new, [one.new for one in swarm], weights, evaluations, dead, self.cache)


def _laws(scores: Tensor) -> Tensor:
    """Probabilities in float64; all zero where the processors left nothing."""
    scores = scores.double()
    return scores.softmax(-1).nan_to_num(0.0) if torch.isneginf(scores).all(-1).any() else scores.softmax(-1)


def _log_mean(logs: Sequence[float]) -> float:
    top = max(logs)
    return top if top == -math.inf else top + math.log(sum(math.exp(one - top) for one in logs) / len(logs))


def resampled(log_weights: Sequence[float], ess: float) -> list[int] | None:
    """The ancestor of each particle, in order, by systematic resampling; None while (sum w)^2 >= ess N sum w^2, or when all are dead."""
    top = max(log_weights)
    if top == -math.inf:
        return None
    weights = torch.tensor([math.exp(one - top) for one in log_weights], dtype=torch.float64)
    if float(weights.sum() ** 2 / (weights**2).sum()) >= ess * len(weights):
        return None
    edges = weights.cumsum(0) / weights.sum()
    teeth = (torch.arange(len(weights), dtype=torch.float64) + torch.rand((), dtype=torch.float64)) / len(weights)
    return torch.searchsorted(edges, teeth, right=True).clamp(max=int(weights.nonzero()[-1])).tolist()


def _anew(swarm: list[_Particle], ess: float) -> list[_Particle]:
    ancestors = resampled([one.log_now for one in swarm], ess)
    if ancestors is None:
        return swarm
    mean = _log_mean([one.log_now for one in swarm])
    return [swarm[at].copied(mean) for at in ancestors]
