from __future__ import annotations

import math

import torch

from smelt.distill._dual_space import attention, pooled, projection, scaled


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks():
    keep, kept = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    keep[0, :2], kept[1, 4:] = False, False
    return keep, kept


def test_attention_sums_to_one_with_nothing_on_padding_and_equals_the_slow_one():
    keep, kept = masks()
    query, key = random(2, 5, 6), random(2, 7, 6, seed=1)
    there, back = attention(query, key, keep, kept)
    torch.testing.assert_close(there.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(back.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    assert not there[keep][~kept[:, None].expand(2, 5, 7)[keep]].any()
    assert not back[kept][~keep[:, None].expand(2, 7, 5)[kept]].any()
    for b in range(2):
        for i in range(5):
            for j in range(7):
                if keep[b, i] and kept[b, j]:
                    score = [math.exp(query[b, i] @ key[b, k] / math.sqrt(6)) if kept[b, k] else 0.0 for k in range(7)]
                    torch.testing.assert_close(there[b, i, j].item(), score[j] / sum(score))
                    score = [math.exp(query[b, k] @ key[b, j] / math.sqrt(6)) if keep[b, k] else 0.0 for k in range(5)]
                    torch.testing.assert_close(back[b, j, i].item(), score[i] / sum(score))


def test_scaled_has_standard_deviation_one_over_kept_positions_whatever_the_padding():
    _, kept = masks()
    x = random(2, 7, 6) * 3 + 1
    made = scaled(x, kept)
    torch.testing.assert_close(made, x / x[kept].std())
    torch.testing.assert_close(scaled(x.masked_fill(~kept[..., None], 1e3), kept)[kept], made[kept])


def test_pooled_keeps_the_sum_of_every_row():
    keep, kept = masks()
    loss = random(2, 7)
    made = pooled(loss, kept, keep)
    torch.testing.assert_close(torch.where(keep, made, 0.0).sum(-1), torch.where(kept, loss, 0.0).sum(-1))
    assert not made[~keep].any()


def test_projection_is_exact_in_the_span_and_orthogonal_outside():
    source, hidden = random(40, 6), random(9, 8, seed=2)
    inside, outside = source @ random(6, 8, seed=1), random(40, 8, seed=3)
    torch.testing.assert_close(hidden @ projection(inside, source) @ source.mT, hidden @ inside.mT, rtol=0, atol=1e-10)
    rest = hidden @ outside.mT - hidden @ projection(outside, source) @ source.mT
    assert rest.abs().max() > 1
    assert (rest @ source).abs().max() < 1e-10
    gram = torch.linalg.pinv(source.mT @ source, hermitian=True)
    torch.testing.assert_close(projection(outside, source, gram), (torch.linalg.pinv(source) @ outside).mT, rtol=0, atol=1e-10)
