"""Memories in float32 on the CPU, in which a test can look at every number."""

from __future__ import annotations

import torch

from longlive_rag import RetrievalConfig, RetrievalMemory
from longlive_rag.embedding import AveragePool


def small_memory(config: RetrievalConfig, **arguments: object) -> RetrievalMemory:
    """A memory of these sizes (batch, layers, heads, head_dim, grid); the other arguments are optional."""
    usual: dict[str, object] = {"device": "cpu", "dtype": torch.float32, "embedding": AveragePool()}
    return RetrievalMemory(config, **{**usual, **arguments})  # type: ignore[arg-type]
