"""Binding and restoring, and every refusal with the case that plants it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import BertConfig, Gemma2Config, GPTJConfig, LlamaConfig, MambaConfig, MistralConfig, T5Config
from transformers.cache_utils import DynamicCache

import smelt
from smelt import registry
from smelt.attention import Attention
from smelt.attention.top_k import TopK
from smelt.cache import KVCache
from smelt.cache._layers import GrowingLayer
from smelt.cache.kivi import Kivi
from smelt.cache.sink_window import SinkWindow
from smelt.decode import Decoding
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.runtime import MethodCache, bind, cache_bytes, compatible, load, new_cache
from smelt.spec import Paper, SmeltError

NO_ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
GREEDY = {"do_sample": False, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def decoder():
    return tiny("llama", hidden=128, **NO_ENDS)


def ids(rows: int = 1, tokens: int = 40) -> torch.Tensor:
    return torch.randint(2, 320, (rows, tokens))


def everything(model) -> dict:
    """All attributes of all modules and configurations, one level deep."""
    modules = {name: {k: (v.copy() if isinstance(v, dict) else v) for k, v in vars(m).items()} for name, m in model.named_modules()}
    return {"modules": modules, "config": dict(vars(model.config)), "generation": dict(vars(model.generation_config))}


def planted(monkeypatch, family: str, name: str, cls: type) -> type:
    """A class as if an entry point had registered it."""
    monkeypatch.setitem(registry._NAMES, cls, (family, name))
    return cls


@dataclass(frozen=True)
class Uneven(KVCache):
    """Layer i keeps the last 8 + i tokens."""

    paper: ClassVar = Paper("test", "test")
    equal_lengths: ClassVar[bool] = False
    by: int = 1

    @classmethod
    def unlimited(cls):
        return cls()

    @classmethod
    def example(cls):
        return cls()

    def layer(self, config, index):
        last = 8 + self.by * index
        return GrowingLayer(lambda key, value: torch.arange(key.shape[2])[-last:].expand(*key.shape[:2], -1))

    def bytes_held(self, config, prompt, written=0, itemsize=4, batch=1):
        return 0


@dataclass(frozen=True)
class Always(Decoding):
    """Writes token 7."""

    paper: ClassVar = Paper("test", "test")
    crops: ClassVar[bool] = False
    asked: ClassVar[list] = []

    def arguments(self, model, tokenizer):
        self.asked.append((model, tokenizer))
        return {"logits_processor": [lambda seen, scores: torch.full_like(scores, -1e9).index_fill(1, torch.tensor([7]), 0.0)]}

    @classmethod
    def example(cls, draft):
        return cls()


@dataclass(frozen=True)
class Cropping(Always):
    crops: ClassVar[bool] = True


@dataclass(frozen=True)
class Maskless(Attention):
    paper: ClassVar = Paper("test", "test")
    mask: ClassVar[Any] = None

    @classmethod
    def unlimited(cls):
        return cls()

    @classmethod
    def example(cls):
        return cls()

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        return query.transpose(1, 2), None


BINDS = [
    {"cache": "kivi(group=8, window=16)"},
    {"attention": "top_k(keep=4)"},
    {"cache": SinkWindow(window=8), "attention": TopK(keep=8)},
    {"decode": "prompt_lookup()"},
    {"cache": Kivi(), "attention": "top_k()", "decode": "prompt_lookup(tokens=3)"},
]


@pytest.mark.parametrize("methods", BINDS, ids=str)
def test_leaving_the_block_restores_everything(decoder, methods):
    tokens = ids()
    plain, written = decoder(tokens).logits, decoder.generate(tokens, **GREEDY)
    before = everything(decoder)
    with bind(decoder, **methods) as bound:
        assert bound is decoder
        decoder.generate(tokens, **GREEDY)
    assert everything(decoder) == before
    with pytest.raises(ZeroDivisionError), bind(decoder, **methods):
        raise ZeroDivisionError
    assert everything(decoder) == before
    assert torch.equal(decoder(tokens).logits, plain) and torch.equal(decoder.generate(tokens, **GREEDY), written)


def test_a_refused_bind_leaves_nothing(decoder, monkeypatch):
    before = everything(decoder)
    broken = planted(monkeypatch, "decode", "always", Always)
    monkeypatch.setattr(broken, "arguments", lambda self, model, tokenizer: 1 / 0)
    with pytest.raises(ZeroDivisionError), bind(decoder, cache=Kivi(), attention="top_k", decode=broken()):
        pass
    with pytest.raises(SmeltError), bind(decoder, cache="kivi(group=24, window=24)", attention="top_k"):
        pass
    monkeypatch.setattr(type(decoder), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(SmeltError, match="does not let the attention"), bind(decoder, cache=Kivi(), attention="top_k"):
        pass
    assert everything(decoder) == before


def test_binds_nest_and_the_inner_one_wins(decoder):
    tokens = ids()
    before = everything(decoder)
    held = {"return_dict_in_generate": True, **GREEDY}
    with bind(decoder, attention="top_k(keep=6)"):
        sparse = decoder(tokens).logits
        with bind(decoder, cache=SinkWindow()):
            inside = everything(decoder)
            assert decoder.generate(tokens, **held).past_key_values.method == SinkWindow()
            assert torch.equal(decoder(tokens).logits, sparse)
            with bind(decoder, cache=Kivi()), bind(decoder, decode="prompt_lookup"):
                assert decoder.generate(tokens, **held).past_key_values.method == Kivi()
            assert everything(decoder) == inside
            assert decoder.generate(tokens, **held).past_key_values.method == SinkWindow()
        assert isinstance(decoder.generate(tokens, **held).past_key_values, DynamicCache)
        assert torch.equal(decoder(tokens).logits, sparse)
    assert everything(decoder) == before


def test_every_call_starts_with_a_fresh_cache_unless_one_is_passed(decoder):
    tokens = ids()
    with bind(decoder, cache="sink_window(window=12)"):
        one, two = (decoder.generate(tokens, return_dict_in_generate=True, **GREEDY) for _ in range(2))
        assert one.past_key_values is not two.past_key_values and torch.equal(one.sequences, two.sequences)
        mine = DynamicCache(config=decoder.config)
        assert decoder.generate(tokens, past_key_values=mine, return_dict_in_generate=True, **GREEDY).past_key_values is mine
        assert decoder.generate(tokens, use_cache=False, return_dict_in_generate=True, **GREEDY).past_key_values is None
        out = decoder(tokens, use_cache=True).past_key_values
        assert isinstance(out, MethodCache) and out.get_seq_length() == 40 and len(out.layers[0].key_rows) == 16
        assert isinstance(decoder(tokens).past_key_values, MethodCache)  # the configuration says use_cache
        assert isinstance(decoder(tokens, None, None, None).past_key_values, MethodCache)
        assert decoder(tokens, use_cache=False).past_key_values is None
        assert decoder(tokens, past_key_values=mine).past_key_values is mine


def test_the_cache_is_really_the_methods(decoder):
    """The bound run equals feeding a cache of the method by hand, and differs from the plain one."""
    tokens = ids(1, 64)
    plain = decoder.generate(tokens, max_new_tokens=20, do_sample=False)
    with bind(decoder, cache=SinkWindow(sinks=1, window=6)):
        written = decoder.generate(tokens, max_new_tokens=20, do_sample=False)
    past, text = new_cache(decoder, SinkWindow(sinks=1, window=6)), tokens
    with torch.no_grad():
        out = decoder(tokens, past_key_values=past)
        for _ in range(20):
            new = out.logits[:, -1].argmax(-1, keepdim=True)
            text = torch.cat([text, new], 1)
            out = decoder(new, past_key_values=past)
    assert torch.equal(written, text) and not torch.equal(written, plain)


def test_decoding_arguments_are_asked_once_and_given_to_every_call(decoder, monkeypatch):
    method = planted(monkeypatch, "decode", "always", Always)
    monkeypatch.setattr(method, "asked", [])
    with bind(decoder, decode=method(), tokenizer="tokenizer"):
        for _ in range(2):
            assert (decoder.generate(ids(), **GREEDY)[:, 40:] == 7).all()
        with pytest.raises(SmeltError, match=r"'logits_processor' is set by always\(\)"):
            decoder.generate(ids(), logits_processor=[], **GREEDY)
        with bind(decoder, attention="top_k"):  # a nested bind keeps them
            assert (decoder.generate(ids(), **GREEDY)[:, 40:] == 7).all()
    assert method.asked == [(decoder, "tokenizer")]


def test_a_deep_copy_of_a_bound_model_is_bound_by_itself(decoder):
    tokens = ids()
    with bind(decoder, cache=SinkWindow(window=6), attention=TopK(keep=9)):
        written = decoder.generate(tokens, **GREEDY)
        other = copy.deepcopy(decoder)
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert (other.generate(tokens, **GREEDY)[:, 40:] == 0).all() and other.generate.__self__ is other
        assert torch.equal(decoder.generate(tokens, **GREEDY), written)


def test_saving_a_bound_model_saves_the_plain_one(decoder, tmp_path):
    save(decoder, tiny_tokenizer(), tmp_path / "plain")
    with bind(decoder, cache=Kivi(), attention="top_k", decode="prompt_lookup"):
        save(decoder, tiny_tokenizer(), tmp_path / "bound")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "bound" / file.name).read_bytes()


def test_load_binds_for_good_and_refuses_before_weights_are_read(decoder, tmp_path, monkeypatch):
    save(decoder, tiny_tokenizer(), tmp_path)
    loaded = smelt.load(tmp_path, cache=Kivi(window=64), decode="prompt_lookup", attention="top_k(keep=512)")
    import gc

    gc.collect()
    tokens = ids(1, 100)
    out = loaded.model.generate(tokens, return_dict_in_generate=True, **GREEDY)
    assert out.past_key_values.method == Kivi(window=64) and loaded.model.config._attn_implementation == "smelt_float"
    assert torch.equal(load(tmp_path).model.generate(tokens, **GREEDY), decoder.generate(tokens, **GREEDY))
    monkeypatch.setattr("smelt.model._load.load", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(SmeltError, match="takes back rejected tokens"):
        load(tmp_path, cache="sink_window", decode="prompt_lookup")
    with pytest.raises(SmeltError, match="head size 32"):
        load(tmp_path, cache="kivi(group=64)")


def test_what_was_loaded_with_hooks_keeps_them_as_long_as_it_lives_and_so_does_a_copy(decoder, tmp_path):
    import copy
    import gc

    def hooks(model):
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    save(decoder, tiny_tokenizer(), tmp_path)
    steering = "control_vector(positive=('a b',), negative=('c d',), layers=(0,))"
    plain = smelt.load(tmp_path)
    with bind(plain.model, decode=steering, tokenizer=plain.tokenizer):
        wanted = hooks(plain.model)
        steered = plain.model(ids(1, 9)).logits.shape
    loaded = smelt.load(tmp_path, decode=steering)
    gc.collect()
    assert hooks(loaded.model) == wanted > hooks(plain.model) == 0
    again = copy.deepcopy(loaded.model)
    gc.collect()
    assert hooks(again) == wanted and loaded.model(ids(1, 9)).logits.shape == steered


@pytest.mark.parametrize("side", ["left", "hole"])
@pytest.mark.parametrize("cache", ["sink_window(window=100)", "kivi()"])
def test_padded_rows_are_refused(decoder, cache, side):
    tokens, mask = ids(2), torch.ones(2, 40, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(5, 8)] = 0
    with bind(decoder, cache=cache):
        for call, more in ((decoder, {}), (decoder.generate, GREEDY)):
            with pytest.raises(SmeltError, match="padded on the left"):
                call(tokens, attention_mask=mask, **more)
        mask[:, :] = 1
        mask[1, 35:] = 0
        decoder(tokens, attention_mask=mask)  # on the right it counts for nothing, as long as nothing follows
        past = new_cache(decoder, cache)
        decoder(tokens, attention_mask=mask, past_key_values=past)
        with pytest.raises(SmeltError, match="padded"):
            decoder(ids(2, 1), attention_mask=torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1), past_key_values=past)


def test_padding_that_generate_finds_itself_is_refused():
    model = tiny("llama", hidden=128, eos_token_id=None, bos_token_id=None, pad_token_id=1)
    tokens = ids(2)
    tokens[0, :4] = 1
    with bind(model, cache="kivi()"), pytest.raises(SmeltError, match="padded"):
        model.generate(tokens, **GREEDY)


def test_padded_rows_work_where_nothing_is_dropped(decoder):
    tokens, mask = ids(2), torch.ones(2, 40, dtype=torch.long)
    mask[1, :6] = 0
    plain = decoder.generate(tokens, attention_mask=mask, **GREEDY)
    with bind(decoder, attention="top_k(keep=100)"):
        assert torch.equal(decoder.generate(tokens, attention_mask=mask, **GREEDY), plain)


@pytest.mark.parametrize("option", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, "assistant", "settings"])
def test_taking_back_tokens_is_refused_on_a_cache_that_drops_them(decoder, option):
    if option == "assistant":
        option = {"assistant_model": tiny("llama", **NO_ENDS)}
    elif option == "settings":
        settings = copy.deepcopy(decoder.generation_config)
        settings.prompt_lookup_num_tokens = 3
        option = {"generation_config": settings}
    with bind(decoder, cache="sink_window"):
        with pytest.raises(SmeltError, match="cannot take back"):
            decoder.generate(ids(), **option, **GREEDY)
    with bind(decoder, cache="kivi"):
        decoder.generate(ids(), **option, **GREEDY)


def test_cache_and_decoding_that_exclude_each_other(decoder, monkeypatch):
    crops = planted(monkeypatch, "decode", "cropping", Cropping)
    uneven = planted(monkeypatch, "cache", "uneven", Uneven)
    for cache in ("sink_window", uneven()):
        with pytest.raises(SmeltError, match=r"cropping\(\) takes back rejected tokens"), bind(decoder, cache=cache, decode=crops()):
            pass
        with pytest.raises(SmeltError, match="takes back"):
            compatible(decoder.config, cache, None, crops())
        with pytest.raises(SmeltError, match="takes back"), bind(decoder, cache=cache), bind(decoder, decode=crops()):
            pass
    compatible(decoder.config, cache="kivi", decode=crops())


def test_several_new_tokens_on_layers_of_unequal_length_are_refused(decoder, monkeypatch):
    cls = planted(monkeypatch, "cache", "uneven", Uneven)
    with bind(decoder, cache=cls()):
        past = decoder(ids()).past_key_values
        decoder(ids(1, 1), past_key_values=past)
        decoder.generate(ids(), **GREEDY)
        with pytest.raises(SmeltError, match="another number of tokens in each layer"):
            decoder(ids(1, 2), past_key_values=past)
    with bind(decoder, cache=cls(by=0)):  # equal as it happens
        past = decoder(ids()).past_key_values
        decoder(ids(1, 2), past_key_values=past)


def test_an_attention_method_without_its_mask_is_refused(decoder, monkeypatch):
    cls = planted(monkeypatch, "attention", "maskless", Maskless)
    with pytest.raises(SmeltError, match="no mask function"), bind(decoder, attention=cls()):
        pass


def test_a_second_attention_is_refused(decoder):
    with bind(decoder, attention="top_k(keep=3)"):
        with pytest.raises(SmeltError, match=r"top_k\(keep=3\) is already bound"), bind(decoder, attention="top_k"):
            pass


def test_a_configuration_shared_with_an_unbound_model_is_refused(decoder):
    other = type(decoder)(decoder.config).eval()
    with bind(decoder, attention="top_k"), pytest.raises(SmeltError, match="share one configuration"):
        other(ids())


@pytest.mark.parametrize(
    ("config", "methods", "said"),
    [
        (GPTJConfig(), {"attention": "top_k"}, "do not call their attention through"),
        (MambaConfig(), {"attention": "top_k"}, "have no attention"),
        (MambaConfig(), {"cache": "sink_window"}, "keep no keys and values"),
        (Gemma2Config(), {"attention": "top_k"}, "cap their attention scores"),
        (Gemma2Config(), {"cache": "sink_window"}, "13 of 26 layers of this gemma2 model are sliding_attention"),
        (MistralConfig(), {"cache": "kivi"}, "32 of 32 layers of this mistral model are sliding_attention"),
        (T5Config(), {"cache": "kivi"}, "an encoder and a decoder"),
        (BertConfig(architectures=["BertModel"]), {"cache": "kivi"}, "does not generate"),
        (BertConfig(architectures=["BertForMaskedLM"]), {"decode": "prompt_lookup"}, "does not generate"),
        (LlamaConfig(hidden_size=96, num_attention_heads=4), {"cache": "kivi"}, "does not divide the head size 24"),
        (LlamaConfig(), {"cache": "sink_window", "decode": "prompt_lookup"}, "takes back"),
        (LlamaConfig(), {"cache": TopK()}, "cache: TopK is no method of this family"),
        (LlamaConfig(), {"cache": "kivvi"}, "did you mean 'kivi'"),
        (LlamaConfig(), {"cache": "[kivi(), kivi(bits=4)]"}, "one method can be bound at a time, not 2"),
        (LlamaConfig(), {"cache": Kivi(bits=3)}, "bits is 3"),
        (LlamaConfig(), {"attention": "top_k(keep=0)"}, "keep is 0"),
    ],
)
def test_what_the_configuration_already_refuses(config, methods, said):
    with pytest.raises(SmeltError, match=said):
        compatible(config, **methods)


def test_what_can_be_bound_is_let_through(decoder):
    compatible(decoder.config)
    compatible(decoder.config, "kivi(bits=2)", "top_k", "prompt_lookup")
    compatible(MistralConfig(sliding_window=None), "sink_window")
    compatible(MistralConfig(), attention="top_k")
    compatible(BertConfig(architectures=["BertModel"]), attention="top_k")


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(SmeltError, match="not to Linear"), bind(torch.nn.Linear(2, 2), cache="kivi"):
        pass
    with pytest.raises(SmeltError, match="does not generate"), bind(tiny("bert"), cache="kivi"):
        pass
    with pytest.raises(SmeltError, match="sliding_attention"):
        new_cache(tiny("gemma2"), "sink_window")


def test_what_attention_must_not_drop_is_refused(decoder):
    from smelt.runtime import _dispatch

    with bind(decoder, attention="top_k"), pytest.raises(SmeltError, match="needs 's_aux'"):
        x = torch.randn(1, 2, 3, 4)
        _dispatch(decoder.model.layers[0].self_attn, x, x, x, None, scaling=1.0, s_aux=x)


def test_another_cache_implementation_is_refused(decoder):
    with bind(decoder, cache="kivi"), pytest.raises(SmeltError, match="cache_implementation cannot be set"):
        decoder.generate(ids(), cache_implementation="static", **GREEDY)


def test_cache_bytes_counts_every_storage_once():
    class Layer:
        def __init__(self):
            big = torch.zeros(100)
            self.keys, self.values = big[:10], big[50:]  # 400 bytes, once
            self.codes = {"a": [torch.zeros(8, dtype=torch.uint8)], "b": (torch.zeros(2, dtype=torch.float16),)}
            self.inner = Inner()
            self.model = torch.nn.Linear(4, 4)  # weights are not the cache's
            self.again = self

    class Inner:
        __slots__ = ("scale",)

        def __init__(self):
            self.scale = torch.zeros(3)

    class Holder:
        layers: ClassVar = [Layer(), Layer()]

    assert cache_bytes(Holder()) == 2 * (400 + 8 + 4 + 12)
    assert cache_bytes(DynamicCache()) == 0


def test_training_steps_are_left_alone(decoder):
    model = copy.deepcopy(decoder).train()
    with bind(model, cache="kivi"):
        assert not isinstance(model(ids()).past_key_values, MethodCache)
