"""What surrounds a training: its bar, Ctrl-C, settings that are put back, and which checkpoints were written to their end."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import convert_to_fp32
from transformers import PreTrainedModel

from smelt.progress import Track, track

__all__ = ["_complete", "bar_of", "halved", "interrupts", "last_complete", "leaving_no_trace"]


@contextlib.contextmanager
def leaving_no_trace(model: PreTrainedModel) -> Iterator[None]:
    """Trainer and accelerate are quiet inside, and what they set for the whole process is set back afterwards."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    environment = {key: value for key, value in os.environ.items() if key.startswith("ACCELERATE_")}
    cache, training, forward = model.config.use_cache, model.training, model.__dict__.get("forward")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = cache
        model.train(training)
        for name in ("forward", "_original_forward"):  # bf16 wraps autocast around the forward of the model itself
            model.__dict__.pop(name, None)
        if forward is not None:
            model.__dict__["forward"] = forward
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
        for key in [key for key in os.environ if key.startswith("ACCELERATE_") and key not in environment]:
            del os.environ[key]  # a compiled training would make every later one compile
        os.environ.update(environment)


@contextlib.contextmanager
def halved(model: PreTrainedModel, half: bool) -> Iterator[None]:
    """Inside, the part of the model below its head reads in bfloat16 and answers in float32, whoever calls it.

    Accelerate does the same to the whole model only, so what calls `model.base_model` would stay in float32.
    """
    inner = model.base_model
    if not half or inner is model:
        yield
        return
    before, forward = inner.__dict__.get("forward"), inner.forward

    @functools.wraps(forward)
    def halfway(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(model.device.type, torch.bfloat16):
            return convert_to_fp32(forward(*args, **kwargs))

    inner.forward = halfway
    try:
        yield
    finally:
        if before is None:
            del inner.forward
        else:
            inner.forward = before


@contextlib.contextmanager
def bar_of(label: str, total: int, done: int) -> Iterator[Track]:
    if int(os.environ.get("RANK", "0")):
        yield Track(label, total, "tokens", done, _show=lambda state: None)
        return
    with track(label, total, "tokens", done) as bar:
        yield bar


@contextlib.contextmanager
def interrupts(watch: Any, world: int) -> Iterator[None]:
    """Ctrl-C lets the step end and a checkpoint be written; a second one stops at once. One process only."""
    if world > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def once(number, frame):
        watch.interrupted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _complete(checkpoint: Path, about: dict[str, Any]) -> None:
    """Mark a checkpoint as written to its end, once all of it is on the disk."""
    for file in [*checkpoint.iterdir(), checkpoint]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    (checkpoint / "complete.new").write_text(json.dumps(about))
    os.replace(checkpoint / "complete.new", checkpoint / "complete")


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; unfinished ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))
    for broken in [p for p in found if not (p / "complete").exists()]:
        shutil.rmtree(broken, ignore_errors=True)
    return next((p for p in reversed(found) if (p / "complete").exists()), None)
