"""Self-Forcing and Causal-Forcing."""

from __future__ import annotations

from longlive_rag.backbones.wan import WanFamily


class SelfForcing(WanFamily):
    """The cache is advanced inside the attention, which returns a tensor; no name of its own tells it from others."""

    name = "Self-Forcing"
