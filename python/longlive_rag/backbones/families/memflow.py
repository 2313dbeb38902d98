"""MemFlow."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longlive_rag.backbones.families.longlive import LongLive
from longlive_rag.backbones.wan import cache_ends
from longlive_rag.backbones.wan_attention import Arguments


class MemFlow(LongLive):
    """Its bank of keys stays empty; the retrieval memory takes over."""

    name = "MemFlow"
    marks = frozenset({"kv_bank", "update_bank", "is_recache"})

    def output(self, x: Tensor, arguments: Arguments) -> Any:
        # Its update step needs an update to read; one that is called a recomputation leaves cache and bank alone.
        return x, (*cache_ends(x, arguments), {"action": "none", "is_recompute": True})
