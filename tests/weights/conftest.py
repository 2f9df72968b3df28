"""Calibration rows, a briefly trained model, and planted outliers for the tests of the weights family."""

from __future__ import annotations

import copy

import pytest
import torch

from smelt.data.stdlib import Stdlib
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import blocks


def batches(ids, count=2, rows=8, context=48, seed=0):
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - context, (count, rows), generator=draw)
    made = [torch.stack([ids[i : i + context] for i in part]) for part in starts.tolist()]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in made]


@pytest.fixture
def rows():
    """Two batches of random ids, the second with padding on the left and on the right."""
    made = batches(torch.randint(2, 320, (2000,), generator=torch.Generator().manual_seed(1)), rows=3, context=16)
    made[1]["attention_mask"][0, :5] = 0
    made[1]["attention_mask"][2, 9:] = 0
    return made


@pytest.fixture(scope="session")
def text():
    """Token ids of a few modules of the standard library."""
    found, size = [], 0
    for document in Stdlib().documents("validation"):
        found.append(document.text)
        size += len(document.text)
        if size > 150_000:
            break
    return torch.tensor(tiny_tokenizer()("\n".join(found)[:150_000], verbose=False)["input_ids"])


@pytest.fixture(scope="session")
def trained(text):
    """(model, calibration rows, held-out rows): a tiny llama after a few seconds of training."""
    torch.manual_seed(0)
    model = tiny("llama", layers=3, initializer_range=0.05, seed=0)
    seen, held = text[: len(text) * 3 // 4], text[len(text) * 3 // 4 :]
    steps = 90
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step, batch in enumerate(batches(seen, steps, 16, 48)):
        model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
    return model.eval(), batches(seen, seed=1), batches(held, 2, 16, seed=2)


@pytest.fixture
def plant():
    """Outlier channels that leave the function unchanged: a norm's gain times `factor`, its consumers' columns divided.

    Small models have none by themselves, so methods that look at activations show no gain on them without this.
    """

    def planted(model, channels=6, factor=20.0, seed=0):
        made, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for block in blocks(made):
                attention, mlp = block.self_attn, block.mlp
                for norm, consumers in (
                    (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                    (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
                ):
                    chosen = torch.randperm(len(norm.weight), generator=draw)[:channels]
                    norm.weight[chosen] *= factor
                    for consumer in consumers:
                        consumer.weight[:, chosen] /= factor
        return made

    return planted
