"""What a result was made with: commit, versions, machine; and transformers kept quiet meanwhile."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import smelt

__all__ = ["git_hash", "machine", "quiet", "versions"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' own bars and notices off; ours are enough."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def git_hash() -> str | None:
    """Commit of the checkout this source lies in, read from .git without running git."""
    for folder in Path(__file__).parents[1:4]:
        head = folder / ".git" / "HEAD"
        if head.is_file():
            text = head.read_text().strip()
            if not text.startswith("ref: "):
                return text
            ref = folder / ".git" / text[5:]
            return ref.read_text().strip() if ref.is_file() else None
    return None


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy")
    return {"python": platform.python_version(), "smelt": smelt.__version__} | {n: version(n) for n in names}


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "os": platform.platform(terse=True),
    }
