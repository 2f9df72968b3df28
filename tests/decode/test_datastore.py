import pytest
import torch

from smelt.decode import _datastore
from smelt.decode._datastore import Datastore, collect, keys_of, keys_seen, weights_digest
from smelt.model._tiny import tiny
from smelt.spec import SmeltError

MODEL = tiny("llama")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute(keys, values, query, k):
    """The k smallest (squared distance, token), one pair after the other, in float64."""
    pairs = sorted((float(((key.double() - query.double()) ** 2).sum()), int(value)) for key, value in zip(keys, values))
    return pairs[:k]


@pytest.mark.parametrize("shift", [0.0, 300.0, 3000.0])  # far from the origin the product alone has lost the distances
@pytest.mark.parametrize("n, k", [(50, 7), (5, 7), (16, 16)])
def test_search_equals_brute_force_over_blocks(n, k, shift, monkeypatch):
    monkeypatch.setattr(_datastore, "QUERIES", 4)
    monkeypatch.setattr(_datastore, "KEYS", 8)
    monkeypatch.setattr(_datastore, "GATHERED", 100)
    keys, values, queries = random(n, 6) + shift, torch.arange(n), random(9, 6, seed=1) + shift
    distances, tokens = Datastore(keys, values).nearest(queries, k)
    assert distances.shape == tokens.shape == (9, min(n, k)) and tokens.dtype == torch.long
    for query, found, said in zip(queries, distances.tolist(), tokens.tolist()):
        expected = brute(keys, values, query, k)
        assert found == pytest.approx([d for d, _ in expected], rel=1e-5)
        assert said == [v for _, v in expected]


def test_a_stored_key_is_at_distance_zero():
    keys = random(40, 8) + 100
    distances, tokens = Datastore(keys, torch.arange(40)).nearest(keys, 1)
    assert not distances.any() and tokens[:, 0].tolist() == list(range(40))


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.float16, 2)])
def test_bytes_are_those_of_the_formula(dtype, size):
    n, width = 33, 12
    store = Datastore(random(n, width).to(dtype), torch.arange(n))
    assert store.bytes == n * (width * size + 8) + 4 * width and len(store) == n


def test_half_precision_is_near_and_refuses_what_it_cannot_hold():
    keys, queries = random(60, 16), random(5, 16, seed=1)
    full, half = (Datastore(keys.to(t), torch.arange(60)).nearest(queries, 3)[0] for t in (torch.float32, torch.float16))
    assert torch.allclose(full, half, rtol=1e-2) and not torch.equal(full, half)
    with pytest.raises(SmeltError, match="not finite in float16"):
        Datastore(torch.full((1, 2), 1e6).half(), torch.zeros(1))


def test_keys_are_what_the_last_feed_forward_reads():
    ids, mlp_in = [3, 5, 7, 9], []
    layer = MODEL.model.layers[-1]
    with torch.no_grad():
        states = MODEL(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2]
        rotary = MODEL.model.rotary_emb(states, torch.arange(4)[None])
        attended = states + layer.self_attn(layer.input_layernorm(states), rotary, torch.ones(4, 4).tril().log()[None, None])[0]
        mlp_in = layer.post_attention_layernorm(attended)[0]
    assert torch.allclose(keys_of(MODEL, ids), mlp_in, atol=1e-5)
    assert not layer.mlp._forward_pre_hooks
    with keys_seen(MODEL) as seen:
        MODEL(torch.tensor([ids]))
        MODEL(torch.tensor([ids[:2]]))
        assert len(seen) == 1 and seen[0].shape == (1, 2, 64)  # the latest call's


def test_collected_in_pieces_up_to_the_limit():
    texts = [list(range(2, 12)), [40], [20, 21, 22, 23]]
    store = collect(MODEL, iter(texts), 11, 4, torch.float32)
    assert store.values.tolist() == [*range(3, 12), 21, 22]
    pieces = [keys_of(MODEL, ids) for ids in ([2, 3, 4, 5], [6, 7, 8, 9], [10], [20, 21])]
    assert torch.allclose(store.keys, torch.cat(pieces), atol=1e-6)
    assert collect(MODEL, iter(texts), 100, 4, torch.float16).keys.dtype == torch.float16
    with pytest.raises(SmeltError, match="nothing to store"):
        collect(MODEL, iter([[4], []]), 10, 4, torch.float32)


def test_saved_whole_and_read_back(tmp_path):
    store = Datastore(random(7, 4).half(), torch.arange(7))
    file = tmp_path / "new" / "a.safetensors"
    store.save(file)
    back = Datastore.read(file, "cpu")
    assert torch.equal(back.keys, store.keys) and torch.equal(back.values, store.values) and back.bytes == store.bytes
    assert [p.name for p in file.parent.iterdir()] == ["a.safetensors"]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(SmeltError, match="damaged"):
        Datastore.read(file, "cpu")
    with pytest.raises(SmeltError, match="cannot be written"):
        store.save(file / "below" / "b.safetensors")


def test_the_digest_sees_one_bit():
    other = tiny("llama")
    assert weights_digest(other) == weights_digest(MODEL)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6
    assert weights_digest(other) != weights_digest(MODEL)


def test_needs_as_many_tokens_as_keys():
    for keys, values in ((torch.zeros(2, 3), torch.zeros(3)), (torch.zeros(0, 3), torch.zeros(0)), (torch.zeros(2), torch.zeros(2))):
        with pytest.raises(SmeltError, match="as many tokens"):
            Datastore(keys, values)
