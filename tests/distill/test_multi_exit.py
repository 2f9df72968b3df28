from __future__ import annotations

import math

import pytest
import torch

from smelt import registry
from smelt.data._tokens import tokenize
from smelt.data.files import Files
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.multi_exit import MultiExit, places
from smelt.model._load import Loaded
from smelt.model._slice import everything, sliced
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.train import Training, teach

IDS = torch.arange(2, 26).view(2, 12)


def loaded(architecture="llama", layers=4, **sizes):
    return Loaded(tiny(architecture, layers=layers, **sizes), tiny_tokenizer(), None)


def call(method, one, labels):
    out = one.model(input_ids=IDS, output_hidden_states=True)
    head = one.model.get_output_embeddings().weight
    return method(out.logits, out.hidden_states, labels, head, method.equipment(one, None)), out


def truncated(model, layers):
    keep = everything(model)
    keep.layers = list(range(layers))
    return sliced(model, keep)


class Spy:
    """An objective that keeps the logits it was shown."""

    def __call__(self, student, labels):
        self.seen = student
        return student.sum(-1)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_exit_is_the_truncated_model_bit_for_bit(architecture, tied):
    one, labels = loaded(architecture, tie_word_embeddings=tied), IDS.roll(-1, 1)
    for p in one.model.model.norm.parameters():
        torch.nn.init.uniform_(p, 0.5, 2)
    for at in (1, 2, 3, 4):
        cut = truncated(one.model, at)
        spy = Spy()
        with torch.no_grad():
            call(MultiExit(exits=(at,), objective=spy), one, labels)
            assert torch.equal(spy.seen, cut(input_ids=IDS).logits)


@pytest.mark.parametrize("to_last", [None, ForwardKL()])
def test_equals_the_slow_sum_with_the_stated_weights(to_last):
    one, labels = loaded(), IDS.roll(-1, 1)
    got, _ = call(MultiExit(exits=(1, 3, 4), to_last=to_last), one, labels)
    rows = {at: truncated(one.model, at)(input_ids=IDS).logits.detach().double() for at in (1, 3, 4)}
    for b in range(2):
        for t in range(IDS.shape[1]):
            total = 0.0
            for at, weight in ((1, 0.25), (3, 0.75), (4, 1.0)):
                z, last = rows[at][b, t], rows[4][b, t]
                loss = math.log(sum(math.exp(x) for x in z.tolist())) - z[labels[b, t]].item()
                if to_last is not None and at < 4:
                    p, q = last.softmax(-1).tolist(), z.softmax(-1).tolist()
                    loss += sum(a * math.log(a / c) for a, c in zip(p, q, strict=True))
                total += weight * loss
            assert got[b, t].item() == pytest.approx(total, rel=1e-4)


def test_the_last_exit_alone_is_the_objective_and_teaches_without_being_taught():
    one, labels = loaded(), IDS.roll(-1, 1)
    got, out = call(MultiExit(exits=(4,)), one, labels)
    assert torch.equal(got, CrossEntropy()(out.logits, labels))
    hidden = tuple(h.detach().requires_grad_() for h in out.hidden_states)
    logits = out.logits.detach().requires_grad_()
    method = MultiExit(exits=(2,), to_last=ForwardKL())
    method(logits, hidden, labels, one.model.get_output_embeddings().weight, method.equipment(one, None)).sum().backward()
    assert logits.grad is None and [h.grad is not None for h in hidden] == [False, False, True, False, False]


def test_a_gradient_of_the_weighted_sum_by_numbers():
    one = loaded(layers=2, hidden=16, heads=2, kv_heads=1)
    made = torch.Generator().manual_seed(0)
    hidden = tuple(torch.randn(1, 3, 16, generator=made, dtype=torch.float64) for _ in range(3))
    head, labels = torch.randn(7, 16, generator=made, dtype=torch.float64), torch.tensor([[0, 3, 6]])
    method = MultiExit(exits=(1, 2))
    equipment = method.equipment(one, None)
    equipment.norm = torch.nn.LayerNorm(16, dtype=torch.float64)  # the norms of transformers compute in float32

    def loss(h, z):
        return method(z, (hidden[0], h, hidden[2]), labels, head, equipment)

    z = torch.randn(1, 3, 7, generator=made, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, (hidden[1].requires_grad_(), z.requires_grad_()))


def test_places():
    assert places((), 8) == (2, 4, 6, 8) and places((), 5) == (2, 3, 4, 5) and places((), 1) == (1,)
    assert places((36, 4, 4, 9), 36) == (4, 9, 36)
    with pytest.raises(SmeltError, match="block 5, but the student has 4"):
        MultiExit(exits=(5,)).equipment(loaded(), None)


def test_what_cannot_be_is_refused():
    with pytest.raises(SmeltError, match="final_logit_softcapping"):
        MultiExit().equipment(loaded("gemma2", final_logit_softcapping=30.0), None)
    with pytest.raises(SmeltError, match="ForwardKL, which reads student, teacher"):
        MultiExit(objective=ForwardKL())
    with pytest.raises(SmeltError, match="multi_exit: to_last is CrossEntropy"):
        MultiExit(to_last=CrossEntropy())
    made = registry.parse("multi_exit(exits=[1, 2], to_last=forward_kl())", "distill")
    assert made == MultiExit(exits=(1, 2), to_last=ForwardKL()) and registry.parse(registry.text(made), "distill") == made


def test_a_training_lowers_the_loss_of_an_early_exit_and_trains_the_shared_norm_once(tmp_path):
    (tmp_path / "a.txt").write_text("def f(x):\n    return x + 1\n" * 200)
    corpus = Files(str(tmp_path / "a.txt"), validation=0.0, test=0.0)
    tokens = tokenize(corpus, "train", tiny_tokenizer(), tmp_path / "tokens")
    settings = Training(data=corpus, tokens=30 * 4 * 16, context=16, batch=4, lr=1e-2)
    early = {}
    for name, method in (("exits", MultiExit(exits=(1, 3))), ("last", MultiExit(exits=(3,))), ("plain", CrossEntropy())):
        one = loaded(layers=3, hidden=32, heads=2, kv_heads=1)
        teach(one, None, tokens, method, settings, tmp_path / name)
        with torch.no_grad():
            ids = torch.tensor(tokens.ids[:64].astype("int64"))[None]
            early[name] = CrossEntropy()(truncated(one.model, 1)(input_ids=ids).logits[:, :-1], ids[:, 1:]).mean().item()
    assert early["exits"] < early["last"] - 0.5
    assert early["last"] == early["plain"]  # the norm that equipment holds is not stepped twice
