"""One file for engines outside Python: GGUF, for llama-like decoders, through the writer of the package `gguf`.

Every tensor keeps its values: rounded to the type asked for, or, from a checkpoint that was quantized with 4 or 8 bits
symmetrically, the same codes and scales in another packing (4 bits: Q4_0, 8 bits: Q8_0, both in blocks of 32 columns).
In the architecture `llama` the rows of the query and key maps are put in another order: there the rotary embedding turns
neighbours (2i, 2i+1), in transformers the two halves of a head (i, i + d/2). Mistral is written as `llama`: without a
sliding window it is the same function, and transformers 5.23 cannot load the name `mistral`.

What GGUF, or transformers' reading of it, would drop in silence is refused: other rotary embeddings, biases that the
architecture does not have, sliding windows, tokenizers that are not byte-level BPE with a split that the engines know.
Memory: one tensor. The file appears whole or not at all.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from smelt.model._files import WEIGHTS, header
from smelt.model._load import configuration, locate
from smelt.model._walk import parts
from smelt.spec import SmeltError, nearest
from smelt.weights import Codes

gguf: Any = importlib.import_module("gguf") if importlib.util.find_spec("gguf") else None  # an extra: smelt[gguf]

__all__ = ["ARCHITECTURES", "DTYPES", "Exported", "export"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
DTYPES = ("f32", "f16", "bf16", "q8_0")
BLOCK = 32  # columns that share a scale in Q4_0 and Q8_0
PACKED = {4: "Q4_0", 8: "Q8_0"}
Header = Mapping[str, tuple[str, tuple[int, ...]]]
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# What text is cut by before the merges: {name in GGUF: (expression, does a whole word that is a token skip the merges)}.
# "" is GPT-2's, which tokenizers has built in. The engines go by the name, so the expression must be exactly that one.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"gpt-2": ("", False), "llama-bpe": (LLAMA3, True), "qwen2": (LLAMA3.replace("{1,3}", ""), False)}


class Exported(NamedTuple):
    """What was written."""

    path: Path
    bytes: int
    parameters: int
    types: dict[str, int]  # GGUF type -> how many tensors
    notes: tuple[str, ...]  # what is not as it was asked for, or is not read by every engine


def export(model: str | Path, path: str | Path, dtype: str = "f16") -> Exported:
    """Write the checkpoint `model` (a folder, `embedded` or a hub id) as the GGUF file `path`.

    `dtype` is the type of the matrices, f32, f16, bf16 or q8_0; norms and biases stay f32, quantized matrices keep their
    codes. Raises SmeltError for what GGUF cannot hold, and when `gguf` is not installed.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise SmeltError(f"export: no type '{dtype}'{nearest(dtype, DTYPES)}")
    if path.suffix != ".gguf" or path.is_dir() or not path.parent.is_dir():
        raise SmeltError("export: a file that ends in .gguf, in a folder that is there, is expected", file=str(path))
    if gguf is None:
        raise SmeltError("GGUF files are written by the package gguf, which is not installed: pip install 'smelt[gguf]'")
    folder = locate(str(model))
    config, modules = configuration(folder)
    _expressible(config, modules, folder)
    vocabulary, notes = _vocabulary(folder, parts(config).vocab)
    source = _Source(folder, config)
    plan = dict(_plan(source, config, dtype))
    notes += _readers(config)
    if dtype == "q8_0" and (left := sum(kind == "F16" for _, kind in plan.values())):
        notes.append(f"{left} matrices are f16: q8_0 needs columns in multiples of {BLOCK}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(temporary, ARCHITECTURES[config.model_type])
    try:
        _describe(writer, config, f"{Path(str(model)).name} by smelt", [kind for _, kind in plan.values()])
        for key, value in vocabulary.items():
            getattr(writer, f"add_{key}")(value)
        for name, (weight, kind) in plan.items():
            shape = gguf.quants.quant_shape_to_byte_shape(source.shapes[weight], _type(kind))
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=_type(kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, kind in plan.values():
            writer.write_tensor_data(_bytes(source.read(weight), kind, weight))
        writer.close()
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SmeltError(f"cannot be written: {error.strerror or error}", file=str(path)) from error
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    kinds = [kind for _, kind in plan.values()]
    parameters = sum(math.prod(source.shapes[weight]) for weight, _ in plan.values())
    return Exported(path, path.stat().st_size, parameters, {k: kinds.count(k) for k in sorted(set(kinds))}, tuple(notes))


def _type(kind: str) -> Any:
    return gguf.GGMLQuantizationType[kind]


# ------------------------------------------------------------------ what can be said in GGUF


def _expressible(config: Any, modules: Mapping[str, Any], folder: Path) -> None:
    kind, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    windows = {"full_attention"} != set(getattr(config, "layer_types", None) or ["full_attention"])
    if kind == "mistral" and config.sliding_window is not None:
        windows = config.sliding_window < config.max_position_embeddings
    if modules:
        wrong = f"'{min(modules)}' is one of smelt's own modules, which no GGUF engine has"
    elif kind not in ARCHITECTURES:
        wrong = f"smelt does not write '{kind}' models as GGUF{nearest(kind, ARCHITECTURES)}"
    elif rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        wrong = f"its rotary embedding is '{rope.get('rope_type')}'; transformers would read it from GGUF as the default one"
    elif windows:
        wrong = f"it has sliding windows, which '{ARCHITECTURES[kind]}' in GGUF has not"
    elif getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        wrong = "it has biases that transformers would leave out when it reads the GGUF"
    elif config.hidden_act != "silu":
        wrong = f"its activation is '{config.hidden_act}', and '{ARCHITECTURES[kind]}' in GGUF has silu"
    else:
        return
    raise SmeltError(f"cannot become a GGUF file: {wrong}", file=str(folder))


def _readers(config: Any) -> list[str]:
    """Where transformers 5.23 supposes a head size that the file says otherwise. llama.cpp reads it."""
    sizes = parts(config)
    supposed = {"qwen2": sizes.hidden / sizes.heads, "qwen3": 128}.get(config.model_type, sizes.head_dim)
    if sizes.head_dim == supposed:
        return []
    return [f"transformers supposes head_dim={supposed:g} for {config.model_type} in GGUF and cannot load head_dim={sizes.head_dim}"]


def _describe(writer: Any, config: Any, name: str, kinds: list[str]) -> None:
    sizes = parts(config)
    matrices = [kind for kind in kinds if kind != "F32"]
    most = next((kind for kind in PACKED.values() if kind in matrices), None) or max(matrices, key=matrices.count, default="")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}" if most else "ALL_F32"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.ffn)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(sizes.vocab)


# ------------------------------------------------------------------ tensors


class _Source:
    """The weights of a checkpoint under the names of the model, dense or as codes, read one by one."""

    def __init__(self, folder: Path, config: Any):
        self.folder, stored = folder, header(folder)
        self.files = dict.fromkeys(stored, WEIGHTS[0])
        if not (folder / WEIGHTS[0]).is_file():
            self.files = json.loads((folder / WEIGHTS[1]).read_text(encoding="utf-8"))["weight_map"]
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        tied = empty.all_tied_weights_keys
        self.shapes = {name: tuple(value.shape) for name, value in empty.state_dict().items() if tied.get(name) is None}
        self.bits = _scheme(folder, config, stored, self.shapes)
        known = {*self.shapes, *tied, *(f"{name}_{part}" for name in self.shapes for part in ("packed", "scale", "shape"))}
        for name, shape in self.shapes.items():
            if stored.get(name, ("", shape))[1] != shape or not {name, f"{name}_packed"} & stored.keys():
                raise SmeltError(f"the weight '{name}' is missing or has another shape than config.json says", file=str(folder))
        for name in stored.keys() - known:
            if not name.endswith("rotary_emb.inv_freq"):
                raise SmeltError(f"the weight '{name}' has no place in GGUF", file=str(folder))
        sizes = parts(config)
        heads = {"q_proj": sizes.heads, "k_proj": sizes.kv_heads} if ARCHITECTURES[config.model_type] == "llama" else {}
        self.order = {name: _neighbours(count, sizes.head_dim) for name, count in heads.items()}

    def coded(self, name: str) -> bool:
        return f"{name}_packed" in self.files

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self.folder / self.files[name], "pt") as file:
            return file.get_tensor(name)

    def read(self, name: str) -> Tensor | Codes:
        order = self.order.get(name.split(".")[-2])
        if not self.coded(name):
            value = self._tensor(name)
            return value if order is None else value[order]
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        shape = torch.Size(self.shapes[name])
        code, scale = unpack_from_int32(self._tensor(f"{name}_packed"), self.bits, shape), self._tensor(f"{name}_scale")
        if order is not None:
            code, scale = code[order], scale[order]
        return Codes(code, scale, None, self.bits, shape[1] // scale.shape[1])


def _scheme(folder: Path, config: Any, stored: Header, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bits of the packed matrices, 0 when there are none. Raises SmeltError for codes that GGUF has no type for."""
    about = config.to_dict().get("quantization_config")
    if about is None:
        return 0
    groups = list((about.get("config_groups") or {}).values())
    scheme = groups[0]["weights"] if about.get("format") == "pack-quantized" and len(groups) == 1 else {}
    scales = {name: stored[f"{name}_scale"] for name in shapes if f"{name}_scale" in stored}
    wide = all(shapes[name][1] % (BLOCK * shape[1]) == 0 for name, (_, shape) in scales.items())
    fits = scheme.get("num_bits") in PACKED and scheme.get("symmetric") and scales and wide
    if not fits or any(kind != "F16" for kind, _ in scales.values()):
        raise SmeltError(
            "cannot become a GGUF file: only 4 or 8 bit codes without zero points, with float16 scales and groups in multiples of "
            f"{BLOCK}, have a GGUF type (such as rtn(bits=4, group=32, symmetric=True)); export what it was made from as q8_0",
            file=str(folder),
        )
    return int(scheme["num_bits"])


def _neighbours(heads: int, size: int) -> Tensor:
    """Rows of a rotated map with the halves of each head interleaved: 0, d/2, 1, d/2 + 1, ..."""
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).flatten()


def _plan(source: _Source, config: Any, dtype: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """(name in GGUF, (name in the checkpoint, GGUF type))."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(arch, parts(config).layers)
    for name, shape in source.shapes.items():
        owner, _, leaf = name.rpartition(".")
        there = names.get_name(owner)
        if there is None:
            raise SmeltError(f"the weight '{name}' has no place in GGUF", file=str(source.folder))
        kind = "F32" if len(shape) == 1 else dtype.upper()
        if source.coded(name):
            kind = PACKED[source.bits]
        elif kind == "Q8_0" and shape[-1] % BLOCK:
            kind = "F16"
        yield f"{there}.{leaf}", (name, kind)


def _bytes(value: Tensor | Codes, kind: str, name: str) -> np.ndarray:
    """The rows as they lie in the file, uint8 [rows, bytes of a row]."""
    if isinstance(value, Codes):
        blocks = value.code.unflatten(1, (-1, BLOCK))  # [out, blocks, 32]
        scale = value.scale.repeat_interleave(value.group // BLOCK, 1)[..., None].contiguous().view(torch.uint8)
        if kind == "Q4_0":  # one byte holds columns j and j + 16 of a block
            code = (blocks + 8).to(torch.uint8)
            packed = code[..., :16] | code[..., 16:] << 4
        else:
            packed = blocks.contiguous().view(torch.uint8)
        return torch.cat([scale, packed], 2).flatten(1).numpy()
    value = value.float()
    if not torch.isfinite(value).all() or (kind in ("F16", "Q8_0") and not torch.isfinite(value.half()).all()):
        raise SmeltError(
            f"'{name}' has values that {kind} cannot hold (up to {value.abs().max().item():.3g}); --dtype f32 can hold finite ones"
        )
    return gguf.quantize(value.contiguous().numpy(), _type(kind)).view(np.uint8)


# ------------------------------------------------------------------ tokenizer


def _vocabulary(folder: Path, rows: int) -> tuple[dict[str, Any], list[str]]:
    """({field of the writer: value}, notes) of a byte-level BPE; ids without a token are filled up to the embedding's rows."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizer's own library raises what it likes
        raise SmeltError(f"there is no tokenizer that can be read ({type(error).__name__})", file=str(folder)) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    pre, notes = _split(about, folder)
    table, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    token_of = {at: token for token, at in table.items()}
    if max(token_of) >= rows:
        raise SmeltError(f"its tokenizer has ids up to {max(token_of)}, its embedding only {rows} rows", file=str(folder))
    kinds = [
        UNUSED if at not in token_of else NORMAL if at not in added else CONTROL if added[at].special else USER_DEFINED
        for at in range(rows)
    ]
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    first = bool(whole and whole[0] == tokenizer.bos_token_id and whole != plain)
    last = bool(whole and whole[-1] == tokenizer.eos_token_id and whole != plain)
    if [tokenizer.bos_token_id] * first + plain + [tokenizer.eos_token_id] * last != whole:
        raise SmeltError("its tokenizer adds other tokens than a first and a last one, which GGUF cannot say", file=str(folder))
    fields: dict[str, Any] = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": [token_of.get(at, f"[PAD{at}]") for at in range(rows)],
        "token_types": kinds,
        "token_merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in about["model"]["merges"]],
        "add_bos_token": first,
        "add_eos_token": last,
    }
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    fields |= {name: at for name, at in ids.items() if at is not None}
    if isinstance(tokenizer.chat_template, str):
        fields["chat_template"] = tokenizer.chat_template
    return fields, notes


def _split(about: Mapping[str, Any], folder: Path) -> tuple[str, list[str]]:
    """(name of the split, notes) of a tokenizer.json. Raises SmeltError when the engines would cut text otherwise."""
    model, pre = about["model"], about.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    odd = [model.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")]
    level = steps[-1] if steps else {}
    if model.get("type") != "BPE" or any(odd) or not model["merges"] or level.get("type") != "ByteLevel" or level["add_prefix_space"]:
        raise SmeltError("cannot become a GGUF file: its tokenizer is not a byte-level BPE", file=str(folder))
    cut = ""
    if not level["use_regex"] and len(steps) == 2 and steps[0].get("type") == "Split":
        whole = steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
        cut = steps[0]["pattern"].get("Regex", "?") if whole else "?"
    elif not level["use_regex"] or len(steps) != 1:
        cut = "?"
    found = [name for name, rule in SPLITS.items() if rule == (cut, bool(model.get("ignore_merges")))]
    normal = (about.get("normalizer") or {"type": None})["type"]
    if not found or normal not in (None, "NFC"):
        raise SmeltError(
            f"cannot become a GGUF file: its tokenizer cuts text otherwise than {', '.join(SPLITS)}, which the engines know by name",
            file=str(folder),
        )
    return found[0], ["text that is not in Unicode's NFC form gets other tokens: GGUF has no normalizer"] if normal else []
