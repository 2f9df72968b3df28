"""What tests of cache layers that read queries share: random rows, the attention they are handed, and feeding a layer as a model does."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def random_rows(heads, group, width, tokens, batch=2):
    """Queries [b, heads * group, t, width], keys and values [b, heads, t, width]."""
    return [torch.randn(batch, count, tokens, width) for count in (heads * group, heads, heads)]


def run(query, key, value, mask):
    """sdpa as a model calls it: [b, t, h, d]."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    causal = mask is None and query.shape[2] > 1
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal).transpose(1, 2)


def see(layer, query, key, value, run=run):
    """One call of the model: update, then attend under the mask that transformers would make."""
    t, seen = query.shape[2], layer.get_seq_length()
    columns, offset = layer.get_mask_sizes(t)
    mask = (torch.arange(columns) + offset <= torch.arange(t)[:, None] + seen)[None, None] if t > 1 and seen else None
    run.scaling = query.shape[3] ** -0.5  # what sdpa multiplies by
    return layer.update(key, value)[0].attend(query, mask, run)


def feed(layer, rows, sizes, run=run):
    """The outputs [b, t, h, d] of the rows fed in calls of these sizes."""
    outputs, start = [], 0
    for size in sizes:
        outputs.append(see(layer, *(part[:, :, start : start + size] for part in rows), run=run))
        start += size
    return torch.cat(outputs, 1)


def positions(layer, key):
    """[b, h, rows]: which of `key` [b, h, n, d] the layer holds."""
    same = (layer.key_rows.rows[:, :, :, None] == key[:, :, None]).all(-1)
    assert (same.sum(-1) == 1).all()
    return same.int().argmax(-1)
