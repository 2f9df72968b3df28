from __future__ import annotations

import importlib.util
import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface

from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Asked
from smelt.rank import _blocks as laid_out
from smelt.rank._blocks import TAIL, mask, stack
from smelt.rank._order import by_digest
from smelt.rank._training import Labelled
from smelt.rank.block_rank import BlockRank, _Looked, _watching, info_nce, shares
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

PASSAGES = [f"def function_{i}(x):\n    return x * {i * i}\n" for i in range(6)]


def loaded(architecture="llama", **more):
    return Loaded(tiny(architecture, **{"layers": 4, "context": 512} | more), tiny_tokenizer(), None)


@torch.no_grad()
def by_hand(judge, one, model, index):
    """Eager attention of all layers under the dense mask, then loops over heads, rows and passages."""
    laid = judge._lay(one.query, one.passages, model)
    batch, before = stack([laid]), model.model.config._attn_implementation
    model.model.set_attn_implementation("eager")
    out = model.model(batch.ids, attention_mask=mask(batch.segment), position_ids=batch.positions, output_attentions=True)
    model.model.set_attn_implementation(before)
    weights, scores = out.attentions[index][0].double(), []
    for i in range(len(one.passages)):
        shared = []
        for head in weights:
            for row in (-2, -1):
                shared.append(float(head[row][laid.segment == i + 1].sum() / head[row][laid.segment > 0].sum()))
        scores.append(sum(shared) / len(shared))
    return torch.tensor(scores)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2", "phi3"])
def test_scores_are_the_attention_of_the_layer_by_hand(architecture):
    """gemma2 caps its attention and runs eager; the layers above are not there while it is read."""
    model = loaded(architecture)
    asked = [Asked("times three", PASSAGES), Asked("a longer query than the other", PASSAGES[:2])]
    for layer, index in ((0.5, 2), (3, 3), (0, 0)):
        judge = BlockRank(layer=layer)
        for one, found in zip(asked, judge.scores(asked, model), strict=True):
            torch.testing.assert_close(found, by_hand(judge, one, model, index).float(), atol=1e-5, rtol=1e-5)
            assert abs(float(found.sum()) - 1) < 1e-5


def test_the_model_is_left_as_it_was_and_runs_no_layer_too_many():
    model, runs = loaded(), []
    configs = [layer.self_attn.config for layer in model.model.model.layers]
    ids = torch.arange(9)[None]
    before = model.model(ids).logits
    handles = [layer.register_forward_hook(lambda m, a, o, i=i: runs.append(i)) for i, layer in enumerate(model.model.model.layers)]
    BlockRank(layer=1).scores([Asked("q", PASSAGES)], model)
    assert sorted(runs) == [0, 0, 0, 1, 1, 1]  # prefix, passages, tail
    for handle in handles:
        handle.remove()
    with pytest.raises(SmeltError, match="layer=4, and the model has the layers 0 to 3"):
        BlockRank(layer=4).scores([Asked("q", PASSAGES)], model)
    model.model.lm_head.register_forward_hook(lambda m, a, o: pytest.fail("the head ran"))
    BlockRank().scores([Asked("q", PASSAGES)], model)
    model.model.lm_head._forward_hooks.clear()
    assert model.model.config.num_hidden_layers == 4 and all(
        a.self_attn.config is c for a, c in zip(model.model.model.layers, configs, strict=True)
    )
    assert torch.equal(model.model(ids).logits, before)


def test_the_attention_in_use_stays_in_use():
    """A function registered for the whole model is called in every layer, also in the one that is looked at, where the model is
    trained; scoring ends with the keys of that layer."""
    model, called = loaded(), []

    def mine(module, query, key, value, mask, **options):
        called.append(module.layer_idx)
        return AttentionInterface._global_mapping["sdpa"](module, query, key, value, mask, **options)

    expected = BlockRank().scores([Asked("q", PASSAGES)], model)[0]
    AttentionInterface.register("smelt_test_block_rank", mine)
    model.model.set_attn_implementation("smelt_test_block_rank")
    assert torch.equal(BlockRank().scores([Asked("q", PASSAGES)], model)[0], expected)
    assert sorted(called) == [0, 0, 0, 1, 1, 1]
    called.clear()
    batch = BlockRank().collate([Labelled("q", tuple(PASSAGES), tuple(float(i == 1) for i in range(len(PASSAGES))))], model, 256)
    assert BlockRank().loss(model.model, None, batch).isfinite().all() and sorted(called) == [0, 1, 2, 3]
    AttentionInterface._global_mapping.pop("smelt_test_block_rank")


def test_without_identifiers_scores_move_with_the_passages():
    """All 24 orders of four passages; with identifiers they do not."""
    model, four = loaded(), PASSAGES[:4]
    moved = {}
    for judge in (BlockRank(order_free=True), BlockRank()):
        base = judge.scores([Asked("times three", four)], model)[0]
        orders = list(itertools.permutations(range(4)))
        found = judge.scores([Asked("times three", [four[i] for i in order]) for order in orders], model)
        moved[judge.order_free] = max(float((s - base[list(order)]).abs().max()) for s, order in zip(found, orders, strict=True))
    assert moved[True] < 1e-6 and moved[False] > 1e-4


def test_shares_are_those_of_the_loop():
    random = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 4, 5, 8, generator=random), torch.randn(2, 2, 9, 8, generator=random)
    segment, last = torch.tensor([[0, 0, 1, 1, 2, 3, 3], [0, 1, 1, 2, 2, -2, -2]]), torch.tensor([4, 2])
    for softcap in (None, 0.7):
        found = shares(_Looked(query, key, 0.3, softcap), last, segment, 3)
        for b in range(2):
            expected = torch.zeros(3, dtype=torch.float64)
            for head in range(4):
                for row in (int(last[b]) - 1, int(last[b])):
                    logits = [0.3 * float(query[b, head, row].double() @ key[b, head // 2, w].double()) for w in range(7)]
                    logits = [softcap * torch.tensor(v / softcap).tanh().item() for v in logits] if softcap else logits
                    weight = {w: torch.tensor(v).exp().item() for w, v in enumerate(logits) if segment[b, w] > 0}
                    for w, value in weight.items():
                        expected[segment[b, w] - 1] += value / sum(weight.values()) / 8
            torch.testing.assert_close(found[b].double(), expected, atol=1e-6, rtol=1e-6)


def test_the_contrastive_loss_is_that_of_the_loop():
    scores = torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.1, 7.0]], dtype=torch.float64)
    positive = torch.tensor([[0, 1, 1], [1, 0, -1]])
    for row, good, found in zip(scores.tolist(), positive.tolist(), info_nce(scores, positive).tolist(), strict=True):
        e = [2.718281828459045 ** (s / 0.05) if g >= 0 else 0.0 for s, g in zip(row, good, strict=True)]
        assert found == pytest.approx(-torch.tensor(sum(v for v, g in zip(e, good, strict=True) if g == 1) / sum(e)).log().item(), abs=1e-6)


def lists():
    """What is sought stands in the passage."""
    words = ["apple", "river", "stone", "cloud"]
    return [Labelled(w, [f"def {v}(): pass" for v in [w, *(o for o in words if o != w)]], [1.0, 0.0, 0.0, 0.0]) for w in words]


def test_a_batch_is_laid_out_as_in_judging_with_the_answer_after_it():
    model, judge = loaded(), BlockRank()
    rows = [lists()[0], Labelled("q", ["a", "b c d", "e"], [2.0, 2.0, 0.0])]
    batch = judge.collate(rows, model, 400)
    assert all(len(value) == 2 for value in batch.values()) and batch["positive"].shape == (2, 4)
    for at, one in enumerate(rows):
        order = by_digest(one.query, one.passages)
        size, end = int((batch["segment"][at] != laid_out.PAD).sum()), int(batch["ends"][at])
        alone = judge._lay(one.query, [one.passages[i] for i in order], model)
        assert batch["ids"][at, : end + 1].tolist() == alone.ids.tolist()
        good = [int(one.grades[i] == max(one.grades)) for i in order]
        assert batch["positive"][at].tolist() == good + [-1] * (4 - len(good))
        answer = ", ".join(str(i) for i, g in enumerate(good) if g) + "]"
        assert model.tokenizer.decode(batch["ids"][at, end + 1 : size]) == answer
        assert (batch["segment"][at, end + 1 : size] == TAIL).all()
        assert batch["positions"][at, end:size].tolist() == list(range(int(alone.positions[-1]), int(alone.positions[-1]) + size - end))
    assert judge.collate([Labelled("q " * 90, ["x y z " * 90] * 5, [1.0, 0, 0, 0, 0])], model, 300)["ids"].shape[1] <= 300


@pytest.mark.parametrize("order_free", [True, False])
def test_the_loss_is_that_of_judging_plus_the_cross_entropy_of_the_answer(order_free):
    model, judge = loaded(), BlockRank(order_free=order_free, aux=0.5)
    batch = judge.collate(lists()[:2], model, 400)
    with torch.no_grad():
        found = judge.loss(model.model, None, batch)
    for at, one in enumerate(lists()[:2]):
        order, end = by_digest(one.query, one.passages), int(batch["ends"][at])
        scores = judge.scores([Asked(one.query, [one.passages[i] for i in order])], model)[0]
        expected = 0.5 * info_nce(scores[None], batch["positive"][at][None])[0]
        if not order_free:
            size = int((batch["segment"][at] != laid_out.PAD).sum())
            row = laid_out.Blocks(*(batch[name][at : at + 1, :size] for name in ("ids", "positions", "segment")))
            with torch.no_grad():
                logits = model.model(row.ids, attention_mask=mask(row.segment), position_ids=row.positions).logits[0].log_softmax(-1)
            told = [-logits[p, row.ids[0, p + 1]] for p in range(end, size - 1)]
            expected = expected + sum(told) / len(told)
        torch.testing.assert_close(found[at], expected, atol=2e-4, rtol=1e-4)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("layer", [0, 2])
def test_training_without_identifiers_ends_at_its_layer(layer):
    """The same loss and gradients as with the whole model, in which nothing behind the layer's keys is learned."""
    model, judge = loaded(layers=4), BlockRank(order_free=True, layer=layer, aux=0.5)
    batch = judge.collate(lists(), model, 300)
    options = {"attention_mask": mask(batch["segment"], model.model.dtype), "position_ids": batch["positions"], "use_cache": False}

    def gradients(loss):
        model.model.zero_grad()
        loss.sum().backward()
        return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}

    with _watching(model.model, layer) as looked:
        model.model(input_ids=batch["ids"], **options)
    whole = 0.5 * info_nce(shares(looked[0], batch["ends"], batch["segment"], batch["positive"].shape[1]), batch["positive"])
    wanted, passed = gradients(whole), []
    held = [block.mlp.register_forward_hook(lambda *_: passed.append(1)) for block in model.model.model.layers[layer:]]
    loss = judge.loss(model.model, None, batch)
    found = gradients(loss)
    for one in held:
        one.remove()
    assert torch.equal(loss, whole) and found.keys() == wanted.keys() and not any(f"layers.{layer}.mlp" in name for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in found) and len(passed) == 1  # the layer's own, which does nothing


@pytest.mark.parametrize("order_free", [True, False])
def test_thirty_steps_teach_the_lists(order_free):
    model, judge = loaded(), BlockRank(order_free=order_free, aux=1.0)
    batch = judge.collate(lists(), model, 400)
    optimizer, losses = torch.optim.AdamW(model.model.parameters(), lr=3e-3), []
    model.model.train()
    for _ in range(30):
        loss = judge.loss(model.model, None, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.model.eval()
    assert losses[-1] < 0.3 * losses[0]
    for one in lists():  # in the order they were trained in: without `order_free` an identifier belongs to a passage
        order = by_digest(one.query, one.passages)
        found = judge.answers([Asked(one.query, [one.passages[i] for i in order])], model)[0].order
        assert order[found[0]] == 0


def test_settings():
    assert text(parse("block_rank(layer=3, aux=1.0)", "rank")) == "block_rank(layer=3, aux=1.0)"
    check(BlockRank())
    for bad in ("layer=1.0", "layer=-1", "layer=-0.1", "layer=True", "length=0", "aux=-1.0", "order_free=True, aux=0.0"):
        with pytest.raises(SmeltError):
            parse(f"block_rank({bad})", "rank")
    with pytest.raises(SmeltError, match="needs a decoder"):
        BlockRank().scores([Asked("q", ["a", "b"])], None)
    model = loaded()
    with torch.no_grad():
        model.model.model.embed_tokens.weight[5:].fill_(float("nan"))
    with pytest.raises(SmeltError, match="not finite"):
        BlockRank().scores([Asked("q", ["a", "b"])], model)


@pytest.mark.slow
def test_time_grows_with_the_number_of_passages():
    """20 to 500 passages: 25 times as many in at most 1.6 times as much each. One causal row would take quadratic pairs."""
    model, judge = loaded(hidden=128, ffn=256, context=2048), BlockRank(length=40)
    took = {}
    for n in (20, 500):
        asked, times = [Asked("times three", [f"def f{i}(x): return x * {i} + {i * i}" for i in range(n)])], []
        for _ in range(4):
            start = time.perf_counter()
            judge.scores(asked, model)
            times.append(time.perf_counter() - start)
        took[n] = min(times[1:])
    assert took[500] / took[20] < 25 * 1.6, took


def benchmark():
    place = Path(__file__).parents[2] / "benchmarks" / "rank_latency.py"
    spec = importlib.util.spec_from_file_location("rank_latency", place)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_benchmark_runs(tmp_path):
    made = benchmark()
    assert made.main(["--quick", "--json", str(tmp_path / "found.json")]) == 0
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    lines = {line["judge"]: line for line in results["judges"]}
    calls = {name: (line["calls"], line["chain"]) for name, line in lines.items()}
    assert calls == {"permutation_text": (2, 2), "first_token": (2, 2), "self_calibrated": (2, 1), "block_rank": (1, 1)}
    assert lines["permutation_text"]["faster"] == [1.0, 1.0, 1.0] and lines["permutation_text"]["to_first"] == [0.0, 0.0]
    assert [name for name, line in lines.items() if "ndcg10" not in line] == ["self_calibrated"]  # its heads are new
    assert [len(times) for times in results["scaling"]["seconds"]] == [2, 2, 2] and len(results["scaling"]["slopes"]) == 2


def test_the_benchmark_fits_the_exponent_and_takes_turns(monkeypatch):
    made, clock, begun = benchmark(), [0.0], []

    def order(method, asked, model):
        begun.append(len(asked[0].passages))
        clock[0] += 0.25 * len(asked[0].passages) ** 1.5

    monkeypatch.setattr(made, "order", order)
    monkeypatch.setattr(made.time, "perf_counter", lambda: clock[0])
    asked = made.argparse.Namespace(numbers=[2, 4, 8], tokens=8, rounds=3, block_rank="layer=1")
    found = made.scaling(asked, loaded())
    assert found["exponent"] == pytest.approx((1.5, 1.5, 1.5)) and found["slopes"] == pytest.approx([1.5] * 3)
    assert begun == [2, 4, 8, 4, 8, 2, 8, 2, 4, 2, 4, 8]
    assert found["seconds"] == [pytest.approx([0.25 * n**1.5] * 3) for n in (2, 4, 8)]
