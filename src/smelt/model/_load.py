"""Load and save models: the embedded one, a folder, a hub id. safetensors only, local before network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from smelt.model._files import BYTES, WEIGHTS, header, read_json, shown
from smelt.model._swap import TYPE, described, original, swap
from smelt.spec import SmeltError, nearest

__all__ = ["EMBEDDED", "Loaded", "aliased", "configuration", "load", "locate", "same_tokenizer", "save", "vocabulary"]

EMBEDDED = Path(__file__).parent / "_embedded"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")  # may hold an auto_map
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
FLOATS = ("F64", "F32", "F16", "BF16")


_aliases: ContextVar[dict[str, Path]] = ContextVar("aliases", default={})  # noqa: B039 (never changed in place)


@contextlib.contextmanager
def aliased(names: dict[str, Path]) -> Iterator[None]:
    """For the length of the block these names mean these folders: `base` and the variants of a recipe, wherever a method names a model."""
    token = _aliases.set(names)
    try:
        yield
    finally:
        _aliases.reset(token)


class Loaded(NamedTuple):
    """A model with its tokenizer and where both came from."""

    model: Any
    tokenizer: Any
    folder: Path


def locate(name: str, *, trust_pickle: bool = False, trust_remote_code: bool = False) -> Path:
    """The folder of a model: `embedded`, a folder, or a hub id (its cached snapshot; downloaded only when absent).

    Reads the configuration and the headers of the weights, and runs nothing. Raises SmeltError when there is no such
    model, for damaged files, for a configuration that does not belong to the weights, for codes that would be read as
    weights, and for pickled weights or code of its own that were not asked for.
    """
    if name in _aliases.get():
        folder = _aliases.get()[name]
    elif name == "embedded":
        folder = EMBEDDED
    elif _is_folder(name):
        folder = Path(name)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = _snapshot(name, trust_pickle, trust_remote_code)
    else:
        raise SmeltError(f"model {shown(name)}: no such folder, and it is not a hub id of the form owner/name")
    if not (folder / "config.json").is_file():
        raise SmeltError(f"model {shown(name)}: there is no config.json in {folder}")
    config = read_json(folder / "config.json")
    for file in CODE:
        if not trust_remote_code and (folder / file).is_file() and _with_key(read_json(folder / file), "auto_map"):
            raise SmeltError(f"model {shown(name)} wants to run its own code (auto_map in {file}); pass --trust-remote-code to allow it")
    for key in ("attn_implementation", "_attn_implementation"):
        if not trust_remote_code and any("/" in str(value) for value in _with_key(config, key)):
            raise SmeltError(
                f"model {shown(name)} wants to run a kernel of its own ({key} in config.json); pass --trust-remote-code to allow it"
            )
    if (folder / "adapter_config.json").is_file():
        raise SmeltError(f"model {shown(name)} has an adapter beside its weights (adapter_config.json); merge the adapter first")
    if any((folder / w).is_file() for w in WEIGHTS):
        _belongs(config, header(folder), str(folder / "config.json"))
    elif not any((folder / p).is_file() for p in PICKLES):
        raise SmeltError(f"model {shown(name)}: there is no model.safetensors in {folder}")
    elif not trust_pickle:
        raise SmeltError(f"model {shown(name)} has pickled weights, which can run code when read; pass --trust-pickle to allow it")
    return folder


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # a name too long for the file system
        return False


def _snapshot(name: str, trust_pickle: bool, trust_remote_code: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
    patterns += ["*.bin"] * trust_pickle + ["*.py"] * trust_remote_code
    files = WEIGHTS + PICKLES * trust_pickle
    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=patterns))
        if any((folder / w).is_file() for w in files) or constants.HF_HUB_OFFLINE:
            return folder  # else only a part was fetched before
    except (OSError, ValueError):
        pass
    if constants.HF_HUB_OFFLINE:
        raise SmeltError(f"model {shown(name)} is not on this machine, and HF_HUB_OFFLINE=1 forbids the network")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SmeltError(f"model {shown(name)} is neither a folder nor to be had from the hub ({type(error).__name__})") from error


def _with_key(value: Any, key: str) -> list[Any]:
    """What the key holds, in this table and in those inside it."""
    if isinstance(value, dict):
        return [v for k, v in value.items() if k == key] + [found for v in value.values() for found in _with_key(v, key)]
    return [found for v in value for found in _with_key(v, key)] if isinstance(value, list) else []


def _belongs(config: dict[str, Any], weights: dict[str, tuple[str, tuple[int, ...]]], file: str) -> None:
    """Refuse, before anything is built, a configuration of absurd size and codes that nothing says how to read."""
    for key in DEPTHS:
        for depth in _with_key(config, key):
            if isinstance(depth, int) and depth > len(weights):
                raise SmeltError(f"{key} is {depth}, but there are only {len(weights)} weights", file=file)
    for count in _with_key(config, "num_labels"):
        if isinstance(count, int) and count > 1_000_000:  # transformers writes a name for each
            raise SmeltError(f"num_labels is {count}", file=file)
    about = config.get("quantization_config")
    if about is None:
        for name, (kind, _) in weights.items():
            if kind not in FLOATS and name.endswith(("weight", "bias")):
                raise SmeltError(
                    f"the weight {shown(name)} holds codes ({kind}), and no quantization_config says what they mean", file=file
                )
        return
    method = about.get("quant_method") if isinstance(about, dict) else about
    if str(method) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        known = AUTO_QUANTIZATION_CONFIG_MAPPING
        raise SmeltError(
            f"quantization_config: quant_method {shown(str(method))} is not known to transformers{nearest(str(method), known)}", file=file
        )


def load(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Loaded:
    """A decoder (or, when the architecture has no language head, an encoder) in eval mode, with its tokenizer.

    Raises SmeltError for anything that would load silently wrong: missing or unexpected weights, weights of another
    shape, quantized codes without their scales, a non-finite weight, a tokenizer with more ids than the model. No code
    is run but transformers' own.
    """
    folder = locate(str(name), trust_pickle=trust_pickle, trust_remote_code=trust_remote_code)
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        config, modules = configuration(folder, trust_remote_code)
        auto: Any = _kind(config)
        if not trust_remote_code and any((folder / w).is_file() for w in WEIGHTS):
            _fits(auto, config, modules, header(folder), str(folder / "config.json"))
        options: dict[str, Any] = {"output_loading_info": True, "trust_remote_code": trust_remote_code}
        if not trust_pickle:
            options["use_safetensors"] = True
        if modules:
            model, info = _swapped(auto, config, modules, folder, dtype)
        else:
            model, info = auto.from_pretrained(folder, config=config, dtype=dtype, **options)
        if not trust_remote_code and not any((folder / t).is_file() for t in TOKENIZERS):
            raise SmeltError(f"model {shown(name)}: there is no tokenizer in {folder} (tokenizer.json)")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except SmeltError:
        raise
    except Exception as error:
        raise SmeltError(f"model {shown(name)} cannot be loaded: {type(error).__name__}: {_first(error)}") from error
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(str(k) for k in info.get(kind) or ())
        wrong = [k for k in wrong if not _harmless(k, kind)]
        if wrong:
            what = kind.removesuffix("_keys")
            raise SmeltError(f"model {shown(name)} would load wrong: {len(wrong)} {what} weights, '{wrong[0]}' among them")
    for weight, value in model.named_parameters():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise SmeltError(f"model {shown(name)}: the weight '{weight}' has values that are not finite")
    rows = model.get_input_embeddings().weight.shape[0]
    if (last := max(tokenizer.get_vocab().values(), default=-1)) >= rows:
        raise SmeltError(
            f"model {shown(name)}: its tokenizer has ids up to {last}, its embedding only {rows} rows; they do not belong together"
        )
    if device is None and torch.cuda.is_available():
        device = "cuda"
    return Loaded(model.to(device).eval() if device else model.eval(), tokenizer, folder)


Modules = dict[str, tuple[str, dict[str, Any]]]


def configuration(folder: Path, trust_remote_code: bool = False) -> tuple[Any, Modules]:
    """The architecture's configuration, and the modules that stand in the place of its own (none in a plain checkpoint)."""
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != TYPE:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), {}
    plain, modules = original(raw, str(folder / "config.json"))
    return AutoConfig.for_model(**plain), modules


def _swapped(auto: Any, config: Any, modules: Modules, folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """`from_pretrained` of a checkpoint some of whose modules are smelt's own: built, swapped, then read."""
    model = auto.from_config(config, dtype=dtype)
    swap(model, modules, str(folder / "config.json"))
    model.to(dtype)
    held: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        held |= load_file(file)
    wrong = [k for k, v in model.state_dict().items() if k in held and held[k].shape != v.shape]
    info = model.load_state_dict({k: v for k, v in held.items() if k not in wrong}, strict=False)
    model.tie_weights()
    tied = {k for k in info.missing_keys if any(model.get_parameter(k) is p for n, p in model.named_parameters() if n in held)}
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    missing = [k for k in info.missing_keys if k not in tied and k not in wrong]
    return model, {"missing_keys": missing, "unexpected_keys": info.unexpected_keys, "mismatched_keys": wrong}


def _fits(auto: Any, config: Any, modules: Modules, weights: dict[str, tuple[str, tuple[int, ...]]], file: str) -> None:
    """The model built without memory, beside the shapes in the headers: other shapes are named, absurd sizes refused."""
    with torch.device("meta"):
        empty = auto.from_config(config)
        swap(empty, modules, file)
    if config.to_dict().get("quantization_config") is None:
        for name, value in empty.state_dict().items():
            if name in weights and tuple(value.shape) != weights[name][1]:
                here, there = list(weights[name][1]), list(value.shape)
                raise SmeltError(f"the weight '{name}' is {here} in the file, but {there} after config.json", file=file)
    held = sum(math.prod(shape) * BYTES.get(kind, 1) for kind, shape in weights.values())
    promised = sum(value.numel() for value in (*empty.parameters(), *empty.buffers()))
    if promised > 8 * held + (1 << 26):  # nobody stores a weight in less than one bit
        raise SmeltError(f"it describes {promised:.3g} parameters, but there are only {held:.3g} bytes of weights", file=file)


def _kind(config: Any) -> Any:
    """Cross-encoders are stored with their head: BertForSequenceClassification."""
    if any(str(name).endswith("ForSequenceClassification") for name in config.architectures or []):
        return AutoModelForSequenceClassification
    return AutoModelForCausalLM if is_decoder(config) else AutoModel


def is_decoder(config: Any) -> bool:
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    architectures = config.architectures or []
    return not architectures or any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)


def _harmless(key: str, kind: str) -> bool:
    return (kind == "missing_keys" and "pooler" in key) or (kind == "unexpected_keys" and key.endswith("rotary_emb.inv_freq"))


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def save(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """An ordinary Hugging Face checkpoint: config, generation config, safetensors, tokenizer.

    With `dtype` the file holds the weights in that precision; the model in memory keeps its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = next(p.dtype for p in model.parameters() if p.is_floating_point())
    other = dtype is not None and dtype != before
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=_cast(model.state_dict(), dtype) if other else None)
        tokenizer.save_pretrained(folder)
        described(model, folder)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    if other:
        config = read_json(folder / "config.json") | {"dtype": str(dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _cast(state: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Every floating tensor in `dtype`; tied ones stay one tensor."""
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    for value in state.values():
        made.setdefault(_place(value), value.to(dtype) if value.is_floating_point() else value)
    return {name: made[_place(value)] for name, value in state.items()}


def _place(value: torch.Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.device, tuple(value.shape), value.stride(), value.dtype


def vocabulary(tokenizer: Any) -> str:
    """Digest of what ids mean: the vocabulary with its ids, and how a few difficult strings are split."""
    probes = ["Hello, world!", "  def f(x):\n\treturn x**2\n", "naïve 数学 🙂", " 1234567890", "\u00a0\u200b<|endoftext|>"]
    split = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in probes]
    table = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([table, split]).encode()).hexdigest()


def same_tokenizer(a: Any, b: Any) -> bool:
    """Do both give every token id the same meaning? Equal vocabulary *size* is not enough (trl issue 6457)."""
    return vocabulary(a) == vocabulary(b)
