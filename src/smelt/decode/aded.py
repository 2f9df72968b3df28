"""Drafts from counted trigrams that adapt to the text: no draft model, no training."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le

from smelt.decode._loop import Choice
from smelt.decode._trigrams import Successors, Trigrams, counted
from smelt.decode._verify import Draft, Drafter, Drafting
from smelt.spec import Paper, SmeltError

__all__ = ["ADED"]

C1, C2 = 32.0, 8.0  # of the search


@dataclass(frozen=True)
class ADED(Drafting):
    """w(c | a, b) = min(cap, P(c | a, b) + reward * count(abc)); drafted: what a search over w from the last two tokens visits most.

    P: relative frequency in the first `limit` tokens of the train split of `data`; count: places in the text so far, prompt
    included. The 12 largest of each pair are kept. The target keeps of a draft what it would have said itself, under
    greedy search and under sampling (the rule for drafts that are certain of themselves). Unknown pair: a plain step.

    form="tree": Monte-Carlo tree search, `simulations` paths of at most `depth`; at a node visited N times to the child of
    largest total / visits + (c1 + ln((N + c2 + 1) / c2)) w sqrt(N) / (1 + visits), unvisited ones first; a new node is
    played on by draws in proportion to w; value = 1 + sum of w on the way. Drafted: the most visited prefixes, each with
    its best successor, until there are `nodes`; every parent is among them.

    form="chain": `depth` best successors. form="best_first" (ours): the prefixes with the largest product of w / sum w, which
    stands for the chance that they are said, down to `least`; no search, and no positions that are hardly worth reading.

    Cost: counting, once for a corpus and tokenizer in a process: about 2.5 s for a million tokens, 450 bytes for a pair. Per
    round 1.3 ms of search (a call of the embedded model: 7.5 ms for 1 position, 15 for 25) and `nodes` positions more
    (best_first: 0.2 ms).
    Tokens per call after 48 prompts of held-out code, embedded model: chain 2.06, with stdlib() 2.46; tree 2.27, with
    stdlib() 3.21 (depth=8 and all of it: 3.70); prompt_lookup 2.72. On so small a target the extra positions cost much of it.

    Raises SmeltError for what is no corpus, and for one without a tokenizer or with ids that the model does not have.

    Differs from the paper: each place of a trigram is rewarded once. The authors' code adds 0.04 for all in the last 16
    tokens in every round, so up to 14 times for each, which is `reward` here: said twice outweighs any corpus. Rejected
    drafts teach nothing; what a text taught is forgotten with it and its search starts from `seed`, so texts do not
    depend on their order. Reconstruction: unvisited children by weight, the value of a whole played path, N with the own visit.
    """

    paper: ClassVar = Paper("Adaptive Draft-Verification for Efficient Large Language Model Decoding", "arXiv:2407.12021", "ADED")
    data: Any = None  # a corpus, such as stdlib(); None: the text so far alone
    form: Literal["chain", "tree", "best_first"] = "tree"
    depth: Annotated[int, Ge(1)] = 4
    nodes: Annotated[int, Ge(1)] = 24  # of a tree
    simulations: Annotated[int, Ge(1)] = 150
    reward: Annotated[float, Ge(0)] = 0.56  # 0: the corpus as it is
    cap: Annotated[float, Gt(0)] = 3.0
    limit: Annotated[int, Ge(3)] = 1_000_000  # tokens of the corpus
    least: Annotated[float, Gt(0), Le(1)] = 0.05  # best_first: the smallest product that is worth a position
    seed: int = 0

    def __post_init__(self) -> None:
        if self.data is not None and (isinstance(self.data, type) or not callable(getattr(self.data, "documents", None))):
            raise SmeltError(f"aded: data: {self.data!r} is not a corpus; write one such as stdlib() or files(path='notes')")

    def drafter(self, model: Any, tokenizer: Any) -> Drafter:
        vocab = model.config.get_text_config().vocab_size
        return _Trigrams(self, vocab, {} if self.data is None else counted(self.data, tokenizer, self.limit, vocab))

    @classmethod
    def example(cls, draft: Path) -> ADED:
        return cls(depth=3, nodes=6, simulations=20)


class _Trigrams(Drafter):
    def __init__(self, method: ADED, vocab: int, corpus: dict[int, Successors]):
        self.method, self.map = method, Trigrams(vocab, corpus, method.reward, method.cap)
        self.after = self.map.after
        self.pull = [(C1 + math.log((n + C2 + 1) / C2)) * math.sqrt(n) for n in range(method.simulations)]

    def begin(self, text: list[int], choice: Choice) -> None:
        self.map.forget()
        self.random = random.Random(self.method.seed)

    def draft(self, text: list[int], room: int) -> Draft | None:
        self.map.learn(text)
        if len(text) < 2:
            return None
        a, b, depth = *text[-2:], min(self.method.depth, room)
        if self.method.form != "chain":
            tree = self.tree(self.search(a, b, depth), room) if self.method.form == "tree" else self.likely(a, b, depth)
            return Draft(torch.tensor(tree[0]), tree[1]) if tree[0] else None
        chain: list[int] = []
        while len(chain) < depth and (found := self.after(a, b)[0]):
            a, b = b, found[0]
            chain.append(b)
        return Draft(torch.tensor(chain)) if chain else None

    def kept(self, text: list[int], read: int, hidden: Any) -> None:
        pass

    def likely(self, a: int, b: int, depth: int) -> tuple[list[int], list[int]]:
        """(tokens, parents) of the prefixes with the largest product of w / sum w, down to `least`."""
        tokens: list[int] = []
        parents: list[int] = []
        order = itertools.count()  # of equals the first found
        heap: list[tuple[float, int, int, int, int, int]] = []  # (- product, order, place of the parent, depth, last two tokens)

        def push(product: float, place: int, deep: int, a: int, b: int) -> None:
            after, weights = self.after(a, b)
            total = sum(weights)
            for c, w in zip(after, weights):
                if product * w < self.method.least * total:
                    break
                heapq.heappush(heap, (-product * w / total, next(order), place, deep, b, c))

        push(1.0, -1, 1, a, b)
        while heap and len(tokens) < self.method.nodes:
            product, _, parent, deep, b, c = heapq.heappop(heap)
            tokens.append(c)
            parents.append(parent)
            if deep < depth:
                push(-product, len(tokens) - 1, deep + 1, b, c)
        return tokens, parents

    def search(self, a: int, b: int, depth: int) -> list[_Node]:
        """Every prefix visited, parents before their children."""
        made: list[_Node] = []
        root = _Node(-1, -1, 0, b, 0.0, self.after(a, b))
        for _ in range(self.method.simulations if root.after[0] else 0):
            path, value, fresh = [root], 1.0, False
            while (node := path[-1]).after[0] and len(path) <= depth and not fresh:
                if fresh := (at := len(node.below)) < len(node.after[0]):
                    token, weight = node.after[0][at], node.after[1][at]
                    node.below.append(_Node(len(made), node.at, node.depth + 1, token, weight, self.after(node.token, token)))
                    made.append(node.below[-1])
                path.append(node.below[-1] if fresh else node.best(self.pull[node.visits]))
                value += path[-1].weight
            last, after = node.token, node.after
            for _ in range(depth + 1 - len(path) if after[0] else 0):
                token, weight = self.random.choices(list(zip(*after)), after[1])[0]
                value, last, after = value + weight, token, self.after(last, token)
                if not after[0]:
                    break
            for node in path:
                node.visits += 1
                node.total += value
        return made

    def tree(self, visited: list[_Node], room: int) -> tuple[list[int], list[int]]:
        """(tokens, parents) of the most visited, each with its best successor, in this order until `nodes` are there."""
        placed: dict[tuple[int, int], int] = {}  # (place of the parent, token) -> place
        for node in sorted(visited, key=lambda one: -one.visits):  # stable: parents first
            if len(placed) >= self.method.nodes:
                break
            parent = visited[node.parent].place if node.parent >= 0 else -1
            node.place = placed.setdefault((parent, node.token), len(placed))
            if node.after[0] and node.depth < room and len(placed) < self.method.nodes:
                placed.setdefault((node.place, node.after[0][0]), len(placed))
        return [token for _, token in placed], [parent for parent, _ in placed]


class _Node:
    """A prefix in a search: `after` its successors, of which those in `below` have been visited."""

    __slots__ = ("after", "at", "below", "depth", "parent", "place", "token", "total", "visits", "weight")

    def __init__(self, at: int, parent: int, depth: int, token: int, weight: float, after: Successors):
        self.at, self.parent, self.depth, self.token, self.weight, self.after = at, parent, depth, token, weight, after
        self.below: list[_Node] = []  # parents by number, children by reference: no cycle for the garbage collector
        self.place, self.visits, self.total = -1, 0, 0.0

    def best(self, pull: float) -> _Node:
        return max(self.below, key=lambda one: one.total / one.visits + pull * one.weight / (1 + one.visits))
