"""Retrieval memory for the causal video models that people have, without a change to their code."""

from longlive_rag.backbones.families.anyflow import apply_retrieval_memory, remove_retrieval_memory
from longlive_rag.backbones.patch import Patched, patch

__all__ = ["Patched", "apply_retrieval_memory", "patch", "remove_retrieval_memory"]
