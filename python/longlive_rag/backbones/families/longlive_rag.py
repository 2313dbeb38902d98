"""LongLive-RAG's own repository."""

from __future__ import annotations

from longlive_rag.backbones.families.longlive import LongLive
from longlive_rag.backbones.family import CausalTransformer
from longlive_rag.backbones.own_context import Said
from longlive_rag.config import Positions


class LongLiveRAG(LongLive):
    """Its memory of evicted keys stays empty; the retrieval memory takes over."""

    name = "LongLive-RAG"
    marks = frozenset({"memory_indices"})

    def positions(self, said: Said, transformer: CausalTransformer) -> Positions:
        return "relative"
