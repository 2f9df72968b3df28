import copy

import pytest
import torch
from transformers import DynamicCache

from smelt.decode._skip import keys_values
from smelt.decode.early_exit import EarlyExit
from smelt.model._tiny import tiny
from smelt.model._walk import blocks
from smelt.registry import parse, text
from smelt.runtime import bind
from smelt.spec import SmeltError

IDS = torch.randint(2, 320, (2, 16), generator=torch.Generator().manual_seed(0))


def sharp():
    """A model whose layers are sure of something now and then."""
    model = tiny("llama", layers=4, eos_token_id=None, bos_token_id=None).double()
    with torch.no_grad():
        model.model.norm.weight *= 3.0
    return model


def sureness(model, by, before, now):
    if by == "cosine":
        return float(before @ now / before.norm() / now.norm())
    best = model.lm_head(model.model.norm(now)).softmax(-1).sort(descending=True).values.tolist()
    return best[0] - best[1] if by == "margin" else best[0]


def slow(model, ids, method):
    """(logits [t, V], layers run by each token), token by token and layer by layer."""
    cache, said, depth = DynamicCache(), [], []
    for t in range(len(ids)):
        h = model.model.embed_tokens(ids[None, t : t + 1])
        turn = model.model.rotary_emb(h, torch.tensor([[t]]))
        gone, ran = False, 0
        for at, block in enumerate(blocks(model)):
            if gone:
                cache.update(*keys_values(block, h, turn), at)
                continue
            before, ran = h, ran + 1
            h = block(h, attention_mask=None, past_key_values=cache, position_embeddings=turn)
            gone = at + 1 >= method.first and sureness(model, method.by, before[0, 0], h[0, 0]) > method.threshold
        said.append(model.lm_head(model.model.norm(h))[0, 0])
        depth.append(ran)
    return torch.stack(said), depth


@torch.no_grad()
@pytest.mark.parametrize("by, threshold", [("probability", 0.2), ("margin", 0.1), ("cosine", 0.65)])
@pytest.mark.parametrize("first", [1, 2])
def test_it_is_the_slow_loop(by, threshold, first):
    model, method = sharp(), EarlyExit(threshold, by, first)
    with method.attach(model, None) as used:
        fast = model(IDS).logits
    depths = []
    for row, said in zip(IDS, fast, strict=True):
        wanted, depth = slow(model, row, method)
        depths.append(depth)
        assert torch.allclose(said, wanted, atol=1e-8)
    assert min(map(min, depths)) >= first and len({d for depth in depths for d in depth}) >= 3  # tokens leave at several depths
    counted = [d for depth in depths for d in depth[1:]]  # position 0 does not count
    assert used.shares().tolist() == pytest.approx([sum(d > at for d in counted) / len(counted) for at in range(4)])


@torch.no_grad()
@pytest.mark.parametrize("by", ["probability", "margin", "cosine"])
def test_threshold_one_is_plain_bit_for_bit(by):
    """Also where the model is as sure as a float can be, and where a layer changes nothing."""
    model = tiny("llama", layers=3)
    model.model.norm.weight *= 1e4
    for weight in (model.model.layers[1].self_attn.o_proj.weight, model.model.layers[1].mlp.down_proj.weight):
        weight.zero_()
    plain = model(IDS).logits
    assert plain.softmax(-1).amax() == 1.0
    with EarlyExit(1.0, by).attach(model, None) as used:
        assert torch.equal(model(IDS).logits, plain)
    assert used.shares().tolist() == [1, 1, 1]
    with EarlyExit(0.9, by).attach(model, None) as used:
        model(IDS)
    assert used.shares()[2] < 1


@torch.no_grad()
def test_always_exiting_is_the_truncated_model():
    model = sharp()
    for first in (1, 3):
        short = copy.deepcopy(model)
        short.model.layers = short.model.layers[:first]
        short.config.num_hidden_layers = first
        ran = []
        handle = model.model.layers[first].mlp.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        with bind(model, decode=EarlyExit(threshold=0.0, first=first)):
            ran.clear()  # of the trial before
            assert torch.equal(model(IDS).logits, short(IDS).logits)
            both = [m.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=9, do_sample=False) for m in (model, short)]
        handle.remove()
        assert both[0].tolist() == both[1].tolist() and not ran


@torch.no_grad()
def test_token_by_token_is_one_call():
    model, method = sharp(), EarlyExit(0.2)
    with method.attach(model, None):
        whole, cache = model(IDS).logits, DynamicCache()
        steps = [model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(16)]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-8)


@torch.no_grad()
def test_a_padded_row_is_itself():
    model, method = sharp(), EarlyExit(0.2)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :5], mask[1, :5] = 1, 0
    with bind(model, decode=method):
        both = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        alone = model.generate(ids[1:, 5:], attention_mask=mask[1:, 5:], max_new_tokens=8, do_sample=False)
    assert both[1, 16:].tolist() == alone[0, 11:].tolist()


def test_refusals_and_recipe_text():
    def refused(model, method, match):
        with pytest.raises(SmeltError, match=match), method.attach(model, None):
            pass

    refused(tiny("llama"), EarlyExit(first=3), "first=3, but the model has 2 layers")
    refused(tiny("gemma2"), EarlyExit(), "gemma2 models bend their logits")
    refused(tiny("phi3"), EarlyExit(), "not three separate maps")
    with EarlyExit(by="cosine").attach(tiny("gemma2"), None):
        pass
    assert text(parse("early_exit(by='cosine', threshold=0.99, first=2)", "decode")) == "early_exit(threshold=0.99, by='cosine', first=2)"
    for bad in ("early_exit(threshold=1.5)", "early_exit(by='entropy')", "early_exit(first=0)"):
        with pytest.raises(SmeltError):
            parse(bad, "decode")
