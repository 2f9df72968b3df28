"""Binds attention, cache and decoding to a model, and takes them off again.

    with bind(model, cache="kivi(bits=2)"):
        model.generate(**inputs)

While bound, `model.generate(...)` starts every call with a fresh cache of the method (unless one is passed) and adds the
arguments of the decoding method; `model(...)` that would make a cache makes one of the method; attention runs the
method's function in every layer. Nothing here knows a method by name: what may be combined follows from
the attributes of the contracts, and what would come out silently wrong is refused. Calls of inner modules
(`model.model(...)`) bypass the cache and the checks, not the attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedModel
from transformers.cache_utils import Cache, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from smelt import registry
from smelt.attention import Attached, Attention
from smelt.attention._mixer import Converting, MixerModule
from smelt.cache import KVCache
from smelt.cache._calibrated import Calibrated
from smelt.cache._layers import Attending
from smelt.decode import Decoding, Steered
from smelt.model import _load
from smelt.model._load import Loaded
from smelt.model._walk import attention_of, blocks
from smelt.spec import SmeltError

__all__ = ["MethodCache", "bind", "cache_bytes", "compatible", "load", "new_cache"]

BOUND = "_smelt_bound"  # on the model: what is bound to it
KEPT = "_smelt_kept"  # on a model that methods were bound to for good: what would undo it, alive as long as the model is
FUNCTION = "_smelt_attention"  # on each attention module: the function it runs
MASKS: dict[str, Callable] = {"float": eager_mask, "bool": sdpa_mask}
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")  # options of generate that take tokens back
MATTERS = ("softcap", "s_aux", "position_bias")  # what some models hand to attention and a method must not drop


class MethodCache(Cache):
    """A transformers cache that knows the method its layers come from."""

    layers: list[Any]

    def __init__(self, method: KVCache, layers: list[Any]):
        super().__init__(layers=layers)
        self.method = method
        for layer in layers:
            if isinstance(layer, Attending):
                layer.peers = layers


@dataclass(frozen=True)
class Bound:
    """What is bound to a model. Nested binds add to it, the inner one wins."""

    cache: KVCache | None = None
    attention: Attention | Attached | None = None
    decode: Decoding | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # of the decoding method


@contextmanager
def bind(model: Any, *, cache: Any = None, attention: Any = None, decode: Any = None, tokenizer: Any = None) -> Iterator[Any]:
    """Bind methods (objects, or recipe text) for the length of a block; yields the model.

    On exit, also by an exception, the model is what it was: attributes, hooks, attention, outputs bit for bit. Binds
    nest; attention only once. Raises SmeltError for what `compatible` refuses, and during calls for what only
    shows then: padded rows with a cache that cannot tell them, several new tokens on layers of unequal length.
    """
    with _attach(model, cache, attention, decode, tokenizer):
        yield model


def load(name: str | Path, *, cache: Any = None, attention: Any = None, decode: Any = None, **options: Any) -> Loaded:
    """`smelt.model._load.load` with methods bound for good. What cannot be combined is refused before weights are read."""
    methods = _methods(cache, attention, decode)
    if any(methods):
        trust = {key: value for key, value in options.items() if key.startswith("trust_")}
        folder = _load.locate(str(name), **trust)
        compatible(AutoConfig.from_pretrained(folder, trust_remote_code=trust.get("trust_remote_code", False)), *methods)
    loaded = _load.load(name, **options)
    if any(methods):
        vars(loaded.model)[KEPT] = _Kept(_attach(loaded.model, *methods, loaded.tokenizer))  # never undone
    return loaded


def new_cache(model: Any, method: Any) -> MethodCache:
    """An empty cache of the method for this model, to pass as `past_key_values`."""
    (method, _, _) = _methods(method, None, None)
    _refuse(type(model), model.config, method, None, None)
    return _fresh(model, method)


def compatible(config: Any, cache: Any = None, attention: Any = None, decode: Any = None) -> None:
    """Raises SmeltError when these methods cannot be bound to a model of this configuration. Reads no weights."""
    named = (config.architectures or [""])[0]  # the class that was saved; a configuration made by hand names none
    mapped: Any = next((classes[type(config)] for classes in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING) if type(config) in classes), None)
    cls = getattr(transformers, named, mapped) if named else mapped
    _refuse(cls, config, *_methods(cache, attention, decode))


def cache_bytes(cache: Any) -> int:
    """Bytes really held by a cache: every storage reachable from its layers, once, with the room not yet used."""
    storages: dict[int, int] = {}
    known: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in known or isinstance(value, (nn.Module, type, ModuleType, FunctionType, str, bytes)):
            return
        known.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple, set)):
            for item in value:
                visit(item)
        else:
            slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if isinstance(name, str)]
            for item in [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]:
                visit(item)

    visit(list(cache.layers))
    return sum(storages.values())


def _methods(cache: Any, attention: Any, decode: Any) -> tuple[KVCache | None, Attention | Attached | None, Decoding | None]:
    return _method(cache, "cache", KVCache), _method(attention, "attention", Attention, Attached), _method(decode, "decode", Decoding)


def _method(value: Any, family: str, kind: type, *kinds: type) -> Any:
    if value is None:
        return None
    if isinstance(value, str):
        value = registry.parse(value, family)
    if isinstance(value, (list, tuple)):
        raise SmeltError(f"{family}: one method can be bound at a time, not {len(value)}")
    if isinstance(value, Converting):
        raise SmeltError(f"{registry.text(value)} makes another model; it is a stage of a recipe ('- attention: ...') and cannot be bound")
    if not isinstance(value, (kind, *kinds)):
        raise SmeltError(
            f"{family}: {type(value).__name__} is no method of this family; it does not derive from smelt.{family}.{kind.__name__}"
        )
    registry.check(value)
    return value


def _refuse(cls: type | None, config: Any, cache: KVCache | None, attention: Attention | Attached | None, decode: Decoding | None) -> None:
    """What the classes and the configuration already tell. `cls` is the model's class, None when it is not known."""
    kind = config.model_type
    if all(method is None for method in (cache, attention, decode)):
        return
    if config.is_encoder_decoder:
        raise SmeltError(f"{kind} models have an encoder and a decoder; runtime methods are for one stack of layers")
    if (cache is not None or decode is not None) and cls is not None and not cls.can_generate():  # type: ignore[attr-defined]
        raise SmeltError(f"a {kind} model without a language head does not generate, so no cache or decoding method can be bound to it")
    if cache is not None:
        _refuse_cache(cls, config, cache)
    if cache is not None and cache.attends and isinstance(attention, Attention) and attention.mask != "bool":
        raise SmeltError(
            f"{registry.text(cache)} attends over what it keeps with sdpa's mask, and {registry.text(attention)} wants another kind; "
            "bind one of them"
        )
    if cache is not None and decode is not None and decode.crops and not (cache.croppable and cache.equal_lengths):
        raise SmeltError(
            f"{registry.text(decode)} takes back rejected tokens, and {registry.text(cache)} cannot give them up; "
            "use a cache that drops nothing, or plain decoding"
        )
    if isinstance(attention, Attention):
        text = registry.text(attention)
        if attention.mask not in MASKS:
            raise SmeltError(f"{text} names no mask function ('float' or 'bool'); without one the model would see the future")
        if getattr(config.get_text_config(decoder=True), "num_attention_heads", None) is None:
            raise SmeltError(f"{kind} models have no attention, so {text} would do nothing")
        if cls is not None and not cls._can_set_attn_implementation():  # type: ignore[attr-defined]
            raise SmeltError(
                f"the layers of {kind} models do not call their attention through transformers' interface; {text} would do nothing"
            )
        soft = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
        if soft is not None and "softcap" not in inspect.signature(attention).parameters:
            raise SmeltError(f"{kind} models cap their attention scores (attn_logit_softcapping={soft:g}), which {text} does not do")


def _refuse_cache(cls: type | None, config: Any, cache: KVCache) -> None:
    kind, text = config.model_type, registry.text(cache)
    if cls is not None and "past_key_values" not in inspect.signature(cls.forward).parameters:  # type: ignore[attr-defined]
        raise SmeltError(f"{kind} models keep no keys and values (no past_key_values), so {text} has nothing to hold")
    decoder = config.get_text_config(decoder=True)
    types, _ = get_layer_types_and_kwargs(decoder)
    other = sorted({name for name in types if name != "full_attention"})
    if other:
        count = sum(name != "full_attention" for name in types)
        raise SmeltError(
            f"{count} of {len(types)} layers of this {kind} model are {', '.join(other)}; {text} is for layers with full attention"
        )
    if cache.attends:
        if cls is not None and not cls._can_set_attn_implementation():  # type: ignore[attr-defined]
            raise SmeltError(f"{text} attends over what it keeps, and the layers of {kind} models do not let their attention be set")
        if (soft := getattr(decoder, "attn_logit_softcapping", None)) is not None:
            raise SmeltError(f"{kind} models cap their attention scores (attn_logit_softcapping={soft:g}), which {text} does not do")
    for part in registry.held(cache):
        if isinstance(part, Calibrated):
            part.fits(decoder)
            if not part.weights:
                return  # a recipe's stage measures first
    for index in range(len(types)):
        cache.layer(decoder, index)  # raises where the shapes do not fit


def _fresh(model: Any, method: KVCache) -> MethodCache:
    config = model.config.get_text_config(decoder=True)
    return MethodCache(method, [method.layer(config, index) for index in range(config.num_hidden_layers)])


def _attach(model: Any, cache: Any, attention: Any, decode: Any, tokenizer: Any) -> ExitStack:
    """Bind, and return what undoes it. It has to be held: generators in it undo themselves when they are collected."""
    if not isinstance(model, PreTrainedModel):
        raise SmeltError(f"methods are bound to a transformers model, not to {type(model).__name__}")
    cache, attention, decode = _methods(cache, attention, decode)
    before: Bound = vars(model).get(BOUND, Bound())
    if attention is not None and before.attention is not None:
        raise SmeltError(f"{registry.text(before.attention)} is already bound to this model; leave its block first")
    given = {"cache": cache, "attention": attention, "decode": decode}
    now = replace(before, **{name: method for name, method in given.items() if method is not None})
    _refuse(type(model), model.config, now.cache, now.attention, now.decode)
    if cache is not None:
        _fresh(model, cache)  # raises where it should have been measured first
    if (cache is not None or attention is not None) and _mixes(model):
        said = registry.text(cache if cache is not None else attention)
        raise SmeltError(f"{said} has nothing to do: every layer's attention was replaced and keeps a state instead of keys and values")
    if decode is not None:
        now = replace(now, arguments=decode.arguments(model, tokenizer))
    with ExitStack() as undo:
        _put(undo, model, BOUND, now)
        if cache is not None and before.cache is None:
            handle = model.register_forward_pre_hook(_before_forward, with_kwargs=True, prepend=True)
            undo.callback(handle.remove)
        if (cache is not None or decode is not None) and before.cache is None and before.decode is None:
            _put(undo, model, "generate", MethodType(_generating(vars(model).get("generate")), model))
        if isinstance(decode, Steered):
            undo.enter_context(decode.attach(model, tokenizer))
        if isinstance(attention, Attached):
            undo.enter_context(attention.attach(model, tokenizer))
        if isinstance(attention, Attention) or (cache is not None and cache.attends and not isinstance(now.attention, Attention)):
            _attend(undo, model, attention if isinstance(attention, Attention) else None)
        return undo.pop_all()


def _mixes(model: Any) -> bool:
    """Whether every layer's attention was replaced."""
    if not any(isinstance(module, MixerModule) for module in model.modules()):
        return False
    return all(isinstance(attention_of(block), MixerModule) for block in blocks(model))


class _Kept:
    """Holds what a generator would undo when it is collected. A copy of the model has the hooks, and nothing to undo."""

    def __init__(self, undo: ExitStack | None):
        self.undo = undo

    def __deepcopy__(self, memo: dict) -> _Kept:
        return _Kept(None)


def _put(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an instance and have it restored. Past `nn.Module.__setattr__`, so nothing becomes a submodule."""
    held = vars(owner)
    if name in held:
        undo.callback(held.__setitem__, name, held[name])
    else:
        undo.callback(held.pop, name, None)
    held[name] = value


def _attend(undo: ExitStack, model: Any, attention: Attention | None) -> None:
    """Every layer runs `attention`, or, with None, sdpa and the layers of a cache that attends itself."""
    kind = "bool" if attention is None else attention.mask
    name = f"smelt_{kind}"
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, _dispatch)
        AttentionMaskInterface.register(name, MASKS[kind])
    for block in blocks(model):
        for module in attention_of(block).modules():  # the caller is the module itself or, in encoders, one inside it
            _put(undo, module, FUNCTION, attention or _plain)
    undo.callback(model.set_attn_implementation, model.config._attn_implementation)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        what = registry.text(attention) if attention is not None else "the cache"
        raise SmeltError(f"transformers does not let the attention of {type(model).__name__} be set; {what} would do nothing")


def _dispatch(module: Any, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """The attention function registered with transformers: runs the one that is set on the module."""
    method = vars(module).get(FUNCTION)
    if method is None:
        raise SmeltError(
            "two models share one configuration object and only one of them has an attention method bound; copy the configuration"
        )
    for name in MATTERS:
        if kwargs.get(name) is not None and name not in inspect.signature(method).parameters:
            text = registry.text(method) if isinstance(method, Attention) else "this cache"
            raise SmeltError(f"this model's attention needs '{name}', which {text} does not take")
    if isinstance(key, Attending):
        return key.attend(query, attention_mask, _Run(method, module, kwargs, query.shape[-1])), None
    return method(module, query, key, value, attention_mask, **kwargs)


class _Run:
    """One module's attention over the rows that a cache gives it."""

    def __init__(self, method: Callable, module: Any, kwargs: dict[str, Any], width: int) -> None:
        self.method, self.module, self.kwargs = method, module, kwargs
        self.scaling = width**-0.5 if kwargs.get("scaling") is None else kwargs["scaling"]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return self.method(self.module, query, key, value, mask, **self.kwargs)[0]


def _plain(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _generating(inner: Callable | None) -> Callable:
    """`generate` of a bound model. It finds the model by its argument, so that a deep copy of the model works on itself."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound: Bound = vars(self)[BOUND]
        clash = sorted(set(kwargs) & set(bound.arguments))
        if clash:
            raise SmeltError(f"'{clash[0]}' is set by {registry.text(bound.decode)}, which is bound to this model; leave it out")
        kwargs = {**bound.arguments, **kwargs}
        if callable(kwargs.get("custom_generate")) and kwargs.get("streamer") is not None:
            kwargs["follower"] = kwargs["streamer"]  # transformers shows a streamer the prompt only when the loop is not its own
        settings = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self.generation_config
        if bound.cache is not None and _given(kwargs, settings, "use_cache") is not False:
            if _given(kwargs, settings, "cache_implementation") is not None:
                raise SmeltError(f"cache_implementation cannot be set while {registry.text(bound.cache)} is bound to this model")
            if kwargs.get("past_key_values") is None:
                kwargs["past_key_values"] = _fresh(self, bound.cache)
        past = kwargs.get("past_key_values")
        if isinstance(past, MethodCache) and not (past.method.croppable and past.method.equal_lengths):
            for name in ASSISTED:
                if _given(kwargs, settings, name) is not None:
                    raise SmeltError(f"{registry.text(past.method)} cannot take back rejected tokens, so '{name}' cannot be used with it")
        try:
            return inner(*args, **kwargs) if inner is not None else type(self).generate(self, *args, **kwargs)
        finally:
            if isinstance(past, MethodCache):
                for layer in past.layers:  # assisted decoding leaves it on, and a cache that is used again would never compress
                    if getattr(layer, "record_past", False):
                        layer.record_past = False

    return generate


def _given(kwargs: dict[str, Any], settings: Any, name: str) -> Any:
    value = kwargs.get(name)
    return value if value is not None else getattr(settings, name, None)


def _before_forward(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Give the call a cache of the method where it would have made its own, and refuse what would come out wrong."""
    bound: Bound = vars(model)[BOUND]
    given = {**dict(zip(inspect.signature(model.forward).parameters, args)), **kwargs} if args else kwargs
    past = given.get("past_key_values")
    changed = None
    if past is None:
        use = given.get("use_cache")
        if use is None:
            use = model.config.use_cache and not model.training
        if not use or bound.cache is None:
            return None
        past = _fresh(model, bound.cache)
        changed = (), {**given, "past_key_values": past}
    if isinstance(past, MethodCache):
        _refuse_call(past, given)
    return changed


def _refuse_call(past: MethodCache, given: dict[str, Any]) -> None:
    method, mask = past.method, given.get("attention_mask")
    if (method.evicts or not method.padded) and isinstance(mask, Tensor) and mask.dim() == 2:
        seen = mask.bool()
        if bool((seen[:, 1:] & ~seen[:, :-1]).any()):
            raise SmeltError(
                f"{registry.text(method)} cannot tell padding from text, and rows of this batch are padded on the left; "
                "give rows of equal length, or one at a time"
            )
    if not method.equal_lengths and past.get_seq_length():
        inputs = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        if inputs.shape[1] > 1 and len({layer.get_mask_sizes(0) for layer in past.layers}) > 1:
            raise SmeltError(
                f"{registry.text(method)} keeps another number of tokens in each layer, so several new tokens at once would get "
                "the wrong mask; give one at a time"
            )
