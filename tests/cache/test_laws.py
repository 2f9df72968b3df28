"""Laws of every cache method. None is named here."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer

from smelt import registry
from smelt.cache._layers import Evicting
from smelt.model._tiny import tiny
from smelt.runtime import bind, cache_bytes, new_cache
from smelt.spec import SmeltError

METHODS = registry.names("cache")
CLASSES = [registry.load("cache", name) for name in METHODS]
WORKING = [pytest.param(make(), id=registry.text(make())) for cls in CLASSES for make in (cls, cls.example)]
UNLIMITED = [pytest.param(cls.unlimited(), id=name) for name, cls in zip(METHODS, CLASSES)]
NO_ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
HEADS, WIDTH = 2, 32


@pytest.fixture(scope="module")
def decoder():
    return tiny("llama", hidden=128, heads=4, kv_heads=HEADS, context=512, **NO_ENDS)


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(2, 320, (rows, tokens))


def draw(tokens: int, batch: int = 1, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, HEADS, tokens, WIDTH, dtype=dtype), torch.randn(batch, HEADS, tokens, WIDTH, dtype=dtype)


def feed(layer, key, value, sizes):
    """Give rows in pieces of these sizes; returns what attention was shown each time, copied."""
    shown, start = [], 0
    for size in sizes:
        k, v = layer.update(key[:, :, start : start + size], value[:, :, start : start + size])
        shown.append((k.clone(), v.clone()))
        start += size
    return shown


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))


@pytest.fixture(scope="module")
def layer_of(decoder):
    return lambda method: method.layer(decoder.config, 0)


@pytest.mark.parametrize("method", UNLIMITED)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=["greedy", "beams", "returned"]
)
def test_an_unlimited_budget_writes_what_the_full_cache_writes(decoder, method, options):
    prompt = ids(2, 40)
    settings = {"max_new_tokens": 30, "do_sample": False, **options}
    plain = decoder.generate(prompt, **settings)
    with bind(decoder, cache=method):
        assert torch.equal(decoder.generate(prompt, **settings), plain)


@pytest.mark.parametrize("method", UNLIMITED)
def test_an_unlimited_budget_shows_what_dynamic_layer_shows(layer_of, method):
    key, value = draw(130, batch=2)
    sizes = [50, 1, 1, 7, 1, 64, 1, 5]
    layer, plain = layer_of(method), DynamicLayer()
    start = 0
    for size in sizes:
        piece = key[:, :, start : start + size], value[:, :, start : start + size]
        assert layer.get_mask_sizes(size) == plain.get_mask_sizes(size)
        mine, theirs = layer.update(*piece), plain.update(*piece)
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
        start += size
    assert layer.get_seq_length() == plain.get_seq_length() == 130


@pytest.mark.parametrize("method", [case for case in WORKING if isinstance(case.values[0], Evicting)])
def test_token_by_token_equals_dense_attention_under_the_mask_of_what_survived(layer_of, method):
    tokens = 90
    key, value = draw(tokens)
    query = torch.randn(1, HEADS, tokens, WIDTH)
    layer = layer_of(method)
    stayed = [[] for _ in range(HEADS)]  # of each head: the positions kept so far
    mask = torch.zeros(1, HEADS, tokens, tokens, dtype=torch.bool)
    for t in range(tokens):
        for head in range(HEADS):
            stayed[head].append(t)
            mask[0, head, t, stayed[head]] = True
        held = torch.tensor(stayed)[None, ..., None].expand(-1, -1, -1, WIDTH)
        index = method.survivors(key.gather(2, held), value.gather(2, held))
        assert index.shape == (1, HEADS, method.kept(t + 1))
        stayed = [[stayed[head][i] for i in index[0, head].tolist()] for head in range(HEADS)]
    dense = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    for t, (k, v) in enumerate(feed(layer, key, value, [1] * tokens)):
        torch.testing.assert_close(scaled_dot_product_attention(query[:, :, t : t + 1], k, v), dense[:, :, t : t + 1], atol=1e-6, rtol=1e-5)
    assert layer.get_mask_sizes(1) == (len(stayed[0]) + 1, tokens - len(stayed[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", WORKING)
def test_the_bytes_held_are_those_of_the_formula(decoder, method, dtype):
    for tokens in (1, 7, 8, 9, 16, 17, 31, 64, 127, 128, 129, 333):
        cache = new_cache(decoder, method)
        for layer in cache.layers:
            layer.update(*draw(tokens, batch=3, dtype=dtype))
        assert cache_bytes(cache) == method.bytes_held(decoder.config, tokens, dtype.itemsize, batch=3), tokens
    stepped = new_cache(decoder, method)
    for tokens in range(1, 200):
        for layer in stepped.layers:
            layer.update(*draw(1, dtype=dtype))
        assert cache_bytes(stepped) == method.bytes_held(decoder.config, tokens, dtype.itemsize), tokens
    stepped.reset()
    assert cache_bytes(stepped) == 0 == method.bytes_held(decoder.config, 0)


@pytest.mark.parametrize("method", WORKING)
def test_an_example_holds_fewer_bytes_than_the_full_cache(decoder, method):
    full = 2 * 2 * HEADS * 300 * WIDTH * 4
    if method == type(method).example():
        assert method.bytes_held(decoder.config, 300) < full
    assert method.bytes_held(decoder.config, 1 << 20) < 2 * 2 * HEADS * (1 << 20) * WIDTH * 4


@pytest.mark.parametrize("method", WORKING + UNLIMITED)
def test_update_shows_as_many_rows_as_the_mask_has_columns_and_counts_what_it_saw(layer_of, method):
    layer, seen = layer_of(method), 0
    for size in [1, 1, 30, 1, 17, 1, 1, 40, 3]:
        columns, offset = layer.get_mask_sizes(size)
        key, value = layer.update(*draw(size, batch=2))
        seen += size
        assert key.shape == value.shape == (2, HEADS, columns, WIDTH)
        assert columns + offset == seen == layer.get_seq_length()
        assert layer.get_max_length() == -1


@pytest.mark.parametrize("method", WORKING)
def test_the_new_tokens_come_last_and_exactly(layer_of, method):
    layer = layer_of(method)
    for size in [20, 1, 5, 1, 40, 2]:
        new = draw(size)
        shown = layer.update(*new)
        assert all(torch.equal(s[:, :, -size:], n) for s, n in zip(shown, new))


@pytest.mark.parametrize("method", WORKING)
def test_reset_repeats_and_holds_nothing_over(layer_of, method):
    layer = layer_of(method)
    key, value = draw(80)
    sizes = [33, *[1] * 40, 7]
    first = feed(layer, key, value, sizes)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert same(feed(layer, key, value, sizes), first)
    layer.reset()
    layer.update(*draw(3, batch=4))  # another batch size after a reset


BATCH = {
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1, 2])),
}
ROWS = {
    "reorder": lambda rows: rows[torch.tensor([2, 0, 0])],
    "repeat": lambda rows: rows.repeat_interleave(2, 0),
    "select": lambda rows: rows[torch.tensor([1, 2])],
}


@pytest.mark.parametrize("change", BATCH)
@pytest.mark.parametrize("method", WORKING)
def test_batch_operations_commute_with_update(layer_of, method, change):
    key, value = draw(110, batch=3)
    sizes = [45, *[1] * 30]
    before, after = layer_of(method), layer_of(method)
    feed(before, key, value, sizes)
    BATCH[change](before)  # now, with the tokens that follow changed the same way
    feed(after, ROWS[change](key), ROWS[change](value), sizes)  # the rows as if they had always been those
    tail = [ROWS[change](key)[:, :, 75:], ROWS[change](value)[:, :, 75:]]
    assert same(feed(before, *tail, [1] * 35), feed(after, *tail, [1] * 35))


@pytest.mark.parametrize("method", WORKING)
def test_one_row_does_not_change_another(layer_of, method):
    key, value = draw(90, batch=2)
    sizes = [31, *[1] * 59]
    other = key.clone(), value.clone()
    for rows in other:
        rows[1] = 9 * torch.randn_like(rows[1])
    one, two = feed(layer_of(method), key, value, sizes), feed(layer_of(method), *other, sizes)
    assert all(torch.equal(a[0][0], b[0][0]) and torch.equal(a[1][0], b[1][0]) for a, b in zip(one, two))


@pytest.mark.parametrize("method", WORKING)
def test_layers_of_one_method_share_nothing(decoder, method):
    cache = new_cache(decoder, method)
    cache.layers[0].update(*draw(70))
    assert cache.layers[1].get_seq_length() == 0 and cache_bytes(new_cache(decoder, method)) == 0


@pytest.mark.parametrize("method", WORKING + UNLIMITED)
def test_crop_is_as_if_never_seen_or_raises(layer_of, method):
    key, value = draw(150)
    layer, plain = layer_of(method), layer_of(method)
    layer.crop(0)  # before the first token
    feed(layer, key[:, :, :60], value[:, :, :60], [60])
    layer.crop(0)
    if not method.croppable:
        assert not layer.is_croppable
        with pytest.raises(SmeltError):
            layer.crop(-1)
        return
    assert layer.is_croppable
    getattr(layer, "activate_past_recording", lambda: None)()
    feed(plain, key[:, :, :60], value[:, :, :60], [60])
    start = 60
    for size, rejected in [(9, 4), (30, 29), (5, 0), (20, 7), (1, 0), (40, 39)]:
        wrong = torch.randn(1, HEADS, rejected, WIDTH)
        good = slice(start, start + size - rejected)
        layer.update(torch.cat([key[:, :, good], wrong], 2), torch.cat([value[:, :, good], wrong], 2))
        layer.crop(-rejected)
        plain.update(key[:, :, good], value[:, :, good])
        start = good.stop
        assert layer.get_seq_length() == start == plain.get_seq_length()
    rest = key[:, :, start:], value[:, :, start:]
    assert same(feed(layer, *rest, [3]), feed(plain, *rest, [3]))
    with pytest.raises(SmeltError):
        layer.crop(-1000)


@pytest.mark.parametrize("method", WORKING)
def test_generation_runs_in_batches_and_beams_and_goes_on_where_it_was(decoder, method):
    prompt = ids(2, 60)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with bind(decoder, cache=method):
        whole = decoder.generate(prompt, **settings)
        assert whole.past_key_values.get_seq_length() == 71
        assert decoder.generate(prompt, num_beams=3, **settings).sequences.shape == (2, 72)
        half = decoder.generate(prompt, **settings | {"max_new_tokens": 6})
        resumed = decoder.generate(half.sequences, past_key_values=half.past_key_values, **settings | {"max_new_tokens": 6})
        alone = decoder.generate(prompt[:1], **settings)
    assert torch.equal(resumed.sequences, whole.sequences)
    torch.testing.assert_close(resumed.logits[-1], whole.logits[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone.logits[0], whole.logits[0][:1], atol=1e-4, rtol=1e-4)
