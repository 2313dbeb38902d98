"""Retrieval memory for the causal video models that people have, without a change to their code.

| module | what it holds |
|---|---|
| `patching` | the door: `patch()`, and `Patched`, which takes it back |
| `find` | the causal transformer inside a model, wrapper or pipeline |
| `family` | what a family declares; what attaching one needs |
| `families` | one file per family, and the table of them |
| `wan`, `wan_attention` | what the descendants of Wan share: how they are found, and how memory attaches to them |
| `follow` | reads blocks, videos and prompt switches off the passes over one key-value cache |
| `caches` | which cache belongs to which follower; freeing the pipeline's own keys and values |
| `journal` | what each video got from memory |
| `forwards` | replaces the `forward` of module instances, and restores it |
| `run` | `longlive-rag run`: patching inside a script's own process |

The names below are imported on first use: `run.settings` must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longlive_rag.backbones.patching import Patched, patch

__all__ = ["Patched", "patch"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("longlive_rag.backbones.patching"), name)
