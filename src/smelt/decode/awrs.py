"""Text under a constraint that is asked about few tokens, with weights that say what the constraint cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from smelt.decode import Decoding
from smelt.decode._constraint import State, checked, installed, pieces, regular, schema
from smelt.decode._particles import Rule, constrained
from smelt.spec import Paper, SmeltError

__all__ = ["AWRS"]


@dataclass(frozen=True)
class AWRS(Decoding):
    """x ~ p without replacement until C(x); w = prod_rejected (1 - q_j) * (1 if C(next) else q_x), q_i = p(x_i) / (1 - sum_{j<i} p(x_j)).

    p [V] the model's law after the logits processors, C the constraint on text so far + token, Z = sum_{x in C} p(x). The
    token has exactly the law p(. | C) and E[w | x] = Z, whatever V is and without testing all of it. Over a text the
    weights multiply; `particles` texts at once with resampling where (sum w)^2 < ess N sum w^2 are sequential Monte Carlo
    for the model's law of whole texts given the constraint, which masking token by token misses: it walks into prefixes
    that are likely and have few valid endings. One particle is plain AWRS: masking's law at the price of few tests.

    C is one of `regex` (Rust's dialect, the whole text), `schema` (JSON schema: a file, or inline beginning with "{";
    both need the extra `grammar`) and, in Python, `check`: text so far -> "dead", "viable", "complete" (may end here) or
    "final" (must; spares testing every token for nothing). It is about the new text, not the prompt. An end token needs
    a complete text and no test. What is cut by length is viable and may be unfinished, as in any generation.

    `generate` gives the text, drawn by the weights; with return_dict_in_generate also `particles`, `log_weights`,
    `log_evidence` (ln of an unbiased estimate of the chance that plain sampling gives a complete text) and `evaluations`
    (tests made), see `_particles.Weighted`. Greedy search takes the likeliest allowed token and has no weights.

    Cost per token: N rows in one call of the model; 2 + rejected tests per particle, independent of V and growing with
    KL(p_C || p): a token that the constraint forces and the model does not expect may take hundreds. A test is some
    microseconds for regex and schema, so time follows where V is large or `check` is slow. tests="all" tests every token
    with p > 0 (token masking, w = Z with no variance) for comparison.

    top_k=0 is set, because transformers would cut p at 50 tokens. Other truncation (top_p, min_p) is applied first: p, Z and
    the weights are then those of the truncated law, and no token may be left.

    Raises SmeltError for none or several constraints, one that cannot be read or that no text satisfies, a tokenizer
    whose tokens are no fixed bytes, beams, several particles under greedy search, scores or states asked for; and
    where no allowed token is left for any particle (with return_dict_in_generate the weights say it instead).

    Differs from the paper: the recursive estimator only. The authors' code draws with replacement until a second accept
    where one token has more than 2/3 of the mass: with 0.9 on an allowed token that took 1.2 tests and not 2.0, at a
    variance of w / Z of 0.024 and not 0.005; with 0.9 on a refused one 4.4 and 3.8, at 1.7 and 1.5 (40 tokens, half
    of the others allowed). Systematic resampling; no twist or critic.
    """

    paper: ClassVar = Paper(
        "Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling",
        "arXiv:2504.05410",
        "algorithm 2 and SMC",
    )
    regex: str = ""
    schema: str = ""
    check: Callable[[str], str] | None = None
    particles: Annotated[int, Ge(1)] = 1  # N
    ess: Annotated[float, Ge(0), Le(1)] = 0.5  # of N, below which particles are drawn anew
    tests: Literal["adaptive", "all"] = "adaptive"

    def __post_init__(self) -> None:
        given = [name for name in ("regex", "schema", "check") if getattr(self, name)]
        if len(given) != 1:
            raise SmeltError(
                f"awrs: {' and '.join(given) or 'no constraint'} given; it takes one of regex=, schema= and, in Python, check="
            )
        if self.check is None and installed():
            self._start()  # what cannot be read is refused before a model is

    def _start(self) -> State:
        if self.check is not None:
            return checked(self.check)
        return regular(self.regex) if self.regex else schema(self.schema)

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        spelled = pieces(tokenizer, model.config.get_text_config(decoder=True).vocab_size)
        drawn: Rule = adaptive if self.tests == "adaptive" else masked
        greedy: Rule = likeliest if self.tests == "adaptive" else partial(masked, sample=False)
        if self.check is None:
            state = self._start()
            start: Callable[[], State] = lambda: state  # noqa: E731
        else:
            start = self._start  # a check keeps what it was asked about with its states, so each text has its own
        return {"custom_generate": constrained(start, spelled, drawn, greedy, self.particles, self.ess), "top_k": 0}

    @classmethod
    def example(cls, draft: Path) -> AWRS:
        return cls(check=lambda text: "dead" if "e" in text else "complete")


def adaptive(law: Tensor, allowed: Callable[[int], bool]) -> tuple[int | None, float]:
    """(a token of law [V] given that it is allowed, w), testing tokens in a random order without replacement; (None, 0) when none is.

    p_i / E_i with E_i exponential, from the largest down, is that order. The mass not yet drawn is summed from its end,
    so it loses nothing where almost all is rejected.
    """
    left = law.clone()
    keys = law / torch.empty_like(law).exponential_()
    support, weight, size = int((law > 0).sum()), 1.0, 64
    found, share = None, 1.0
    while support > 0:
        drawn = keys.topk(min(size, support)).indices
        p = law[drawn]
        left[drawn], keys[drawn] = 0.0, -1.0
        mass = p.flip(0).cumsum(0).flip(0) + left.sum()  # not drawn before each of them
        for token, q in zip(drawn.tolist(), (p / mass).tolist(), strict=True):
            if found is not None:
                return found, weight * (1.0 if allowed(token) else share)
            if allowed(token):
                found, share = token, q
            else:
                weight *= 1.0 - q
        support -= len(drawn)
        size *= 4
    return (None, 0.0) if found is None else (found, weight)  # the last token there is: nothing left to test


def masked(law: Tensor, allowed: Callable[[int], bool], sample: bool = True) -> tuple[int | None, float]:
    """The same law and w = Z itself, by testing every token that has a chance."""
    good = [token for token in law.nonzero()[:, 0].tolist() if allowed(token)]
    if not good:
        return None, 0.0
    p = law[good]
    return good[int(torch.multinomial(p, 1) if sample else p.argmax())], min(1.0, float(p.sum()))


def likeliest(law: Tensor, allowed: Callable[[int], bool]) -> tuple[int | None, float]:
    """The allowed token of the largest probability (the first of equals), testing from the top down."""
    tops = law.topk(min(64, len(law)))
    above = tops.values > tops.values[-1]  # equals of the last may be missing; mostly these few are enough
    few = sorted(zip((-tops.values[above]).tolist(), tops.indices[above].tolist(), strict=True))
    for _, token in few:
        if allowed(token):
            return token, 1.0
    every = law.sort(descending=True, stable=True)
    for p, token in zip(every.values[len(few) :].tolist(), every.indices[len(few) :].tolist(), strict=True):
        if not p > 0:
            break
        if allowed(token):
            return token, 1.0
    return None, 0.0
