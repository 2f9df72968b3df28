"""Laws of every cache method. None is named here."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer

from smelt import registry
from smelt.cache._calibrated import Calibrated
from smelt.cache._layers import Attending, Evicting
from smelt.model._tiny import tiny
from smelt.runtime import bind, cache_bytes, new_cache
from smelt.spec import SmeltError

METHODS = registry.names("cache")
CLASSES = [registry.load("cache", name) for name in METHODS]
NO_ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
HEADS, WIDTH, GROUP = 2, 32, 2  # key/value heads, their width, queries of each
MODEL = tiny("llama", hidden=128, heads=HEADS * GROUP, kv_heads=HEADS, context=512, **NO_ENDS)
PLACE = tempfile.TemporaryDirectory()


def measured(method):
    """Calibrated methods on a little noise."""
    if not isinstance(method, Calibrated):
        return method
    folder = Path(PLACE.name) / hashlib.sha256(registry.text(method).encode()).hexdigest()
    generator = torch.Generator().manual_seed(0)
    return method.calibrated(MODEL, [torch.randint(2, 320, (4, 64), generator=generator) for _ in range(2)], folder)


def named(method):
    return pytest.param(measured(method), id=registry.text(method))


WORKING = [named(make()) for cls in CLASSES for make in (cls, cls.example)]
UNLIMITED = [named(cls.unlimited()) for cls in CLASSES]
SHOWING = [case for case in WORKING if not case.values[0].attends]  # update shows keys and values


@pytest.fixture(scope="module")
def decoder():
    return MODEL


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(2, 320, (rows, tokens))


def draw(tokens: int, batch: int = 1, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [b, HEADS * GROUP, tokens, WIDTH], keys and values [b, HEADS, tokens, WIDTH]."""
    query = torch.randn(batch, HEADS * GROUP, tokens, WIDTH, dtype=dtype)
    return query, torch.randn(batch, HEADS, tokens, WIDTH, dtype=dtype), torch.randn(batch, HEADS, tokens, WIDTH, dtype=dtype)


def run(query, key, value, mask):
    """What the runtime hands to layers that attend: sdpa with grouped heads."""
    key, value = key.repeat_interleave(GROUP, 1), value.repeat_interleave(GROUP, 1)
    causal = mask is None and query.shape[2] > 1
    if causal:
        assert key.shape[2] == query.shape[2], "without a mask only a prompt from its start is causal"
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal).transpose(1, 2)


run.scaling = WIDTH**-0.5


def see(layer, query, key, value):
    """One call of a layer as transformers and the runtime make it -> output [b, t, heads, width]."""
    size, seen = query.shape[2], layer.get_seq_length()
    columns, offset = layer.get_mask_sizes(size)
    mask = None
    if size > 1 and seen:
        mask = (torch.arange(columns) + offset <= torch.arange(size)[:, None] + seen)[None, None]
    shown, values = layer.update(key, value)
    return shown.attend(query, mask, run) if isinstance(shown, Attending) else run(query, shown, values, mask)


def feed(layer, rows, sizes):
    """Give rows in pieces of these sizes; the outputs of each."""
    outputs, start = [], 0
    for size in sizes:
        outputs.append(see(layer, *(part[:, :, start : start + size] for part in rows)).clone())
        start += size
    return outputs


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def near(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


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
def test_an_unlimited_budget_gives_what_dynamic_layer_gives(layer_of, method):
    rows = draw(130, batch=2)
    sizes = [50, 1, 1, 7, 1, 64, 1, 5]
    layer, plain = layer_of(method), DynamicLayer()
    for mine, theirs in zip(feed(layer, rows, sizes), feed(plain, rows, sizes), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
    assert layer.get_seq_length() == plain.get_seq_length() == 130


@pytest.mark.parametrize("method", [case for case in WORKING if isinstance(case.values[0], Evicting)])
def test_token_by_token_equals_dense_attention_under_the_mask_of_what_survived(layer_of, method):
    tokens = 90
    query, key, value = draw(tokens)
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
    dense = run(query, key, value, mask.repeat_interleave(GROUP, 1))
    near(feed(layer, (query, key, value), [1] * tokens), dense.split(1, 1))
    assert layer.get_mask_sizes(1) == (len(stayed[0]) + 1, tokens - len(stayed[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", WORKING)
def test_the_bytes_held_are_those_of_the_formula(decoder, method, dtype):
    for tokens in (1, 7, 8, 9, 16, 17, 31, 64, 127, 128, 129, 333):
        cache = new_cache(decoder, method)
        for layer in cache.layers:
            see(layer, *draw(tokens, batch=3, dtype=dtype))
        assert cache_bytes(cache) == method.bytes_held(decoder.config, tokens, 0, dtype.itemsize, batch=3), tokens
        if tokens in (1, 9, 128):
            for written in range(1, 40):
                for layer in cache.layers:
                    see(layer, *draw(1, batch=3, dtype=dtype))
                assert cache_bytes(cache) == method.bytes_held(decoder.config, tokens, written, dtype.itemsize, batch=3), (tokens, written)
    stepped = new_cache(decoder, method)
    for tokens in range(1, 140):
        for layer in stepped.layers:
            see(layer, *draw(1, dtype=dtype))
        assert cache_bytes(stepped) == method.bytes_held(decoder.config, 1, tokens - 1, dtype.itemsize), tokens
    stepped.reset()
    assert cache_bytes(stepped) == method.bytes_held(decoder.config, 0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc to give back at once what was freed")
def test_the_process_grows_by_the_bytes_of_the_formula():
    """In a process of its own, where every tensor is a mapping: resident pages before a cache is filled and after."""
    asked = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, __file__], env=asked, capture_output=True, text=True, check=True, timeout=500).stdout
    grown = {text: (pages, formula) for text, pages, formula in map(json.loads, said.splitlines())}
    assert len(grown) == len(CLASSES)
    for text, (pages, formula) in grown.items():
        assert abs(pages - formula) < 200_000, (text, pages, formula)  # a page for each tensor, and a few for the interpreter


def grow(tokens: int = 400, batch: int = 8) -> None:
    """Prints [method, bytes the process grew by, bytes of the formula] of every example; 3.3 MB is the full cache."""

    def resident() -> int:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return psutil.Process().memory_info().rss

    def filled(method):
        cache = new_cache(MODEL, method)
        for layer in cache.layers:
            see(layer, *draw(tokens, batch))
        return cache

    for cls in CLASSES:
        method = measured(cls.example())
        with torch.no_grad():
            filled(method)
            before, cache, after = resident(), filled(method), resident()
        assert len(cache.layers) == 2
        print(json.dumps([registry.text(cls.example()), after - before, method.bytes_held(MODEL.config, tokens, 0, 4, batch=batch)]))


@pytest.mark.parametrize("method", [case for case in WORKING if not case.values[0].keeps_all])
def test_an_example_holds_fewer_bytes_than_the_full_cache(decoder, method):
    full = 2 * 2 * HEADS * 300 * WIDTH * 4
    if method == type(method).example():
        assert method.bytes_held(decoder.config, 300) < full
    assert method.bytes_held(decoder.config, 1 << 20) < 2 * 2 * HEADS * (1 << 20) * WIDTH * 4


@pytest.mark.parametrize("method", [case for case in WORKING + UNLIMITED if not case.values[0].attends])
def test_update_shows_as_many_rows_as_the_mask_has_columns_and_counts_what_it_saw(layer_of, method):
    layer, seen = layer_of(method), 0
    for size in [1, 1, 30, 1, 17, 1, 1, 40, 3]:
        columns, offset = layer.get_mask_sizes(size)
        key, value = layer.update(*draw(size, batch=2)[1:])
        seen += size
        assert key.shape == value.shape == (2, HEADS, columns, WIDTH)
        assert columns + offset == seen == layer.get_seq_length()
        assert layer.get_max_length() == -1


@pytest.mark.parametrize("method", WORKING + UNLIMITED)
def test_the_mask_covers_what_is_kept_and_every_token_seen_is_counted(layer_of, method):
    layer, seen = layer_of(method), 0
    for size in [1, 1, 30, 1, 17, 1, 1, 40, 3]:
        columns, offset = layer.get_mask_sizes(size)
        assert columns + offset == seen + size and columns >= size
        assert torch.isfinite(see(layer, *draw(size, batch=2))).all()
        seen += size
        assert layer.get_seq_length() == seen and layer.get_max_length() == -1


@pytest.mark.parametrize("method", [case for case in WORKING if not case.values[0].looks_ahead])
def test_a_prompt_is_causal(layer_of, method):
    """Tokens that come later in one call change nothing before them, unless the method says that it looks at the whole prompt."""
    one = draw(70)
    other = tuple(torch.cat([part[:, :, :50], torch.randn_like(part[:, :, 50:])], 2) for part in one)
    a, b = see(layer_of(method), *one), see(layer_of(method), *other)
    if method.rounds_ahead:
        torch.testing.assert_close(a[:, :50], b[:, :50], atol=2e-6, rtol=1e-5)
    else:
        assert torch.equal(a[:, :50], b[:, :50])
    assert not torch.allclose(a[:, 50:], b[:, 50:], atol=1e-2)


@pytest.mark.parametrize("method", SHOWING)
def test_the_new_tokens_come_last_and_exactly(layer_of, method):
    layer = layer_of(method)
    for size in [20, 1, 5, 1, 40, 2]:
        _, *new = draw(size)
        shown = layer.update(*new)
        for s, n in zip(shown, new, strict=True):
            torch.testing.assert_close(s[:, :, -size:], n, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", WORKING)
def test_reset_repeats_and_holds_nothing_over(layer_of, method):
    layer = layer_of(method)
    rows = draw(80)
    sizes = [33, *[1] * 40, 7]
    first = feed(layer, rows, sizes)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert same(feed(layer, rows, sizes), first)
    layer.reset()
    see(layer, *draw(3, batch=4))  # another batch size after a reset


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
    rows = draw(110, batch=3)
    sizes = [45, *[1] * 30]
    before, after = layer_of(method), layer_of(method)
    feed(before, rows, sizes)
    BATCH[change](before)  # now, with the tokens that follow changed the same way
    changed = tuple(ROWS[change](part) for part in rows)
    feed(after, changed, sizes)  # the rows as if they had always been those
    tail = tuple(part[:, :, 75:] for part in changed)
    near(feed(before, tail, [1] * 35), feed(after, tail, [1] * 35))


@pytest.mark.parametrize("method", WORKING)
def test_one_row_does_not_change_another(layer_of, method):
    rows = draw(90, batch=2)
    sizes = [31, *[1] * 59]
    other = tuple(part.clone() for part in rows)
    for part in other:
        part[1] = 9 * torch.randn_like(part[1])
    one, two = feed(layer_of(method), rows, sizes), feed(layer_of(method), other, sizes)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two))


@pytest.mark.parametrize("method", WORKING)
def test_layers_of_one_method_share_nothing(decoder, method):
    cache = new_cache(decoder, method)
    see(cache.layers[0], *draw(70))
    assert cache.layers[1].get_seq_length() == 0
    assert cache_bytes(new_cache(decoder, method)) == method.bytes_held(decoder.config, 0)


@pytest.mark.parametrize("method", WORKING + UNLIMITED)
def test_crop_is_as_if_never_seen_or_raises(layer_of, method):
    rows = draw(150)
    layer, plain = layer_of(method), layer_of(method)

    def piece(start, stop):
        return tuple(part[:, :, start:stop] for part in rows)

    layer.crop(0)  # before the first token
    see(layer, *piece(0, 60))
    layer.crop(0)
    if not method.croppable:
        assert not layer.is_croppable
        with pytest.raises(SmeltError):
            layer.crop(-1)
        return
    assert layer.is_croppable
    getattr(layer, "activate_past_recording", lambda: None)()
    see(plain, *piece(0, 60))
    start = 60
    for size, rejected in [(9, 4), (30, 29), (5, 0), (20, 7), (1, 0), (40, 39)]:
        wrong = draw(rejected)
        good = piece(start, start + size - rejected)
        see(layer, *(torch.cat([a, b], 2) for a, b in zip(good, wrong, strict=True)))
        layer.crop(-rejected)
        see(plain, *good)
        start += size - rejected
        assert layer.get_seq_length() == start == plain.get_seq_length()
    rest = piece(start, start + 3)
    near(feed(layer, rest, [3]), feed(plain, rest, [3]))
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


if __name__ == "__main__":
    grow()
