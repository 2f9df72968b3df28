import json
import random

import pytest
import torch

from smelt.data.stdlib import Stdlib
from smelt.decode.control_vector import ControlVector, Directions, last_states, steering
from smelt.model._load import load
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.registry import check, parse, text
from smelt.runtime import bind
from smelt.spec import SmeltError

MODEL, TOKENIZER = tiny("llama", layers=3, eos_token_id=None, bos_token_id=None), tiny_tokenizer()
POSITIVE = ("import os", "import re, sys", "from os import name as x")
NEGATIVE = ("class A:", "class B(A):\n    pass", "class C")
IDS = torch.tensor([[5, 17, 40, 9, 300, 2]])


def method(**more) -> ControlVector:
    return ControlVector(positive=POSITIVE, negative=NEGATIVE, **more)


def logits(**more) -> torch.Tensor:
    with torch.no_grad(), bind(MODEL, decode=method(**more), tokenizer=TOKENIZER):
        return MODEL(IDS).logits


def output_of(layer: int, ids: torch.Tensor = IDS, model=MODEL) -> torch.Tensor:
    """What the block gives, as whatever comes after it sees it."""
    seen = []
    handle = model.model.layers[layer].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


def one_by_one(texts, layer):
    return torch.stack([output_of(layer, torch.tensor([TOKENIZER(t)["input_ids"]]))[0, -1].double() for t in texts])


def test_states_are_those_of_the_last_real_token_whatever_stands_beside():
    texts = [*POSITIVE, *NEGATIVE] * 4  # more than one batch
    found = last_states(MODEL, TOKENIZER, texts, (0, 2))
    assert found.shape == (2, 24, 64) and found.dtype == torch.float64
    for place, layer in enumerate((0, 2)):
        assert torch.allclose(found[place], one_by_one(texts, layer), atol=1e-5)
    assert not any(block._forward_hooks for block in MODEL.model.layers)


@pytest.mark.parametrize("direction", ["pca", "mean"])
def test_directions_are_those_of_a_slow_fit(direction):
    layers, vectors, sizes = method(direction=direction, layers=(0, 1, 2)).fit(MODEL, TOKENIZER)
    assert layers == (0, 1, 2)
    for layer in layers:
        positive, negative = one_by_one(POSITIVE, layer), one_by_one(NEGATIVE, layer)
        differences = positive - negative
        if direction == "mean":
            expected = differences.mean(0)
        else:
            expected = torch.linalg.eigh(sum(torch.outer(d, d) for d in [*differences, *-differences]))[1][:, -1]
            expected = expected * torch.sign(expected @ differences.mean(0))
        assert torch.allclose(vectors[layer].double(), expected / expected.norm(), atol=1e-4)
        assert (positive @ vectors[layer].double()).mean() > (negative @ vectors[layer].double()).mean()
        assert float(sizes[layer]) == pytest.approx(float(torch.cat([positive, negative]).norm(dim=1).mean()), rel=1e-5)


def test_other_way_round_is_the_other_way():
    there = method().fit(MODEL, TOKENIZER).vectors
    back = ControlVector(positive=NEGATIVE, negative=POSITIVE).fit(MODEL, TOKENIZER).vectors
    assert torch.allclose(there, -back, atol=1e-5)


def test_strength_zero_changes_no_bit():
    with torch.no_grad():
        plain = MODEL(IDS).logits
    assert torch.equal(logits(strength=0.0), plain) and torch.equal(logits(strength=0.0, mode="piecewise"), plain)
    assert not torch.equal(logits(strength=0.0, mode="erase"), plain)


@pytest.mark.parametrize("strength", [1.5, -0.5])
def test_last_layer_shift_goes_through_norm_and_head(strength):
    _, vectors, sizes = method(layers=(2,)).fit(MODEL, TOKENIZER)
    with torch.no_grad():
        expected = MODEL.lm_head(MODEL.model.norm(output_of(2) + strength * sizes[0] * vectors[0]))
    assert torch.allclose(logits(strength=strength, layers=(2,)), expected, atol=1e-5)


def test_erase_leaves_nothing_along_the_direction():
    found = method(mode="erase", layers=(0, 2))
    directions = found.fit(MODEL, TOKENIZER)
    plain = [output_of(layer) for layer in (0, 2)]
    assert all(float((h @ v).abs().max()) > 0.01 for h, v in zip(plain, directions.vectors))
    with bind(MODEL, decode=found, tokenizer=TOKENIZER):
        for layer, vector in zip((0, 2), directions.vectors):
            assert float((output_of(layer) @ vector).abs().max()) < 1e-4
        first = output_of(0)
    rest = plain[0] - first
    assert torch.allclose(rest, (rest @ directions.vectors[0])[..., None] * directions.vectors[0], atol=1e-4)  # only along it


@pytest.mark.parametrize("mode", ["add", "erase", "piecewise"])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_change_is_that_of_a_loop(mode, keep_norm):
    generator = torch.Generator().manual_seed(0)
    states, vector = torch.randn(2, 5, 8, generator=generator), torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
    found = method(mode=mode, keep_norm=keep_norm, strength=0.7).change(states, vector, torch.tensor(3.0))
    for row in range(2):
        for at in range(5):
            h, v = states[row, at].double(), vector.double()
            along = float(h @ v)
            if mode == "add":
                expected = h + 0.7 * 3 * v
            elif mode == "erase":
                expected = h - along * v
            else:
                expected = h + (1 if along > 0 else -1) * 0.7 * 3 * v
            if keep_norm:
                expected = expected * h.norm() / expected.norm()
            assert torch.allclose(found[row, at].double(), expected, atol=1e-5)


def test_steers_generation_from_the_prompt_on():
    """Token by token through the cache is the same as reading the whole text steered."""
    with bind(MODEL, decode=method(strength=1.0), tokenizer=TOKENIZER), torch.no_grad():
        out = MODEL.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=12)
        said = MODEL(out).logits[0, IDS.shape[1] - 1 : -1].argmax(-1)
    assert out[0, IDS.shape[1] :].tolist() == said.tolist()
    plain = MODEL.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=12)
    assert plain.tolist() != out.tolist()


def test_hooks_that_read_see_the_steered_states():
    seen = []
    handle = MODEL.model.layers[1].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        MODEL(IDS)
        with bind(MODEL, decode=method(layers=(1,)), tokenizer=TOKENIZER):
            seen.clear()
            MODEL(IDS)
            inside = seen[0]
            assert torch.equal(inside, output_of(1))
    handle.remove()
    assert not torch.equal(inside, output_of(1))


def test_scores_and_the_chance_of_the_right_order():
    found, texts = method(layers=(0, 2)), ["import x", "class D(B):", "x = 1"]
    layers, vectors, sizes = found.fit(MODEL, TOKENIZER)
    expected = sum(one_by_one(texts, layer) @ v.double() / float(m) for layer, v, m in zip(layers, vectors, sizes)) / 2
    assert torch.allclose(found.read(MODEL, TOKENIZER, texts), expected, atol=1e-5)
    assert torch.equal(found.read(MODEL, TOKENIZER, texts, Directions(layers, vectors, sizes)), found.read(MODEL, TOKENIZER, texts))
    positive, negative = ["import a", "class X", "import b, c"], ["class Y:", "import a", "x"]
    a, b = found.read(MODEL, TOKENIZER, positive).tolist(), found.read(MODEL, TOKENIZER, negative).tolist()
    b[1] = a[0]  # the same text on both sides, up to the rounding of another batch
    share = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b) / 9
    assert found.detection(MODEL, TOKENIZER, positive, negative) == pytest.approx(share, abs=0.5 / 9)
    assert found.detection(MODEL, TOKENIZER, positive, positive) == pytest.approx(0.5, abs=1.5 / 9)
    assert found.detection(MODEL, TOKENIZER, positive, negative) + found.detection(MODEL, TOKENIZER, negative, positive) == pytest.approx(1)


def test_pairs_of_a_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"positive": "a\u2028b", "negative": "c"}, ensure_ascii=False), encoding="utf-8")  # one line of JSON
    ControlVector(pairs=str(file)).fit(MODEL, TOKENIZER)
    lines = [json.dumps({"positive": p, "negative": n}) for p, n in zip(POSITIVE, NEGATIVE)]
    file.write_text("\n".join([*lines[:2], "", lines[2]]))
    a, b = ControlVector(pairs=str(file)).fit(MODEL, TOKENIZER), method().fit(MODEL, TOKENIZER)
    assert torch.equal(a.vectors, b.vectors) and a.layers == b.layers == (1,)  # the middle third of three
    for wrong in ('{"positive": "a"}', "{", "[1]", '{"positive": 1, "negative": "b"}'):
        file.write_text("\n".join([lines[0], wrong]))
        with pytest.raises(SmeltError, match=r"pairs.jsonl:2: each line is"):
            ControlVector(pairs=str(file)).fit(MODEL, TOKENIZER)
    file.write_text("\n")
    with pytest.raises(SmeltError, match="no pair"):
        ControlVector(pairs=str(file)).fit(MODEL, TOKENIZER)
    with pytest.raises(SmeltError, match="cannot be read"):
        ControlVector(pairs=str(tmp_path / "none.jsonl")).fit(MODEL, TOKENIZER)


def test_errors_say_what_is_wrong():
    for given in ({}, {"positive": ("a",), "negative": ("b",), "pairs": "x.jsonl"}):
        with pytest.raises(SmeltError, match="give positive="):
            ControlVector(**given)
    with pytest.raises(SmeltError, match="2 positive and 1 negative"):
        ControlVector(positive=("a", "b"), negative=("c",))
    with pytest.raises(SmeltError, match=r"no layer 3; the model has 3"):
        method(layers=(3,)).fit(MODEL, TOKENIZER)
    with pytest.raises(SmeltError, match="needs the model's tokenizer"):
        method().fit(MODEL, None)
    with pytest.raises(SmeltError, match="no direction between them at layer 1"):
        ControlVector(positive=POSITIVE, negative=POSITIVE).fit(MODEL, TOKENIZER)
    with pytest.raises(SmeltError, match="no direction"):
        ControlVector(positive=("a b", "c"), negative=("c", "a b"), direction="mean").fit(MODEL, TOKENIZER)
    with pytest.raises(SmeltError, match="has no token"):
        ControlVector(positive=("",), negative=("x",)).fit(MODEL, TOKENIZER)


def test_written_in_a_recipe():
    found = parse("control_vector(positive=('a',), negative=('b',), layers=(1, 2), mode='erase')", "decode")
    check(found)
    assert parse(text(found), "decode") == found
    with pytest.raises(SmeltError, match="layers"):
        parse("control_vector(positive=('a',), negative=('b',), layers=(-1,))", "decode")


def snippets(split: str, many: int) -> tuple[list[str], list[str]]:
    """Three lines of imports, and three lines that begin a class, of held-out modules."""
    imports, classes = [], []
    for document in Stdlib().documents(split):
        lines = document.text.splitlines()
        for at in range(len(lines) - 3):
            piece = lines[at : at + 3]
            if all(line.startswith(("import ", "from ")) for line in piece):
                imports.append("\n".join(piece) + "\n")
            elif piece[0].startswith("class "):
                classes.append("\n".join(piece) + "\n")
    for found in (imports, classes):
        random.Random(0).shuffle(found)
    return imports[:many], classes[:many]


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["pca", "mean"])
def test_a_trait_is_read_and_moved_in_the_embedded_model(direction):
    """Imports against classes: AUC >= 0.9 on held-out modules; the log-odds of `import` against `class` rise with the strength;
    random directions of the same length move them at most a third as much on the mean."""
    model, tokenizer, _ = load("embedded")
    imports, classes = snippets("validation", 32)
    found = ControlVector(positive=tuple(imports), negative=tuple(classes), layers=(4,), direction=direction)
    assert found.detection(model, tokenizer, *snippets("test", 60)) >= 0.9
    directions = found.fit(model, tokenizer)
    one, other = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("import", "class"))
    prompts = [
        torch.tensor([[tokenizer.bos_token_id, *tokenizer(p, add_special_tokens=False)["input_ids"]]])
        for p in ("\n\n", "x = 1\n\n", "    return None\n\n", "# -*- coding: utf-8 -*-\n", "def f():\n    pass\n\n")
    ]

    def odds(strength: float, given: Directions) -> float:
        pushed = ControlVector(positive=("a",), negative=("b",), strength=strength)
        with torch.no_grad(), steering(model, given, pushed.change):
            said = [model(ids).logits[0, -1].log_softmax(-1) for ids in prompts]
        return sum(float(law[one] - law[other]) for law in said) / len(said)

    curve = [odds(strength, directions) for strength in (-2, -1, -0.5, 0, 0.5, 1, 2)]
    assert curve == sorted(curve) and curve[-1] - curve[0] > 4
    generator, moved = torch.Generator().manual_seed(0), []
    for _ in range(8):
        vector = torch.nn.functional.normalize(torch.randn(directions.vectors.shape, generator=generator), dim=-1)
        chance = directions._replace(vectors=vector)
        moved.append(abs(odds(0.5, chance) - odds(-0.5, chance)))
    assert sum(moved) / len(moved) <= (curve[4] - curve[2]) / 3
