"""LongLive 1, with absolute or relative positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longlive_rag.backbones.family import CausalTransformer
from longlive_rag.backbones.follow import Follower
from longlive_rag.backbones.own_context import OwnContext, Said
from longlive_rag.backbones.wan import WanFamily, cache_ends
from longlive_rag.backbones.wan_attention import Arguments
from longlive_rag.config import Positions, RetrievalConfig


class LongLive(WanFamily):
    """The transformer advances the cache after all layers, by what each attention returns beside its output."""

    name = "LongLive"
    marks = frozenset({"sink_recache_after_switch"})

    def positions(self, said: Said, transformer: CausalTransformer) -> Positions:
        # The relative ("infinity") mode is another module of the same class and attributes: only its code tells.
        code = getattr(type(transformer.attentions[0]).forward, "__code__", None)
        return "relative" if "block_relativistic_rope" in getattr(code, "co_names", ()) else "absolute"

    def switch_frames(self, config: RetrievalConfig, own: OwnContext | None) -> int | None:
        # The frames of the pipeline's own window pass again, and see the sink and what they retrieve.
        window = config.context_frames if own is None else own.context_frames
        return window + config.sink_frames + config.memory_frames

    def start_pass(
        self, follower: Follower[Any], start: int, frames: int, latents: Tensor, arguments: Arguments
    ) -> None:
        if arguments.get("sink_recache_after_switch"):
            # The switch drops the old sink: the frames made again are the first that memory knows from then on.
            follower.restart()
        super().start_pass(follower, start, frames, latents, arguments)

    def output(self, x: Tensor, arguments: Arguments) -> Any:
        # Without an update, the transformer only moves the two indices.
        return x, (*cache_ends(x, arguments), None)
