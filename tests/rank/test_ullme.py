from __future__ import annotations

import math

import pytest
import torch

from helpers.rank import LISTS, loaded, right, taught
from smelt.rank.embedding import Embedding
from smelt.rank.ullme import ULLME, agreed, likelihoods, preferred
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


def test_likelihoods_are_a_loop():
    logits, ids, mask = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6)), torch.randint(0, 3, (3, 6))
    said = logits.double().log_softmax(-1)
    for row in range(3):
        wanted = sum(float(said[row, t - 1, ids[row, t]]) for t in range(1, 6) if mask[row, t] == 2)
        assert float(likelihoods(logits, ids, mask)[row]) == pytest.approx(wanted, abs=1e-5)


def test_preferred_and_agreed_are_loops():
    total, near, keep = torch.randn(4, 3) * 5, torch.randn(4, 3), torch.rand(4, 3) > 0.3
    keep[:, 0] = True
    keep[3] = torch.tensor([True, False, False])
    for row in range(4):
        inside = [j for j in range(3) if keep[row, j]]
        each = [-math.log(1 / (1 + math.exp(-0.1 * (total[row, 0] - total[row, j]).item()))) for j in inside[1:]]
        assert preferred(total, keep, 0.1)[row].item() == pytest.approx(sum(each) / len(each) if each else 0.0, abs=1e-5)
        p, q = ([math.exp(x[row, j]) for j in inside] for x in (total, near))
        kl = sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        assert agreed(total, near, keep)[row].item() == pytest.approx(kl, abs=1e-4)


def test_views_that_agree_lose_nothing_and_masked_gradients_are_finite():
    total, keep = torch.randn(2, 3), torch.tensor([[True, True, False], [True, True, True]])
    near = (total + 4.0).requires_grad_()
    loss = agreed(total, near, keep)
    assert loss.abs().max() < 1e-6
    loss.sum().backward()
    assert torch.isfinite(near.grad).all()


@pytest.mark.parametrize("generate", ["sft", "dpo"])
def test_the_loss_is_the_sum_of_its_parts(generate):
    model, both = loaded(), Embedding(bidirectional=True)
    judge = ULLME(generate=generate, generation=0.7, agreement=1.3)
    batch = judge.collate(LISTS, model, 400)
    with torch.no_grad():
        found = judge.loss(model.model, None, batch)
        contrastive = both.loss(model.model, None, batch)
        torch.testing.assert_close(ULLME(generation=0.0, agreement=0.0).loss(model.model, None, batch), contrastive)
        for at, one in enumerate(LISTS):
            tokenizer = model.tokenizer
            head = [tokenizer.bos_token_id, *tokenizer(one.query)["input_ids"], *tokenizer("\n")["input_ids"]]
            totals, means = [], []
            for passage in one.passages:
                ids = head + tokenizer(passage)["input_ids"]
                said = model.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                each = [float(said[t - 1, ids[t]]) for t in range(len(head), len(ids))]
                totals.append(sum(each))
                means.append(sum(each) / len(each))
            wanted = float(contrastive[at])
            if generate == "sft":
                wanted += 0.7 * -means[0]
            else:
                wanted += 0.7 * sum(math.log(1 + math.exp(-0.1 * (totals[0] - t))) for t in totals[1:]) / len(totals[1:])
            cosines = (both.embed(one.passages, model) @ both.embed([one.query], model)[0]) / 0.05
            kl = torch.nn.functional.kl_div(cosines.double().log_softmax(0), torch.tensor(means).double().softmax(0), reduction="sum")
            assert float(found[at]) == pytest.approx(wanted + 1.3 * float(kl), rel=1e-3)


def test_the_agreement_moves_the_embedding_side_only():
    """With the embedding's vectors held still the KL has no gradient at all, so none comes from the generative side."""
    model, judge = loaded(), ULLME(generation=0.0)
    batch = judge.collate(LISTS, model, 400)
    fixed = Still(bidirectional=True)
    object.__setattr__(judge, "judge", fixed)
    assert not judge.loss(model.model, None, batch).requires_grad
    assert ULLME(generation=0.0).loss(model.model, None, batch).requires_grad


@pytest.mark.parametrize("generate", ["sft", "dpo"])
def test_the_generative_part_has_the_gradient_of_its_formula(generate):
    """With the embedding's vectors still, all of the gradient is L_gen's, the KL on or off."""
    model, grads = loaded(), []
    for agreement in (0.0, 1.0):
        judge = ULLME(generate=generate, agreement=agreement)
        batch = judge.collate(LISTS, model, 400)
        object.__setattr__(judge, "judge", Still(bidirectional=True))
        model.model.zero_grad()
        judge.loss(model.model, None, batch).sum().backward()
        grads.append(model.model.model.layers[0].mlp.down_proj.weight.grad.clone())
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-3)


class Still(Embedding):
    def pairs(self, model, batch, layers=None):
        return [(q.detach(), p.detach()) for q, p in super().pairs(model, batch, layers)]


def test_embeddings_see_both_directions():
    model = loaded()
    torch.testing.assert_close(ULLME().embed(["import os"], model), Embedding(bidirectional=True).embed(["import os"], model))


@pytest.mark.parametrize("generate", ["sft", "dpo"])
def test_training_makes_the_loss_fall_and_the_lists_right(generate):
    judge, model = ULLME(generate=generate), loaded()
    _, losses = taught(judge, model)
    assert losses[-1] < 0.7 * losses[0] and right(judge, model)


def test_settings_and_errors():
    method = parse("ullme(judge=embedding(pool='last', bidirectional=True), generate='dpo', agreement=0.5)", "rank")
    assert text(method) == "ullme(judge=embedding(pool='last', bidirectional=True), generate='dpo', agreement=0.5)"
    check(method)
    with pytest.raises(SmeltError, match="is no embedding"):
        ULLME(judge=None)
    with pytest.raises(SmeltError, match="ullme needs a decoder"):
        ULLME().embed(["x"], loaded("bert"))
