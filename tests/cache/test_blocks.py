from __future__ import annotations

import torch

from smelt.cache._blocks import attended, picked
from smelt.cache._layers import Grown


def test_every_head_gets_its_own_blocks_out_of_its_group():
    held = Grown()
    held.append(torch.randn(2, 3, 29, 5))
    held.append(torch.randn(2, 3, 4, 5))
    assert held.store.shape[2] > 33  # room left over
    index = torch.randint(0, 7, (2, 6, 4))
    found = picked(held, index, 4)
    assert found.shape == (2, 6, 16, 5)
    for b in range(2):
        for head in range(6):
            for place, block in enumerate(index[b, head].tolist()):
                expected = held.rows[b, head // 2, 4 * block : 4 * block + 4]
                assert torch.equal(found[b, head, 4 * place : 4 * place + 4], expected)


def test_what_is_taken_is_a_copy():
    held = Grown()
    held.append(torch.zeros(1, 1, 8, 2))
    picked(held, torch.zeros(1, 1, 1, dtype=torch.long), 4).add_(1)
    assert not held.rows.any()


def test_attention_over_chosen_blocks_is_softmax_over_their_rows():
    keys, values = Grown(), Grown()
    for held in (keys, values):
        held.append(torch.randn(2, 2, 31, 4))
    for m in (1, 9):
        query = 5 * torch.randn(2, 6, m, 3, 4)
        index = torch.stack([torch.randperm(7)[:3] for _ in range(2 * 6 * m)]).view(2, 6, m, 3)
        out, top, total = attended(query, index, keys, values, 4)
        for b in range(2):
            for head in range(6):
                for t in range(m):
                    blocks = [slice(4 * i, 4 * i + 4) for i in index[b, head, t].tolist()]
                    scores = torch.cat([keys.rows[b, head // 3, at] @ q for at, q in zip(blocks, query[b, head, t], strict=True)])
                    rows = torch.cat([values.rows[b, head // 3, at] for at in blocks])
                    torch.testing.assert_close(out[b, head, t] / total[b, head, t], scores.softmax(0) @ rows, atol=1e-5, rtol=1e-4)
                    assert torch.isclose(top[b, head, t, 0] + total[b, head, t, 0].log(), scores.logsumexp(0), atol=1e-4)
