"""Where the teacher's tensors come from: the teacher itself, beside the student, or its likeliest tokens kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    """The function that turns a batch into the teacher's tensors that an objective reads.

    The teacher sees the student's ids and positions, in eval mode and without gradient. `width`: logits beyond it are
    cut (ids no tokenizer gives, see `agree`). Raises SmeltError for hidden states asked of a cache.
    """
    hidden = "teacher_hidden" in reading
    if cached is not None:
        if hidden:
            raise SmeltError("a cached teacher keeps logits only; this objective reads teacher_hidden, so leave out 'cache'")
        return lambda inputs: {"teacher": cached(inputs)}
    model.eval()
    call = torch.compile(model) if compile else model

    def online(inputs: dict[str, Tensor]) -> dict[str, Any]:
        ids = inputs["input_ids"]
        extra = {"position_ids": inputs["position_ids"]} if "position_ids" in inputs else {}
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = call(input_ids=ids, use_cache=False, output_hidden_states=hidden, **extra)
        have: dict[str, Any] = {"teacher": out.logits[..., :width] if width else out.logits}
        return have | {"teacher_hidden": out.hidden_states} if hidden else have

    return online


def agree(student: Loaded, teacher: Loaded | None, reading: tuple[str, ...]) -> int:
    """The width both read: that of the student's logits. Raises SmeltError when the teacher cannot teach this student.

    Both must give every id the same meaning; an equal vocabulary size says nothing. Logits may be wider than the
    tokenizer (padding to a round number): a wider teacher is cut to the student's width and its softmax taken over what
    is left; a narrower one is refused, because it has no opinion on ids the student can say.
    """
    width = student.model.get_output_embeddings().weight.shape[0]
    if "teacher" not in reading and "teacher_hidden" not in reading:
        return width
    if teacher is None:
        raise SmeltError("this objective reads a teacher and there is none; write 'teacher: NAME' in its train block")
    if teacher.model is student.model:
        raise SmeltError("the teacher and the student are one and the same model in memory; load the teacher again")
    if not same_tokenizer(student.tokenizer, teacher.tokenizer):
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


def named(value: Any) -> tuple[str | None, TopK | None]:
    """What `teacher:` of a train block says: a model's name, or {model: NAME, cache: topk(k=64)}."""
    if value is None or isinstance(value, str):
        return value, None
    if not isinstance(value, dict) or not isinstance(value.get("model"), str):
        raise SmeltError("teacher: write a model, or {model: NAME, cache: topk(k=64)}")
    for key in value:
        if key not in ("model", "cache"):
            raise SmeltError(f"teacher: there is no '{key}'{nearest(key, ('model', 'cache'))}")
    cache = value.get("cache")
    return value["model"], cache if cache is None or isinstance(cache, TopK) else parse(str(cache))
