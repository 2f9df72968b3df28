"""What tests of judges that learn share: three labelled lists, a tiny judge, a short training, and whether it took."""

from __future__ import annotations

import torch

from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Asked
from smelt.rank._training import Labelled

LISTS = [
    Labelled("import os", ["os.listdir(1)", "x + 1"], [2.0, -1.0]),
    Labelled("def f(x):", ["return x + 1", "print(name)", "pass"], [3.0, 0.0, -1.0]),
    Labelled("class A:", ["pass # A", "import os"], [1.0, -2.0]),
]


def loaded(architecture="llama", **more):
    return Loaded(tiny(architecture, **more), tiny_tokenizer(), None)


def taught(judge, model, steps=30, lists=LISTS, length=200):
    """(heads, losses) of AdamW on the lists; the heads are None where the judge has none."""
    heads, losses = judge.heads(model.model.config), []
    batch = judge.collate(lists, model, length)
    assert all(len(value) % len(lists) == 0 for value in batch.values())
    model.model.train()
    optimizer = torch.optim.AdamW([*model.model.parameters(), *(heads.parameters() if heads else ())], lr=1e-3)
    for _ in range(steps):
        loss = judge.loss(model.model, heads, batch)
        assert loss.shape == (len(lists),) and loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(float(loss.detach().mean()))
    model.model.eval()
    return heads, losses


def right(judge, model, lists=LISTS):
    """Does it put the first passage of every list, which has the highest grade, first?"""
    answers = judge.answers([Asked(one.query, one.passages) for one in lists], model)
    return [a.order[0] for a in answers] == [0] * len(lists)
