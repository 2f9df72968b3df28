import itertools
import math
import random
from collections import Counter

import pytest
import torch

from smelt.data import Document
from smelt.decode._count import count
from smelt.decode._trigrams import counted
from smelt.decode._verify import Draft
from smelt.decode.aded import ADED
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

TARGET = tiny("llama", eos_token_id=None, bos_token_id=None)
VOCAB = TARGET.config.vocab_size
TOKENIZER = tiny_tokenizer()


class Texts:
    """A corpus of given texts; only the train split has any."""

    def __init__(self, *texts: str):
        self.texts, self.read = texts, 0

    def documents(self, split):
        assert split == "train"
        self.read += 1
        yield from (Document(str(i), t) for i, t in enumerate(self.texts))

    def digest(self):
        return str(hash(self.texts))


def ids_of(one: str) -> list[int]:
    return TOKENIZER(one, add_special_tokens=False)["input_ids"]


def started(method: ADED, said: list[int]):
    drafter = method.drafter(TARGET, TOKENIZER)
    drafter.begin(list(said), None)
    drafter.map.learn(said)
    return drafter


def shuffled(seed: int, words: str = "the cat saw a dog and the dog saw the cat on a mat", many: int = 80) -> str:
    return " ".join(random.Random(seed).choices(words.split(), k=many))


def frequencies(texts: list[list[int]]) -> dict[tuple[int, int], dict[int, float]]:
    """P(c | a, b) by counting in a loop, the 12 largest, equal ones by token."""
    seen: dict[tuple[int, int], Counter] = {}
    for ids in texts:
        for a, b, c in zip(ids, ids[1:], ids[2:]):
            seen.setdefault((a, b), Counter())[c] += 1
    best = {pair: sorted(by.items(), key=lambda item: (-item[1], item[0]))[:12] for pair, by in seen.items()}
    return {pair: {c: n / sum(seen[pair].values()) for c, n in items} for pair, items in best.items()}


def test_the_corpus_is_counted_as_in_a_loop():
    generator = random.Random(0)
    # letters in any order: more than 12 successors of a pair; the last two documents hold no trigram
    texts = ["".join(generator.choices("abcdefghijklmnopqrst", weights=range(1, 21), k=1500)) for _ in range(3)] + ["a", ""]
    expected = frequencies([ids_of(t) for t in texts])
    assert max(map(len, expected.values())) == 12
    table = counted(Texts(*texts), TOKENIZER, 100_000, VOCAB)
    assert {divmod(key, VOCAB) for key in table} == set(expected)
    for (a, b), by in expected.items():
        tokens, weights = table[a * VOCAB + b]
        assert list(tokens) == list(by) and weights == pytest.approx(list(by.values()))


def test_the_limit_is_in_tokens_and_a_corpus_is_counted_once():
    corpus = Texts(shuffled(0), shuffled(1))
    ids = [ids_of(t) for t in corpus.texts]
    limit = len(ids[0]) + 50
    table = counted(corpus, TOKENIZER, limit, VOCAB)
    expected = frequencies([ids[0], ids[1][:50]])
    assert {divmod(key, VOCAB) for key in table} == set(expected)
    assert counted(corpus, TOKENIZER, limit, VOCAB) is table and corpus.read == 1


@pytest.mark.parametrize("with_corpus", [False, True])
@pytest.mark.parametrize("reward", [0.04, 0.56])
def test_weights_are_frequency_plus_reward_times_count_up_to_the_cap(with_corpus, reward):
    corpus = Texts(shuffled(0))
    said = ids_of(shuffled(1))
    drafter = started(ADED(data=corpus if with_corpus else None, reward=reward, cap=2.0), said)
    before = frequencies([ids_of(corpus.texts[0])]) if with_corpus else {}
    counts = Counter(zip(said, said[1:], said[2:]))
    capped = 0
    for a, b in set(itertools.pairwise(said)):
        tokens, weights = drafter.after(a, b)
        assert list(weights) == sorted(weights, reverse=True)
        for c, weight in zip(tokens, weights, strict=True):
            full = before.get((a, b), {}).get(c, 0.0) + reward * counts[a, b, c]
            assert weight == pytest.approx(min(2.0, full), abs=1e-5)
            capped += full > 2.0
        assert {c for x, y, c in counts if (x, y) == (a, b)} | set(before.get((a, b), {})) == set(tokens)
    assert capped or reward < 0.1
    again = dict(drafter.map.own)
    drafter.map.learn(said)  # each place is rewarded once, however often it is looked at
    assert again == drafter.map.own


def test_what_was_said_five_times_comes_first_and_is_forgotten_with_its_text():
    corpus = Texts("xyz " * 50)
    x, y, z = ids_of("xyz")
    other = ids_of("q")[0]
    drafter = started(ADED(data=corpus), [])
    assert drafter.after(x, y)[0][0] == z
    drafter.map.learn([x, y, other] * 5)
    assert drafter.after(x, y)[0][0] == other
    assert drafter.draft([x, y, other] * 5 + [x, y], 9).tokens[0] == other
    drafter.begin([], None)
    assert drafter.after(x, y)[0][0] == z


def test_at_most_twelve_successors_and_the_newest_of_equals_first():
    said = [i for c in range(10, 30) for i in (5, 6, c)]
    assert started(ADED(), said).after(5, 6)[0] == tuple(range(29, 17, -1))


def visits_by_hand(after, pair, depth: int, simulations: int, seed: int) -> dict[tuple[int, ...], int]:
    """The search with a table of prefixes, every score written out: {prefix: visits}."""
    stream = random.Random(seed)
    visits: Counter = Counter()
    totals: Counter = Counter()

    def successors(prefix):
        return list(zip(*after(*(*pair, *prefix)[-2:])))

    def score(prefix, c, w):
        if not visits[*prefix, c]:
            return math.inf
        n = visits[prefix]
        pull = (32 + math.log((n + 8 + 1) / 8)) * w * math.sqrt(n)
        return totals[*prefix, c] / visits[*prefix, c] + pull / (1 + visits[*prefix, c])

    for _ in range(simulations):
        prefix, value, on_path = (), 1.0, [()]
        while len(prefix) < depth and successors(prefix):
            c, w = max(successors(prefix), key=lambda item: score(prefix, *item))  # the first of equals
            prefix, value = (*prefix, c), value + w
            on_path.append(prefix)
            if not visits[prefix]:
                break
        played = prefix
        while len(played) < depth and successors(played):
            options = successors(played)
            c, w = stream.choices(options, [w for _, w in options])[0]
            played, value = (*played, c), value + w
        for one in on_path:
            visits[one] += 1
            totals[one] += value
    return {prefix: n for prefix, n in visits.items() if n and prefix}


@pytest.mark.parametrize(("depth", "simulations"), [(1, 30), (3, 7), (4, 150)])
def test_the_search_visits_what_the_search_by_hand_visits(depth, simulations):
    said = ids_of(shuffled(3))
    drafter = started(ADED(data=Texts(shuffled(0)), simulations=simulations, seed=5), said)
    a, b = said[-2:]
    assert drafter.pull == pytest.approx([(32 + math.log((n + 8 + 1) / 8)) * math.sqrt(n) for n in range(simulations)])
    prefixes: list[tuple[int, ...]] = []
    visited = drafter.search(a, b, depth)
    for node in visited:
        prefixes.append((*(prefixes[node.parent] if node.parent >= 0 else ()), node.token))
    found = {prefix: node.visits for prefix, node in zip(prefixes, visited, strict=True)}
    expected = visits_by_hand(drafter.after, (a, b), depth, simulations, 5)
    assert found == expected
    assert sum(n for prefix, n in found.items() if len(prefix) == 1) == simulations
    assert max(map(len, found)) <= depth


def paths(draft) -> set[tuple[int, ...]]:
    said, found = draft.tokens.tolist(), []
    for token, parent in zip(said, draft.parents, strict=True):
        assert -1 <= parent < len(found)  # present, and before its child
        found.append((*found[parent], token) if parent >= 0 else (token,))
    assert len(set(found)) == len(found)  # siblings differ
    return set(found)


@pytest.mark.parametrize("nodes", [1, 5, 24, 200])
@pytest.mark.parametrize("room", [1, 3, 50])
def test_a_tree_has_the_most_visited_prefixes_their_best_successors_and_every_parent(nodes, room):
    said = ids_of(shuffled(3))
    drafter = started(ADED(data=Texts(shuffled(0)), nodes=nodes), said)
    drafted = paths(drafter.draft(said, room))
    depth = min(4, room)
    assert len(drafted) <= nodes and max(map(len, drafted)) <= min(depth + 1, room)
    visits = visits_by_hand(drafter.after, tuple(said[-2:]), depth, 150, 0)

    def best(prefix):
        tokens = drafter.after(*(*said, *prefix)[-2:])[0]
        return (*prefix, tokens[0]) if tokens and len(prefix) < room else prefix

    extensions = {best(prefix) for prefix in visits}
    assert drafted <= set(visits) | extensions
    if nodes == 200:
        assert drafted == set(visits) | extensions
        return
    assert len(drafted) == min(nodes, len(set(visits) | extensions))
    least = min((visits[p] for p in drafted if p in visits and p not in extensions), default=0)
    assert {p for p, n in visits.items() if n > least} <= drafted  # no prefix with more visits is left out
    again = started(ADED(data=Texts(shuffled(0)), nodes=nodes), said)
    assert paths(again.draft(said, room)) == drafted  # the seed starts again with every text


def test_a_chain_is_the_best_successor_each_time():
    said = ids_of(shuffled(3))
    drafter = started(ADED(form="chain", depth=6), said)
    expected = list(said)
    for _ in range(6):
        expected.append(drafter.after(*expected[-2:])[0][0])
    assert drafter.draft(said, 50).tokens.tolist() == expected[len(said) :]
    assert drafter.draft(said, 2).tokens.tolist() == expected[len(said) : len(said) + 2]


def tokens_per_call(method: ADED, prompt: list[int], answer: list[int]) -> float:
    """With an oracle for a target, one that says `answer`."""
    drafter = method.drafter(TARGET, TOKENIZER)
    drafter.begin(list(prompt), None)
    done = calls = 0
    while done < len(answer):
        room = len(answer) - done - 1
        draft = drafter.draft(prompt + answer[:done], room) if room else None
        path: tuple[int, ...] = ()
        if draft is not None:
            parents = range(-1, len(draft.tokens) - 1) if draft.parents is None else draft.parents
            drafted = paths(Draft(draft.tokens, parents))
            while (*path, answer[done + len(path)]) in drafted:
                path = (*path, answer[done + len(path)])
        done, calls = done + len(path) + 1, calls + 1
    return len(answer) / calls


@pytest.mark.parametrize("form", ["chain", "tree", "best_first"])
def test_repeated_text_is_drafted_and_random_text_is_not(form):
    method = ADED(form=form)
    assert tokens_per_call(method, ids_of("def one"), ids_of("for item in items: print(item)\n" * 16)) >= 3
    generator = random.Random(0)
    noise = [generator.randrange(2, VOCAB) for _ in range(500)]
    assert tokens_per_call(method, noise[:20], noise[20:]) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("form", ["chain", "tree", "best_first"])
def test_adapting_beats_a_frozen_map_where_the_text_is_another(form):
    corpus = Texts(shuffled(0))
    other = ids_of(shuffled(1, "if x is not None and y is None then return x or y", 120))
    frozen = ADED(data=corpus, form=form, reward=0.0)
    adapts = ADED(data=corpus, form=form)
    assert tokens_per_call(adapts, other[:50], other[50:]) > 1.1 * tokens_per_call(frozen, other[:50], other[50:])


@pytest.mark.parametrize("corpus", [None, Texts(*map(shuffled, range(3)))], ids=["text", "corpus"])
@pytest.mark.parametrize("form", ["chain", "tree", "best_first"])
def test_greedy_is_plain_greedy_in_fewer_calls(form, corpus):
    arguments = ADED(form=form, data=corpus).arguments(TARGET, TOKENIZER)
    calls = 0
    for seed in range(4):
        ids = torch.tensor([ids_of(shuffled(seed, many=8))])
        plain = TARGET.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False)
        with count(TARGET) as seen:
            out = TARGET.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False, **arguments)
        assert out.tolist() == plain.tolist()
        calls += seen.calls
    assert calls < 4 * 50


@pytest.mark.parametrize(("nodes", "least"), [(1, 0.01), (7, 0.05), (24, 0.2), (500, 0.02)])
def test_best_first_drafts_the_likeliest_prefixes(nodes, least):
    """Against all prefixes, written out: the same products, parents present, nothing below `least`."""
    said = ids_of(shuffled(0, many=60))
    drafter = started(ADED(data=Texts(*map(shuffled, range(3))), form="best_first", nodes=nodes, least=least, depth=4), said)

    def extended(path, product, a, b):
        if path:
            yield product
        if len(path) < 4:
            tokens, weights = drafter.after(a, b)
            for c, w in zip(tokens, weights):
                yield from extended((*path, c), product * w / sum(weights), b, c)

    every = sorted((p for p in extended((), 1.0, *said[-2:]) if p >= least), reverse=True)
    found = drafter.draft(said, 9)
    products = []
    for node, parent in enumerate(found.parents):
        path = [node]
        while path[0] != -1:
            path.insert(0, found.parents[path[0]])
        told = [*said[-2:], *(int(found.tokens[i]) for i in path[1:])]
        product = 1.0
        for a, b, c in zip(told, told[1:], told[2:]):
            tokens, weights = drafter.after(a, b)
            product *= dict(zip(tokens, weights))[c] / sum(weights)
        products.append(product)
        assert -1 <= parent < node
    assert products == pytest.approx(every[:nodes])


def test_nothing_known_and_texts_too_short():
    for form in ("chain", "tree", "best_first"):
        drafter = started(ADED(form=form), [])
        assert all(drafter.draft(said, 9) is None for said in ([4], [4, 5], [4, 5, 6]))


def test_recipe_text_ranges_and_corpora():
    source = "aded(data=stdlib(), form='chain', depth=8)"
    assert text(parse(source, "decode")) == source
    check(ADED())
    for bad in ("depth=0", "nodes=0", "simulations=0", "reward=-0.1", "cap=0.0", "limit=2", "form='bush'", "least=0.0", "data=3"):
        with pytest.raises(SmeltError):
            parse(f"aded({bad})", "decode")
    with pytest.raises(SmeltError, match="needs the model's tokenizer"):
        ADED(data=Texts("a b c")).drafter(TARGET, None)
    with pytest.raises(SmeltError, match="only 3 tokens"):
        counted(Texts("abcd" * 9), TOKENIZER, 100, 3)
