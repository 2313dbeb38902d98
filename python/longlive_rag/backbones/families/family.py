"""What the public causal video models agree on, and the families that differ little.

All descend from Wan: a transformer whose blocks call ``self_attn(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache,
...)`` positionally. A family is told by the names that its attention's ``forward`` takes, never by a class name: the
classes all have the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from longlive_rag.backbones.follow import Follower

REQUIRED = frozenset({"x", "grid_sizes", "kv_cache", "current_start"})
"""Names that the attention of every family takes."""
COMMON = REQUIRED | {"seq_lens", "freqs", "block_mask", "cache_start"}
"""Names that tell nothing."""

Arguments = Mapping[str, Any]
"""The arguments of one call of the attention, by name."""


def cache_ends(x: Tensor, arguments: Arguments) -> tuple[int, int]:
    """Tokens of the video after this call, and how many of them a cache of that size would hold."""
    end = arguments["current_start"] + x.shape[1]
    keys = arguments["kv_cache"]["k"]
    return end, min(end, keys.shape[1]) if isinstance(keys, Tensor) and keys.numel() else end


class Family:
    """Self-Forcing, Causal-Forcing: the cache is advanced inside the attention, which returns a tensor."""

    name = "Self-Forcing"
    marks: frozenset[str] = frozenset()
    """Names that only its attention takes; one is enough to tell it."""
    attributes: frozenset[str] = frozenset()
    """What its attention has, where it takes no name of its own."""
    has_clean_pass = True
    """Whether the last pass over a block takes its clean latents; otherwise they are what that pass predicts."""
    reads_cache = False
    """Whether the pipeline goes by the size of its own cache, which then cannot be freed."""
    drafts = True
    """Whether the first pass over a block is its first denoising step, whose result can ask for memory."""

    def begin(self, sequence: Follower, start: int, frames: int, latents: Tensor, arguments: Arguments) -> None:
        """A pass over the frames ``start .. start + frames`` begins; `latents` [B, F, C, H, W] are its input."""
        sequence.follow(start, frames, latents)

    def observe(self, sequence: Follower, frames: int, latents: Tensor, arguments: Arguments) -> Iterable[int] | None:
        """Frames of the memory whose keys a pass makes anew, if that is all it is for; the model answers it itself."""
        return None

    def output(self, x: Tensor, arguments: Arguments) -> Any:
        """What the attention returns, given the tensor [B, L, H * D]. Here, the indices of the cache move at once."""
        global_end, local_end = cache_ends(x, arguments)
        cache = arguments["kv_cache"]
        for name, end in (("global_end_index", global_end), ("local_end_index", local_end)):
            if isinstance(cache.get(name), Tensor):
                cache[name].fill_(end)
            elif name in cache:
                cache[name] = end
        return x


class CausVid(Family):
    """CausVid: sees the whole past, and is told where the block ends."""

    name = "CausVid"
    marks = frozenset({"current_end"})


class LongLive(Family):
    """LongLive 1, with absolute or relative positions: the transformer advances the cache after all layers."""

    name = "LongLive"
    marks = frozenset({"sink_recache_after_switch"})

    def begin(self, sequence: Follower, start: int, frames: int, latents: Tensor, arguments: Arguments) -> None:
        if arguments.get("sink_recache_after_switch"):
            # The switch drops the old sink: what follows is a new video that begins with the frames made again.
            sequence.restart()
        super().begin(sequence, start, frames, latents, arguments)

    def output(self, x: Tensor, arguments: Arguments) -> Any:
        # Without an update, the transformer only moves the two indices.
        return x, (*cache_ends(x, arguments), None)


class LongLiveRAG(LongLive):
    """LongLive-RAG's own repository: its memory of evicted keys stays empty, ours takes over."""

    name = "LongLive-RAG"
    marks = frozenset({"memory_indices"})


class MemFlow(LongLive):
    """MemFlow: its bank of keys stays empty, the retrieval memory takes over."""

    name = "MemFlow"
    marks = frozenset({"kv_bank", "update_bank", "is_recache"})

    def output(self, x: Tensor, arguments: Arguments) -> Any:
        # Its update step needs an update to read; one that is called a recomputation leaves cache and bank alone.
        return x, (*cache_ends(x, arguments), {"action": "none", "is_recompute": True})
