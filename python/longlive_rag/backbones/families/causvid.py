"""CausVid."""

from __future__ import annotations

from longlive_rag.backbones.own_context import Said
from longlive_rag.backbones.wan import WanFamily


class CausVid(WanFamily):
    """Sees the whole past; its attention also takes the end of the block."""

    name = "CausVid"
    marks = frozenset({"current_end"})

    def window(self, said: Said) -> int | None:
        return self.whole_past
