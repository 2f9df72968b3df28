"""smelt: shrink a language model, and prove it.

    smelt.run("recipe.yaml")                          the whole of a recipe, as `smelt run`
    smelt.load("folder", cache="kivi(bits=2)")        a model with runtime methods bound
    with smelt.bind(model, cache=Kivi(bits=2)): ...   bound for the length of a block
    smelt.rank("embedded", "query", passages)         the passages, best first

Importing smelt imports neither torch nor transformers and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smelt.spec import SmeltError

__version__ = "0.1.0"
__all__ = ["SmeltError", "__version__", "bind", "load", "rank", "run"]

if TYPE_CHECKING:
    from smelt.pipeline import run
    from smelt.ranking import rank
    from smelt.runtime import bind, load

_WHERE = {"run": "smelt.pipeline", "bind": "smelt.runtime", "load": "smelt.runtime"}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    if name == "rank":  # a family's folder, and callable
        import importlib

        return importlib.import_module("smelt.rank")
    raise AttributeError(f"module 'smelt' has no attribute '{name}'")
