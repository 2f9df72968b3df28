from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from smelt.model._tiny import tiny
from smelt.weights._importance import Energy, influence, mean_loss, removal_loss


def states(model, batch):
    """Hidden states entering the first block and leaving every block, by running the blocks by hand."""
    found = []
    hooks = [model.model.layers[0].register_forward_pre_hook(lambda m, a: found.append(a[0]))]
    hooks += [layer.register_forward_hook(lambda m, a, o: found.append(o)) for layer in model.model.layers]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def test_energies_equal_a_loop_over_tokens(rows):
    model = tiny("llama")
    seen = Energy(model, rows)
    inputs = {"o": [], "down": [], "norm": []}
    block = model.model.layers[1]
    hooks = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, a: inputs["o"].append(a[0])),
        block.mlp.down_proj.register_forward_pre_hook(lambda m, a: inputs["down"].append(a[0])),
        model.model.norm.register_forward_hook(lambda m, a, o: inputs["norm"].append(o)),
    ]
    heads, neurons, normed, count = torch.zeros(4).double(), torch.zeros(96).double(), torch.zeros(64).double(), 0
    for at, batch in enumerate(rows):
        model(**batch)
        for b, t in batch["attention_mask"].nonzero().tolist():
            count += 1
            x = inputs["o"][at][b, t]
            for h in range(4):
                part = slice(16 * h, 16 * h + 16)
                heads[h] += (block.self_attn.o_proj.weight[:, part] @ x[part]).square().sum()
            neurons += inputs["down"][at][b, t].square()
            normed += inputs["norm"][at][b, t].square()
    for hook in hooks:
        hook.remove()
    assert seen.count == count == sum(int(batch["attention_mask"].sum()) for batch in rows)
    assert_close(seen.heads(1), heads, rtol=1e-5, atol=0)
    columns = torch.tensor([block.mlp.down_proj.weight[:, i].norm() for i in range(96)])
    assert_close(seen.neurons(1), neurons.sqrt() * columns, rtol=1e-5, atol=0)
    assert_close(seen.sums["normed", "model.norm"], normed, rtol=1e-5, atol=0)
    assert_close(seen.channels(), sum((v / count).sqrt() for (kind, _), v in seen.sums.items() if kind == "normed"))
    assert len([k for k in seen.sums if k[0] == "normed"]) == 5


@torch.no_grad()
def test_padding_never_counts(rows):
    model = tiny("llama")
    changed = [dict(batch) for batch in rows]
    changed[1]["input_ids"] = torch.where(rows[1]["attention_mask"].bool(), rows[1]["input_ids"], 7)
    assert not torch.equal(changed[1]["input_ids"], rows[1]["input_ids"])
    a, b = Energy(model, rows), Energy(model, changed)
    for key, value in a.sums.items():
        assert_close(b.sums[key], value, rtol=1e-5, atol=1e-7)
    assert mean_loss(model, rows) == pytest.approx(mean_loss(model, changed), rel=1e-5)
    windows = [[0], [1]]
    assert influence(model, rows, windows) == pytest.approx(influence(model, changed, windows), rel=1e-4)


@torch.no_grad()
def test_loss_equals_transformers_own(rows):
    model = tiny("llama")
    assert mean_loss(model, rows[:1]) == pytest.approx(model(**rows[0], labels=rows[0]["input_ids"]).loss.item(), rel=1e-5)


@torch.no_grad()
def test_influence_reads_blocks_not_the_final_norm(rows):
    model = tiny("llama", layers=3)
    for windows in ([[0], [1], [2]], [[0, 1], [1, 2]]):
        want = []
        for window in windows:
            cosines = []
            for batch in rows:
                found = states(model, batch)
                for b, t in batch["attention_mask"].nonzero().tolist():
                    x, y = found[window[0]][b, t], found[window[-1] + 1][b, t]
                    cosines.append((x @ y / x.norm() / y.norm()).item())
            want.append(1 - sum(cosines) / len(cosines))
        assert influence(model, rows, windows) == pytest.approx(want, rel=1e-4)


@torch.no_grad()
def test_a_layer_that_does_nothing_costs_nothing(rows):
    model = tiny("llama", layers=3)
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.model.layers[1].mlp.down_proj.weight.zero_()
    losses = removal_loss(model, rows, [[0], [1], [2], [1, 2]])
    whole = mean_loss(model, rows)
    assert losses[1] == pytest.approx(whole, rel=1e-6) and abs(losses[0] - whole) > 1e-3
    assert losses[3] == pytest.approx(losses[2], rel=1e-6)
    assert influence(model, rows, [[0], [1], [2]])[1] == pytest.approx(0, abs=1e-6)
    assert all("forward" not in vars(layer) for layer in model.model.layers), "the blocks are restored"
