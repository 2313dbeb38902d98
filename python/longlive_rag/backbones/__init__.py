"""Retrieval memory for the causal video models that people have, without a change to their code."""

from longlive_rag.backbones.patching import Patched, patch

__all__ = ["Patched", "patch"]
