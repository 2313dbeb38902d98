"""Backbones: our own causal Wan transformer and the loading of public checkpoints."""

from longlive_rag.models.causal_wan import Attention, CausalWanModel, Prompt

__all__ = ["Attention", "CausalWanModel", "Prompt"]
