"""Load and save models: the embedded one, a folder, a hub id. safetensors only, local before network."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from smelt.spec import SmeltError

__all__ = ["EMBEDDED", "Loaded", "header", "identity", "load", "locate", "same_tokenizer", "save", "vocabulary"]

EMBEDDED = Path(__file__).parent / "_embedded"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Loaded(NamedTuple):
    """A model with its tokenizer and where both came from."""

    model: Any
    tokenizer: Any
    folder: Path


def locate(name: str, *, trust_pickle: bool = False, trust_remote_code: bool = False) -> Path:
    """The folder of a model: `embedded`, a folder, or a hub id (its cached snapshot; downloaded only when absent).

    Raises SmeltError when there is none, and for pickled weights or remote code that were not asked for.
    """
    if name == "embedded":
        folder = EMBEDDED
    elif Path(name).is_dir():
        folder = Path(name)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = _snapshot(name)
    else:
        raise SmeltError(f"model '{name}': no such folder, and it is not a hub id of the form owner/name")
    if not (folder / "config.json").is_file():
        raise SmeltError(f"model '{name}': there is no config.json in {folder}")
    config = _json(folder / "config.json")
    if "auto_map" in config and not trust_remote_code:
        raise SmeltError(f"model '{name}' wants to run its own code (auto_map in config.json); pass --trust-remote-code to allow it")
    if not any((folder / w).is_file() for w in WEIGHTS):
        if any((folder / p).is_file() for p in PICKLES):
            if not trust_pickle:
                raise SmeltError(f"model '{name}' has pickled weights, which can run code when read; pass --trust-pickle to allow it")
        else:
            raise SmeltError(f"model '{name}': there is no model.safetensors in {folder}")
    else:
        header(folder)
    return folder


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=patterns))
    except (LocalEntryNotFoundError, FileNotFoundError, ValueError):
        pass
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise SmeltError(f"model '{name}' is not on this machine, and HF_HUB_OFFLINE=1 forbids the network")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SmeltError(f"model '{name}' is neither a folder nor to be had from the hub ({type(error).__name__})") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SmeltError(f"not readable as JSON: {error}", file=str(path)) from None
    if not isinstance(value, dict):
        raise SmeltError("a JSON object is expected", file=str(path))
    return value


def header(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (dtype, shape)} from the safetensors headers alone. Refuses truncated and malformed files by name."""
    single = folder / WEIGHTS[0]
    if single.is_file():
        files = [single]
    else:
        index = _json(folder / WEIGHTS[1])
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
            raise SmeltError("'weight_map' is missing or not a table", file=str(folder / WEIGHTS[1]))
        files = sorted({folder / v for v in shards.values()})
        for file in files:
            if file.parent != folder or not file.is_file():
                raise SmeltError(f"the shard '{file.name}' named in the index is not there", file=str(folder / WEIGHTS[1]))
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        found.update(_read_header(file))
    return found


BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def _read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    size = file.stat().st_size
    with open(file, "rb") as data:
        first = data.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(100_000_000, size - 8):
            raise SmeltError("not a safetensors file, or cut short", file=str(file))
        raw = data.read(length)
    try:
        table = json.loads(raw)
        tensors = {k: v for k, v in table.items() if k != "__metadata__"}
        found, end = {}, 0
        for name, about in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"][0]):
            start, stop = about["data_offsets"]
            shape = tuple(int(n) for n in about["shape"])
            count = 1
            for n in shape:
                count *= n
            if start != end or stop < start or min(shape, default=0) < 0 or count * BYTES.get(about["dtype"], 1) != stop - start:
                raise ValueError(name)
            found[name], end = (about["dtype"], shape), stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError):
        raise SmeltError("the safetensors header is malformed", file=str(file)) from None
    if end != size - 8 - length:
        raise SmeltError(f"the file is cut short: {size - 8 - length} bytes of weights where the header promises {end}", file=str(file))
    return found


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
    shape, quantized codes without their scales, a non-finite weight.
    """
    folder = locate(str(name), trust_pickle=trust_pickle, trust_remote_code=trust_remote_code)
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        auto = AutoModelForCausalLM if _is_decoder(config) else AutoModel
        options: dict[str, Any] = {"output_loading_info": True, "trust_remote_code": trust_remote_code}
        if not trust_pickle:
            options["use_safetensors"] = True
        model, info = auto.from_pretrained(folder, config=config, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except SmeltError:
        raise
    except Exception as error:
        raise SmeltError(f"model '{name}' cannot be loaded: {type(error).__name__}: {_first(error)}") from error
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(str(k) for k in info.get(kind) or ())
        wrong = [k for k in wrong if not _harmless(k, kind)]
        if wrong:
            what = kind.removesuffix("_keys")
            raise SmeltError(f"model '{name}' would load wrong: {len(wrong)} {what} weights, '{wrong[0]}' among them")
    for weight, value in model.named_parameters():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise SmeltError(f"model '{name}': the weight '{weight}' has values that are not finite")
    if device is None and torch.cuda.is_available():
        device = "cuda"
    return Loaded(model.to(device).eval() if device else model.eval(), tokenizer, folder)


def _is_decoder(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    architectures = config.architectures or []
    return not architectures or any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)


def _harmless(key: str, kind: str) -> bool:
    return (kind == "missing_keys" and "pooler" in key) or (kind == "unexpected_keys" and key.endswith("rotary_emb.inv_freq"))


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def save(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """An ordinary Hugging Face checkpoint: config, generation config, safetensors, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    before = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if dtype is not None and dtype != before:
        model.to(dtype)
    try:
        bars = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
        if dtype is not None and dtype != before:
            model.to(before)


def identity(folder: Path) -> str:
    """Digest of a checkpoint's files: names, and contents up to 64 MB each, above that size and time."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt", ".bin")):
        about = file.stat()
        digest.update(f"{file.name} {about.st_size}\n".encode())
        digest.update(file.read_bytes() if about.st_size <= 64 << 20 else str(about.st_mtime_ns).encode())
    return digest.hexdigest()


def vocabulary(tokenizer: Any) -> str:
    """Digest of what ids mean: the vocabulary with its ids, and how a few difficult strings are split."""
    probes = ["Hello, world!", "  def f(x):\n\treturn x**2\n", "naïve 数学 🙂", " 1234567890", "\u00a0\u200b<|endoftext|>"]
    split = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in probes]
    table = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([table, split]).encode()).hexdigest()


def same_tokenizer(a: Any, b: Any) -> bool:
    """Do both give every token id the same meaning? Equal vocabulary *size* is not enough (trl issue 6457)."""
    return vocabulary(a) == vocabulary(b)
