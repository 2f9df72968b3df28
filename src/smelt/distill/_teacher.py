"""Where the teacher's tensors come from: the teacher itself, beside the student, or its likeliest tokens kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smelt.distill._capture import Capture
from smelt.distill._retokenize import Retokenizer
from smelt.distill._topk import Cached, TopK, parse
from smelt.model._load import Loaded, same_tokenizer
from smelt.spec import SmeltError, nearest

__all__ = ["agree", "named", "supply"]


def supply(
    model: Any,
    reading: tuple[str, ...],
    cached: Cached | None = None,
    *,
    width: int = 0,
    precision: str = "fp32",
    compile: bool = False,
    translate: Retokenizer | None = None,
    capture: Capture | None = None,
) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    """The function that turns a batch into the teacher's tensors that an objective reads.

    The teacher sees the student's ids and positions (or, with `translate`, the same text in its own ids), in eval mode and
    without gradient. `width`: logits beyond it are cut (ids no tokenizer gives, see `agree`). `capture` is on the model
    when the objective reads `teacher_projected`. Raises SmeltError for what a cache does not have.
    """
    hidden = "teacher_hidden" in reading
    if cached is not None:
        if other := [name for name in reading if name.startswith("teacher_")]:
            raise SmeltError(f"a cached teacher keeps logits only; this objective reads {other[0]}, so leave out 'cache'")
        return lambda inputs: {"teacher": cached(inputs)}
    model.eval()
    call = torch.compile(model) if compile else model
    fixed = {"teacher_head": model.get_output_embeddings, "teacher_embedding": model.get_input_embeddings}
    have_always = {name: module().weight.detach() for name, module in fixed.items() if name in reading}

    def online(inputs: dict[str, Tensor]) -> dict[str, Any]:
        ids = inputs["input_ids"]
        have: dict[str, Any] = dict(have_always)
        extra = {"position_ids": inputs["position_ids"]} if "position_ids" in inputs else {}
        if translate is not None:
            have, extra = have | translate(inputs), {}
            ids = have["teacher_ids"]
        elif "teacher_ids" in reading:
            have |= {"teacher_ids": ids, "teacher_labels": inputs["labels"].clamp(min=0), "teacher_keep": inputs["labels"] != -100}
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = call(input_ids=ids, use_cache=False, output_hidden_states=hidden, **extra)
        have["teacher"] = out.logits[..., :width] if width else out.logits
        if hidden:
            have["teacher_hidden"] = out.hidden_states
        if capture is not None:
            have["teacher_projected"] = capture.take()
        return have

    return online


def agree(student: Loaded, teacher: Loaded | None, reading: tuple[str, ...]) -> int:
    """The width both read: that of the student's logits. Raises SmeltError when the teacher cannot teach this student.

    Both must give every id the same meaning; an equal vocabulary size says nothing. Logits may be wider than the
    tokenizer (padding to a round number): a wider teacher is cut to the student's width and its softmax taken over what
    is left; a narrower one is refused, because it has no opinion on ids the student can say. An objective that reads
    `teacher_ids` takes a teacher of any tokenizer; the width is then 0 (nothing is cut) when they differ.
    """
    width = student.model.get_output_embeddings().weight.shape[0]
    if not any(name.startswith("teacher") for name in reading):
        return width
    if teacher is None:
        raise SmeltError("this objective reads a teacher and there is none; write 'teacher: NAME' in its train block")
    if teacher.model is student.model:
        raise SmeltError("the teacher and the student are one and the same model in memory; load the teacher again")
    if not same_tokenizer(student.tokenizer, teacher.tokenizer):
        if "teacher_ids" in reading:
            return 0
        raise SmeltError(
            f"the tokenizers differ: ids of the student ({student.folder}) mean something else to the teacher ({teacher.folder}); "
            "this objective needs a teacher of the same vocabulary"
        )
    other = teacher.model.get_output_embeddings().weight.shape[0]
    if other < width:
        raise SmeltError(
            f"the teacher has {other} logits and the student {width}; a narrower teacher says nothing about the last {width - other}"
        )
    return width


def named(value: Any) -> tuple[tuple[str, ...], TopK | None]:
    """What `teacher:` of a train block says: a model's name, a list of them, or {model: NAME, cache: topk(k=64)}.

    Returns the names of local models and the cache. An endpoint ({endpoint: URL, model: NAME}) is no local model.
    """
    if value is None:
        return (), None
    if isinstance(value, str):
        return (value,), None
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value):
        return tuple(value), None
    if isinstance(value, dict) and isinstance(value.get("endpoint"), str) and "cache" not in value:
        return (), None
    if not isinstance(value, dict) or not isinstance(value.get("model"), (str, list)):
        raise SmeltError("teacher: write a model, a list of models, or {model: NAME, cache: topk(k=64)}")
    for key in value:
        if key not in ("model", "cache"):
            raise SmeltError(f"teacher: there is no '{key}'{nearest(key, ('model', 'cache'))}")
    cache = value.get("cache")
    names = value["model"] if isinstance(value["model"], list) else [value["model"]]
    if cache is not None and len(names) > 1:
        raise SmeltError("teacher: one teacher can be cached, not several")
    return tuple(names), cache if cache is None or isinstance(cache, TopK) else parse(str(cache))
