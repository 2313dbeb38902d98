"""What the causal video models that descend from Wan have in common.

Their transformer's blocks call ``self_attn(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, ...)`` positionally. A
family is recognised by the names that this attention takes, never by a class name: the classes all have the same one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from longlive_rag import rotary
from longlive_rag.backbones.family import Attachment, CausalTransformer, Family
from longlive_rag.backbones.follow import Follower
from longlive_rag.backbones.own_context import OwnContext, Said
from longlive_rag.backbones.wan_attention import Arguments, attach_to_wan
from longlive_rag.config import Positions

REQUIRED = frozenset({"x", "grid_sizes", "kv_cache", "current_start"})
"""Names that the attention of every family takes."""
COMMON = REQUIRED | {"seq_lens", "freqs", "block_mask", "cache_start"}
"""Names several families share."""
PROJECTIONS = ("q", "k", "v", "o", "norm_q", "norm_k")
SIZES = ("num_heads", "head_dim")


def cache_ends(x: Tensor, arguments: Arguments) -> tuple[int, int]:
    """Tokens of the video after this call, and how many of them a cache of that size would hold."""
    end = arguments["current_start"] + x.shape[1]
    keys = arguments["kv_cache"]["k"]
    return end, min(end, keys.shape[1]) if isinstance(keys, Tensor) and keys.numel() else end


class WanFamily(Family):
    """The conventions of Self-Forcing; a family overrides what it does differently."""

    looked_for = f"{', '.join(PROJECTIONS)}, {', '.join(SIZES)} and a forward that takes kv_cache and current_start"
    marks: frozenset[str] = frozenset()
    """Names that only its attention takes; one is enough to recognise it."""
    attributes: frozenset[str] = frozenset()
    """What its attention has, where it takes no name of its own."""
    whole_past = 21
    """Latent frames that the caches hold at 480x832 where a model attends to all of the past (local_attn_size -1)."""
    has_clean_pass = True
    """Whether the last pass over a block takes its clean latents; otherwise they are what that pass predicts."""

    def start_pass(
        self, follower: Follower[Any], start: int, frames: int, latents: Tensor, arguments: Arguments
    ) -> None:
        """A pass over the frames ``start .. start + frames`` begins; `latents` [B, F, C, H, W] are its input."""
        follower.follow(start, frames, latents)

    def recomputes(
        self, follower: Follower[Any], frames: int, latents: Tensor, arguments: Arguments
    ) -> Iterable[int] | None:
        """The memory's frames whose keys a pass computes again, if that is its only purpose; None: it is not.

        The model answers such a pass itself.
        """
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

    def is_attention(self, module: nn.Module) -> bool:
        if not all(isinstance(getattr(module, name, None), nn.Module) for name in PROJECTIONS):
            return False
        if not all(isinstance(getattr(module, name, None), int) for name in SIZES):
            return False
        return {"kv_cache", "current_start"} <= self.arguments(module)

    def arguments(self, attention: Any) -> frozenset[str]:
        return frozenset(inspect.signature(attention.forward).parameters)

    @property
    def known_arguments(self) -> frozenset[str]:
        return COMMON | self.marks

    def fits(self, attention: Any) -> bool:
        names = self.arguments(attention)
        if not names >= REQUIRED:
            return False
        if self.marks or self.attributes:
            return bool(self.marks & names) or any(hasattr(attention, name) for name in self.attributes)
        return True

    def check(self, transformer: CausalTransformer) -> None:
        # Keys are rotated by the memory; with other frequencies (RIFLEx, another theta) they would come out wrong.
        table = getattr(transformer.module, "freqs", None)
        if not isinstance(table, Tensor) or not table.is_complex():
            return
        _, head_dim = self.heads(transformer.attentions[0])
        temporal, spatial = rotary.temporal_frequencies(head_dim), rotary.spatial_frequencies(head_dim)
        expected = torch.cat([temporal, spatial, spatial])
        angle = table[1].angle().to(device="cpu", dtype=torch.float64)
        if angle.shape != expected.shape or not torch.allclose(angle, expected, atol=1e-5):
            raise ValueError("model.freqs must be Wan's rotary embedding (theta 10000), but its frequencies are others")

    def longest_pass(self, model: Any, transformer: CausalTransformer) -> int | None:
        stated = [getattr(holder, "num_frame_per_block", None) for holder in (model, transformer.module)]
        return max((frames for frames in stated if isinstance(frames, int)), default=None)

    def own_context(self, model: Any, transformer: CausalTransformer) -> OwnContext | None:
        said = Said(model, transformer.module, transformer.attentions[0])
        window, sink = self.window(said), self.sink(said)
        if window is None:
            return None
        positions = self.positions(said, transformer)
        return OwnContext(
            context_frames=window,
            sink_frames=sink,
            block_frames=said.integer("num_frame_per_block") or 1,
            positions=positions,
            memory_positions=self.memory_positions(positions),
            longest_pass=self.longest_pass(model, transformer) or 1,
            memory_frames=said.integer("memory_size") or None,
            recency_guard=said.integer("recent_exclude"),
        )

    def window(self, said: Said) -> int | None:
        """Latent frames that a block attends to, its own included; None: the model does not say."""
        stated = said.integer("local_attn_size")
        if stated is None or stated > 0:
            return stated
        attended, tokens = said.integer("max_attention_size"), said.integer("frame_seq_length")
        return attended // tokens if attended and tokens and attended >= tokens else self.whole_past

    def sink(self, said: Said) -> int:
        return said.integer("sink_size") or 0

    def positions(self, said: Said, transformer: CausalTransformer) -> Positions:
        """Temporal positions of the model's own attention."""
        return "absolute"

    def memory_positions(self, own: Positions) -> Positions:
        """Temporal positions of the context with memory, given the model's own."""
        return "relative"

    def heads(self, attention: Any) -> tuple[int, int]:
        return attention.num_heads, attention.head_dim

    def attach(self, transformer: CausalTransformer, attachment: Attachment) -> None:
        attach_to_wan(transformer, attachment, self)
