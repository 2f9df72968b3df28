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
        git = folder / ".git"
        if git.is_file():  # a worktree: the file says where its HEAD is
            git = folder / git.read_text().removeprefix("gitdir: ").strip()
        if not (git / "HEAD").is_file():
            continue
        text = (git / "HEAD").read_text().strip()
        if not text.startswith("ref: "):
            return text
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
        if (common / text[5:]).is_file():
            return (common / text[5:]).read_text().strip()
        packed = common / "packed-refs"
        lines = packed.read_text().splitlines() if packed.is_file() else []
        return next((line.split()[0] for line in lines if line.endswith(" " + text[5:])), None)
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
