from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from smelt.evaluate import Variant
from smelt.evaluate._beside import Beside
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError

PROBE = SimpleNamespace(tokens=300, document=90, context=48, stride=20, batch=3, prefill=16, chunk=8)


@pytest.fixture
def variant(made):
    return Variant("v", tiny(layers=1), tiny_tokenizer(), teacher=Loaded(tiny(seed=4), tiny_tokenizer(), None), data=made())


def test_every_position_comes_once_with_both_answers(variant):
    beside = Beside(variant, PROBE, "probe")
    seen = [torch.zeros(len(d.ids) - 1) for d in beside.documents]
    for part in beside:
        ids = torch.tensor(beside.documents[part.document].ids)
        n = len(part.following)
        seen[part.document][part.at : part.at + n] += 1
        assert torch.equal(part.following, ids[part.at + 1 : part.at + 1 + n])
        assert part.teacher.shape == part.student.shape == (n, 320)
        if part.at == 0:  # the first window starts with the document: both models read it plainly
            for logits, model in ((part.teacher, variant.teacher.model), (part.student, variant.model)):
                with torch.no_grad():
                    torch.testing.assert_close(logits, model(input_ids=ids[None, :n]).logits[0], rtol=1e-4, atol=1e-4)
    assert all((count == 1).all() for count in seen)
    assert beside.weights == tuple(float(len(count)) for count in seen)


def test_who_cannot_be_compared_is_refused(variant):
    with pytest.raises(SmeltError, match="probe needs a teacher"):
        Beside(dataclasses.replace(variant, teacher=None), PROBE, "probe")
    own = dataclasses.replace(variant, attention="any", teacher=Loaded(variant.model, variant.tokenizer, None))
    with pytest.raises(SmeltError, match="is the model its attention is bound to"):
        Beside(own, PROBE, "probe")
