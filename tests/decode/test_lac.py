import pytest
import torch
from transformers import DynamicCache

from smelt.data import Document
from smelt.decode._given import rows_of
from smelt.decode._skip import inputs, keys_values
from smelt.decode.lac import LAC, _Bar, growth
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import blocks
from smelt.registry import parse, text
from smelt.runtime import bind
from smelt.spec import SmeltError

IDS = torch.randint(2, 320, (2, 16), generator=torch.Generator().manual_seed(0))


class Texts:
    def documents(self, split):
        yield Document("a", "import os\nfor name in os.listdir('.'):\n    print(name)\n")
        yield Document("b", "def f(x):\n    return x + 1\n")


def model_of():
    """Layers of several sizes, the third turning against the stream, so that the norm falls in places."""
    model = tiny("llama", layers=5).double()
    with torch.no_grad():
        for block, factor in zip(blocks(model), (2.0, 0.5, 1.0, 0.2, 1.5), strict=True):
            block.mlp.down_proj.weight *= factor
    return model


def states(model, ids):
    """|h_l| needs h_{-1}, h_0, .. of the plain stream: list of [b, t, d]."""
    with inputs(model) as seen:
        model(ids)
    return [seen[0][0], *(out for _, _, out in seen)]


def bar(method, before):
    """What D_l must reach, from the list of D before it."""
    if method.threshold is not None:
        return method.threshold
    return method.alpha * (max(before) - min(before)) if before else 0.0


@torch.no_grad()
@pytest.mark.parametrize("method", [LAC(), LAC(alpha=0.3), LAC(alpha=0.0), LAC(threshold=2.0), LAC(threshold=1e9)])
def test_report_reads_the_last_layer_that_is_not_void(method):
    model = model_of()
    plain = states(model, IDS)
    with method.attach(model, None) as used:
        said = model(IDS).logits
    active = torch.zeros(5)
    for b in range(2):
        for t in range(16):
            norms, grown, last = [float(h[b, t].float().norm()) for h in plain], [], plain[0][b, t]
            for layer in range(5):
                change = norms[layer + 1] - norms[layer]
                if change >= bar(method, grown):
                    last = plain[layer + 1][b, t]
                    active[layer] += t > 0
                grown.append(change)
            assert torch.allclose(said[b, t], model.lm_head(model.model.norm(last)), atol=1e-9)
    assert used.shares("prompt").tolist() == pytest.approx((active / 30).tolist())
    if method == LAC():
        assert 0.2 < used.shares().mean() < 0.9  # some are void and some are not


@torch.no_grad()
def test_growth_is_a_ratio_of_sums():
    model, tokenizer = model_of(), tiny_tokenizer()
    sums = torch.zeros(2, 5).double()
    for ids in rows_of(Texts(), model, tokenizer, 40, "lac"):
        found = states(model, ids)
        for t in range(1, ids.shape[1]):
            for layer in range(5):
                sums[0, layer] += found[layer + 1][0, t].float().norm() - found[layer][0, t].float().norm()
                sums[1, layer] += found[layer][0, t].float().norm()
    assert torch.allclose(growth(model, rows_of(Texts(), model, tokenizer, 40, "lac")), sums[0] / sums[1], rtol=1e-5)


def slow(model, ids, method, grows):
    """(logits [t, V], which layers each token runs), token by token and layer by layer."""
    cache, said, ran = DynamicCache(), [], []
    for t in range(len(ids)):
        h = model.model.embed_tokens(ids[None, t : t + 1])
        turn = model.model.rotary_emb(h, torch.tensor([[t]]))
        grown, runs = [], []
        for at, block in enumerate(blocks(model)):
            norm = float(h.float().norm())
            runs.append(t == 0 or grows[at] * norm >= bar(method, grown))
            if runs[-1]:
                h = block(h, attention_mask=None, past_key_values=cache, position_embeddings=turn)
                grown.append(float(h.float().norm()) - norm)
            else:
                cache.update(*keys_values(block, h, turn), at)
        said.append(model.lm_head(model.model.norm(h))[0, 0])
        ran.append(runs)
    return torch.stack(said), ran


@torch.no_grad()
@pytest.mark.parametrize("method", [LAC(mode="skip"), LAC(0.3, "skip"), LAC(mode="skip", threshold=1.5)])
def test_skip_is_the_slow_loop(method):
    """In one call and token by token; layers run are those predicted to grow enough."""
    model, tokenizer = model_of(), tiny_tokenizer()
    method = LAC(method.alpha, "skip", method.threshold, data=Texts(), tokens=40)
    grows = growth(model, rows_of(Texts(), model, tokenizer, 40, "lac")).tolist()
    with method.attach(model, tokenizer) as used:
        fast, cache = model(IDS).logits, DynamicCache()
        steps = torch.cat([model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(16)], 1)
    shares = torch.zeros(5)
    for row, said, stepped in zip(IDS, fast, steps, strict=True):
        wanted, ran = slow(model, row, method, grows)
        assert torch.allclose(said, wanted, atol=1e-8) and torch.allclose(stepped, wanted, atol=1e-8)
        shares += torch.tensor(ran)[1:].sum(0)
    assert all(ran[0]) and 0.2 < (shares / 30).mean() < 1
    for phase in ("prompt", "response"):
        assert used.shares(phase).tolist() == pytest.approx((shares / 30).tolist())


def test_the_spread_is_over_layers_that_ran():
    found = _Bar(LAC(alpha=0.5))
    found.begin(torch.zeros(1, 2))
    assert found().tolist() == [[0, 0]]
    found.add(torch.tensor([[3.0, 1.0]]))
    assert found().tolist() == [[0, 0]]
    found.add(torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]))
    assert found().tolist() == [[0.5 * (3 - 1), 0]]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["report", "skip"])
def test_no_voids_is_plain_bit_for_bit(mode):
    model = tiny("llama", layers=5)
    plain = model(IDS).logits
    with LAC(mode=mode, threshold=-1e9, data=Texts()).attach(model, tiny_tokenizer()) as used:
        assert torch.equal(model(IDS).logits, plain)
    assert used.shares().tolist() == [1] * 5


@torch.no_grad()
def test_fewer_layers_are_active_with_a_larger_alpha():
    """Exactly so for every layer: in report mode the stream does not depend on alpha."""
    model, before = model_of(), torch.ones(5)
    for alpha in (0.0, 0.2, 0.5, 0.8, 2.0):
        with LAC(alpha).attach(model, None) as used:
            model(IDS)
        assert (used.shares() <= before).all()
        before = used.shares()
    assert before.mean() < 0.9


@torch.no_grad()
def test_skipped_layers_do_not_run_while_writing():
    model, tokenizer = model_of(), tiny_tokenizer()
    ran = []
    handles = [block.mlp.register_forward_hook(lambda *_: ran.append(1)) for block in blocks(model)]
    with bind(model, decode=LAC(mode="skip", threshold=1e9, data=Texts()), tokenizer=tokenizer):
        ran.clear()
        model.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=6, eos_token_id=None)
    for handle in handles:
        handle.remove()
    assert len(ran) == 5  # the prompt's call, for position 0


def test_refusals_and_recipe_text():
    with pytest.raises(SmeltError, match="lac: measuring on text needs the model's tokenizer"):
        with LAC(mode="skip").attach(tiny("llama"), None):
            pass
    with pytest.raises(SmeltError, match="lac: data: 3 is not a corpus"):
        LAC(data=3)
    assert text(parse("lac(mode='skip', alpha=0.5)", "decode")) == "lac(alpha=0.5, mode='skip')"
    for bad in ("lac(alpha=-1.0)", "lac(mode='both')", "lac(tokens=1)"):
        with pytest.raises(SmeltError):
            parse(bad, "decode")
