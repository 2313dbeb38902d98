"""Retrieval memory for autoregressive video diffusion.

    from longlive_rag import RetrievalConfig, RetrievalMemory, patch, rollout

The names below are imported when they are first used, so that ``import longlive_rag`` and ``longlive-rag --help``
do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longlive_rag.backbones import patch
    from longlive_rag.budget import Budget
    from longlive_rag.config import RetrievalConfig
    from longlive_rag.generation.rollout import rollout, stream
    from longlive_rag.memory import RetrievalMemory

__version__ = "0.1.0"

__all__ = ["Budget", "RetrievalConfig", "RetrievalMemory", "__version__", "patch", "rollout", "stream"]

_MODULES = {
    "Budget": "longlive_rag.budget",
    "RetrievalConfig": "longlive_rag.config",
    "RetrievalMemory": "longlive_rag.memory",
    "patch": "longlive_rag.backbones",
    "rollout": "longlive_rag.generation.rollout",
    "stream": "longlive_rag.generation.rollout",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
