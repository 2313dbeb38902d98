"""LongLive-RAG's own repository."""

from __future__ import annotations

from longlive_rag.backbones.families.longlive import LongLive


class LongLiveRAG(LongLive):
    """Its memory of evicted keys stays empty; the retrieval memory takes over."""

    name = "LongLive-RAG"
    marks = frozenset({"memory_indices"})
