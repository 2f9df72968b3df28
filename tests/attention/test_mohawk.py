"""MOHAWK: the state space against its explicit matrix and its recurrence, what is learned from which loss."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from smelt.attention._heads import attended, heads, weights
from smelt.attention._mixer import State, convert, place
from smelt.attention.mohawk import Mohawk, faded, matrix, scan
from smelt.model._tiny import tiny
from smelt.model._walk import parts
from smelt.spec import SmeltError


def drawn(t, batch=2, h=3, d=5, n=4):
    x, b, c = (torch.randn(batch, h, t, width) for width in (d, n, n))
    return x, b, c, -torch.nn.functional.softplus(2 * torch.randn(batch, h, t))


def recurrence(x, b, c, fade):
    """Token by token in float64."""
    x, b, c, a = x.double(), b.double(), c.double(), fade.double().exp()
    state = torch.zeros(*x.shape[:2], b.shape[-1], x.shape[-1], dtype=torch.double)
    out = []
    for i in range(x.shape[2]):
        state = a[:, :, i, None, None] * state + b[:, :, i, :, None] * x[:, :, i, None, :]
        out.append((c[:, :, i, None] @ state)[:, :, 0])
    return torch.stack(out, 2).float(), state.float()


def entries(b, c, fade, skip):
    """T by its definition."""
    made = torch.zeros(*fade.shape, fade.shape[-1])
    for i in range(fade.shape[-1]):
        for j in range(i + 1):
            made[..., i, j] = (c[:, :, i] * b[:, :, j]).sum(-1) * fade[:, :, j + 1 : i + 1].sum(-1).exp()
        made[..., i, i] += skip
    return made


@pytest.mark.parametrize("t", [1, 7, 8, 9, 33])
def test_chunks_and_the_matrix_and_the_recurrence_are_one(t, monkeypatch):
    monkeypatch.setattr("smelt.attention.mohawk.CHUNK", 8)
    x, b, c, fade = drawn(t)
    skip = torch.randn(3)
    y, state = scan(x, b, c, fade)
    wanted, last = recurrence(x, b, c, fade)
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-4)
    made = matrix(b, c, fade, skip)
    torch.testing.assert_close(made, entries(b, c, fade, skip), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(made @ x, wanted + skip[:, None, None] * x, atol=1e-5, rtol=1e-4)
    held, pieces = None, []
    for start, stop in pairwise(sorted({0, t // 3, t // 2, t})):
        out, held = scan(*(z[:, :, start:stop] for z in (x, b, c, fade)), held)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 2), wanted, atol=1e-5, rtol=1e-4)


def test_a_memory_that_fades_at_once_gives_finite_figures_and_gradients_and_the_next_ones_stay_exact():
    fade = torch.cat([torch.full((1, 1, 60), -60.0), torch.full((1, 1, 20), -0.01)], 2).requires_grad_(True)
    made = faded(fade)
    assert float(made.detach()[0, 0, :60, :60].sub(torch.eye(60)).abs().max()) < 1e-20
    far = torch.arange(20.0)
    torch.testing.assert_close(made[0, 0, 60:, 60:], (-0.01 * (far[:, None] - far)).exp().tril(), atol=1e-6, rtol=1e-6)
    made.sum().backward()
    assert torch.isfinite(fade.grad).all()


def converted(method=None, architecture="llama"):
    torch.manual_seed(0)
    model = tiny(architecture)
    return model, convert(model, method or Mohawk(state=8))


def shaken(pairs):
    with torch.no_grad():
        for _, mixer in pairs.values():
            for p in mixer.parameters():
                p.add_(0.1 * torch.randn_like(p))


def test_the_mixer_is_its_parts_token_by_token():
    """Convolution, gate and skip by loops; the step form leaves the same state as the whole row."""
    _, pairs = converted()
    shaken(pairs)
    mixer, hidden = pairs[0][1], torch.randn(2, 11, 64)
    made, state = mixer.mix(hidden, (None, None), None, None), State()
    given = torch.cat([mixer.x_proj(hidden), mixer.b_proj(hidden), mixer.c_proj(hidden)], -1)
    smooth = torch.stack(
        [mixer.conv_bias + sum(mixer.conv[3 - back] * given[:, i - back] for back in range(4) if i >= back) for i in range(11)], 1
    )
    x, b, c = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in smooth.split([64, 32, 32], -1))
    fade = -torch.nn.functional.softplus(mixer.fade_proj(hidden)).transpose(1, 2)
    y = recurrence(x, b, c, fade)[0] + mixer.skip[:, None, None] * x
    gate = mixer.gate_proj(hidden)
    wanted = mixer.o_proj(y.transpose(1, 2).flatten(2) * gate * gate.sigmoid())
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-4)
    steps = [mixer.mix(hidden[:, i : i + 1], (None, None), state, None) for i in range(11)]
    torch.testing.assert_close(torch.cat(steps, 1), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.held["conv"], given[:, -3:])
    torch.testing.assert_close(state.held["sums"], recurrence(x, b, c, fade)[1], atol=1e-5, rtol=1e-4)


def test_a_long_row_goes_in_passes(monkeypatch):
    _, pairs = converted()
    shaken(pairs)
    mixer, hidden = pairs[0][1], torch.randn(2, 50, 64)
    real = torch.ones(2, 50, dtype=torch.bool)
    real[0, :23] = False
    whole = mixer.mix(hidden, (None, None), None, real)
    monkeypatch.setattr("smelt.attention.mohawk.SPAN", 7)
    torch.testing.assert_close(mixer.mix(hidden, (None, None), None, real), whole, atol=1e-5, rtol=1e-4)


def test_padding_neither_enters_nor_fades():
    _, pairs = converted()
    shaken(pairs)
    mixer, hidden = pairs[0][1], torch.randn(1, 12, 64)
    mixer.conv.data[:-1] = 0  # the convolution alone sees where padding was
    real = torch.ones(1, 12, dtype=torch.bool)
    real[0, 4:7] = False
    with_gap = mixer.mix(hidden, (None, None), None, real)[real]
    torch.testing.assert_close(with_gap, mixer.mix(hidden[real][None], (None, None), None, None)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_values_and_output_begin_as_attentions(architecture):
    """With T set to A, the mixer is attention: what is left to learn is the matrix."""
    model, pairs = converted(architecture=architecture)
    was, mixer = pairs[0]
    for name, p in model.named_parameters():
        if name.endswith("v_proj.bias"):
            nn.init.normal_(p)
    mixer.start(was)
    hidden, angle = torch.randn(2, 9, 64), torch.randn(1, 9, 16)
    angles = angle.cos(), angle.sin()
    query, key, value = heads(was, hidden, angles)
    x, *_ = mixer.streams(hidden, {}, None)
    y = weights(query, key, was.scaling) @ x - mixer.skip[:, None, None] * x
    wanted = was.o_proj(attended(query, key, value, was.scaling).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer.out(hidden, x, y), wanted, atol=1e-5, rtol=1e-4)
    memory = 1 / torch.nn.functional.softplus(mixer.fade_proj.bias)
    torch.testing.assert_close(memory, 2 * 64 ** (torch.arange(4) / 3), rtol=1e-4, atol=1e-4)
    assert not {id(p) for p in mixer.parameters()} & {id(p) for p in was.parameters()}  # all of it learns, the teacher stands still


def test_the_losses_are_the_two_norms_one_after_the_other():
    _, pairs = converted()
    shaken(pairs)
    was, mixer = pairs[0]
    hidden, angle = torch.randn(2, 9, 64), torch.randn(1, 9, 16)
    angles = angle.cos(), angle.sin()
    with torch.no_grad():
        first, still, second, last = (Mohawk(state=8, matrix=0.4).lost(mixer, was, hidden, angles, at) for at in (0.0, 0.39, 0.4, 0.99))
        assert torch.equal(first, still) and torch.equal(second, last)
        assert torch.equal(Mohawk(state=8, matrix=0.0).lost(mixer, was, hidden, angles, 0.0), second)
        assert torch.equal(Mohawk(state=8, matrix=1.0).lost(mixer, was, hidden, angles, 0.99), first)
        query, key, value = heads(was, hidden, angles)
        _, b, c, fade, _ = mixer.streams(hidden, {}, None)
        gap = entries(b, c, fade, mixer.skip) - weights(query, key, was.scaling)
        frobenius = torch.stack([torch.stack([gap[r, h].pow(2).sum().sqrt() for h in range(4)]).mean() for r in range(2)])
        wanted = was.o_proj(attended(query, key, value, was.scaling).transpose(1, 2).flatten(2))
        apart = (mixer.mix(hidden, angles, None, None) - wanted).pow(2).sum(-1).sqrt()
    torch.testing.assert_close(first, frobenius[:, None].expand(2, 9), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second, apart, atol=1e-4, rtol=1e-4)


def test_the_matrix_alone_teaches_what_makes_the_matrix():
    _, pairs = converted()
    was, mixer = pairs[0]
    angle = torch.randn(1, 9, 16)
    Mohawk(state=8).lost(mixer, was, torch.randn(2, 9, 64), (angle.cos(), angle.sin()), 0.0).mean().backward()
    moved = {name for name, p in mixer.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0}
    assert moved == {"b_proj.weight", "c_proj.weight", "fade_proj.weight", "fade_proj.bias", "conv", "conv_bias", "skip"}
    assert float(mixer.conv.grad[..., :64].abs().sum()) == 0  # those of x


def test_a_matrix_it_can_have_is_learned():
    """Accept (b): the teacher's matrices are a mixer's own."""
    _, pairs = converted()
    teacher, student = pairs[0][1], pairs[1][1]
    hidden = torch.randn(1, 10, 64)
    with torch.no_grad():
        teacher.fade_proj.weight.normal_(0, 0.1)
        _, b, c, fade, _ = teacher.streams(hidden, {}, None)
        wanted = matrix(b, c, fade, teacher.skip)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500, 1e-6)
    for _ in range(500):
        _, b, c, fade, _ = student.streams(hidden, {}, None)
        loss = torch.linalg.matrix_norm(matrix(b, c, fade, student.skip) - wanted).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    assert loss.item() < 1e-3


def test_the_transfer_comes_nearer_in_each_norm_and_leaves_the_model_alone():
    """Accept (d)."""
    model, pairs = converted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    was, mixer = pairs[0]
    hidden, angle = torch.randn(4, 24, 64), torch.randn(1, 24, 16)
    angles = angle.cos(), angle.sin()
    model.requires_grad_(False)
    method = Mohawk(state=8, matrix=0.5)
    optimizer = torch.optim.Adam(method.learned(mixer), lr=1e-2)
    losses = []
    for step in range(200):
        optimizer.zero_grad()
        loss = method.lost(mixer, was, hidden, angles, step / 200).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[99] < 0.6 * losses[0] and losses[199] < 0.6 * losses[100], losses
    place(model, pairs)
    after = dict(model.named_parameters())
    kept = [name for name in before if "self_attn" not in name]
    assert kept and all(torch.equal(after[name], before[name]) for name in kept)


def test_the_state_is_the_same_at_any_length():
    method, config = Mohawk(state=8, layers=(1,)), tiny().config
    h, d = parts(config).heads, parts(config).head_dim
    assert method.state_bytes(config, 5) == method.state_bytes(config, 1 << 20) == h * (3 * (d + 16) * 4 + 8 * d * 4)
    model, pairs = converted(Mohawk(state=8))
    place(model, pairs)
    past = DynamicCache()
    with torch.no_grad():
        model(torch.randint(2, 300, (1, 20)), past_key_values=past)
    assert {name: tuple(x.shape) for name, x in past.layers[0].held.items()} == {"conv": (1, 3, h * (d + 16)), "sums": (1, h, 8, d)}


def test_other_attention_is_refused():
    with pytest.raises(SmeltError, match="mohawk learns from full attention"):
        convert(tiny("mistral", sliding_window=8), Mohawk())


def test_it_is_built_without_memory():
    with torch.device("meta"):
        model = tiny("llama")
        place(model, convert(model, Mohawk()))
    assert all(p.is_meta for p in model.parameters())
