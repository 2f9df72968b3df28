from __future__ import annotations

import math

import pytest
import torch

from helpers.rank import LISTS, loaded, right, taught
from smelt.model._tiny import tiny
from smelt.rank._training import write
from smelt.rank.embedding import Embedding
from smelt.rank.lex_sem_bridge import Bridge, LexSemBridge, bridged, scattered
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

KINDS = ["present", "tokens", "likely"]


def test_scattered_is_a_loop():
    values, ids, mask = torch.rand(3, 6), torch.randint(0, 5, (3, 6)), torch.randint(0, 3, (3, 6))
    found = scattered(values, ids, mask, 9)
    for row in range(3):
        for token in range(9):
            each = [float(values[row, t]) for t in range(6) if ids[row, t] == token and mask[row, t] == 2]
            assert float(found[row, token]) == pytest.approx(max(each, default=0.0))


def test_the_gate_is_a_softmax_and_the_vector_unit():
    plain, lexical, heads = torch.randn(2, 4), torch.rand(2, 9), Bridge(9, 4)
    torch.testing.assert_close(bridged(plain, lexical, heads.gate), torch.nn.functional.normalize(plain, dim=-1))
    torch.nn.init.normal_(heads.gate.weight)
    found, weight = bridged(plain, lexical, heads.gate).detach(), heads.gate.weight.detach()
    for row in range(2):
        logit = [math.exp(sum(float(weight[i, j] * lexical[row, j]) for j in range(9))) for i in range(4)]
        gated = [g / sum(logit) * float(plain[row, i]) for i, g in enumerate(logit)]
        length = math.sqrt(sum(x * x for x in gated))
        assert found[row].tolist() == pytest.approx([x / length for x in gated], abs=1e-5)


@pytest.mark.parametrize("words", KINDS)
def test_without_a_trained_map_it_is_the_plain_embedding(words):
    """Before training in the loss, and when asked with a model in whose folder there is none."""
    model, judge, plain = loaded(), LexSemBridge(words=words), Embedding(temperature=0.02)
    batch = judge.collate(LISTS, model, 200)
    with torch.no_grad():
        heads = judge.heads(model.model.config)
        torch.testing.assert_close(judge.loss(model.model, heads, batch), plain.loss(model.model, None, batch), atol=1e-4, rtol=1e-4)
    for query in (False, True):
        torch.testing.assert_close(judge.embed(["import os"], model, query), plain.embed(["import os"], model, query))


@pytest.mark.parametrize("words", KINDS)
def test_training_makes_the_loss_fall_and_the_lists_right(words, tmp_path):
    model, judge = loaded(), LexSemBridge(words=words)
    heads, losses = taught(judge, model)
    write(judge, heads, tmp_path)
    assert losses[-1] < 0.5 * losses[0]
    for used, place in ((judge, model._replace(folder=tmp_path)), (LexSemBridge(words=words, weights=str(tmp_path)), model)):
        assert right(used, place)
        with torch.no_grad():
            wanted = judge.queries(model.model, read_back(judge, tmp_path), *row_of(judge, model))
        torch.testing.assert_close(used.embed([LISTS[0].query], place, True), wanted)
        assert not torch.allclose(wanted, Embedding().embed([LISTS[0].query], model, True), atol=1e-4)
        torch.testing.assert_close(used.embed(["x + 1"], place), Embedding().embed(["x + 1"], model))


def read_back(judge, folder):
    from safetensors.torch import load_file

    heads = judge.heads(tiny("llama").config)
    heads.load_state_dict(load_file(folder / "judge.safetensors"))
    return heads


def row_of(judge, model):
    batch = judge.collate(LISTS[:1], model, 900)
    return batch["query_ids"], batch["query_mask"], batch["special"]


@pytest.mark.parametrize("words", KINDS)
def test_every_gradient_arrives(words):
    model, judge = loaded(), LexSemBridge(words=words)
    heads = judge.heads(model.model.config)
    torch.nn.init.normal_(heads.gate.weight)
    judge.loss(model.model, heads, judge.collate(LISTS, model, 200)).sum().backward()
    own = {"present": heads.present, "tokens": heads.token.weight, "likely": model.model.get_output_embeddings().weight}[words]
    assert heads.gate.weight.grad.abs().sum() > 0 and own.grad.abs().sum() > 0


@pytest.mark.parametrize("words", KINDS)
def test_special_tokens_weigh_nothing(words):
    """Their columns of W can hold anything."""
    model, judge = loaded(), LexSemBridge(words=words)
    heads = judge.heads(model.model.config)
    ids, mask = torch.tensor([[0, 66, 67, 1]]), torch.full((1, 4), 2)
    with torch.no_grad():
        heads.gate.weight.normal_()
        heads.token.bias.fill_(50.0)  # above zero for every token
        special = judge._special(model, 1)
        before = judge.queries(model.model, heads, ids, mask, special)
        heads.gate.weight[:, special[0]] = 1e3
        torch.testing.assert_close(judge.queries(model.model, heads, ids, mask, special), before)
        heads.gate.weight[0, 2:] += 100
        assert not torch.allclose(judge.queries(model.model, heads, ids, mask, special), before)


def test_settings_and_errors():
    method = parse("lex_sem_bridge(words='likely')", "rank")
    assert text(method) == "lex_sem_bridge(words='likely')"
    check(method)
    for judge in (Embedding(echo=True), Embedding(normalize=False), None):
        with pytest.raises(SmeltError, match="without echo is expected"):
            LexSemBridge(judge=judge)
    with pytest.raises(SmeltError, match="parameters that have to be trained"):
        LexSemBridge(weights="/nowhere").embed(["x"], loaded(), True)
    model, judge = loaded("bert"), LexSemBridge(words="likely")
    with pytest.raises(SmeltError, match="BertModel has no language head"):
        judge.loss(model.model, judge.heads(model.model.config), judge.collate(LISTS, model, 200))
