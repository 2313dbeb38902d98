"""The context policy of a video, as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Positions = Literal["relative", "absolute"]
Query = Literal["latest", "draft"]
Solver = Literal["renoise", "unipc"]
"""How a block goes from one denoising step to the next."""

PAPER_STEPS = (1000, 750, 500, 250)
"""Denoising timesteps before the shift, as in the paper (arXiv 2606.02553)."""


@dataclass(frozen=True)
class RetrievalConfig:
    """What a block of latent frames sees: ``[ sink | memory | local window ]``.

    The defaults are the paper's (arXiv 2606.02553). Without memory and with absolute positions, this is the native
    sliding window of Self-Forcing and its relatives.

    Raises:
        ValueError: the budgets do not fit into the context, or a value is out of range.
    """

    context_frames: int = 12
    """Latent frames a block attends to, its own included."""
    sink_frames: int = 1
    """First frames of the video, always in the context."""
    memory_frames: int = 6
    """Frames retrieved for each block (K); 0: no memory."""
    recency_guard: int = 5
    """Newest frames outside the context that may not be retrieved (R)."""
    block_frames: int = 3
    """Latent frames denoised together."""
    positions: Positions = "relative"
    """Temporal positions: "relative" to the left end of the context, with memory at 0 (the paper's), or "absolute", the
    frame index."""
    query: Query = "latest"
    """What memory is searched with: the "latest" finished frame (the paper's), or the "draft", the block's own clean
    prediction after its first denoising step, which also finds what a scene change brings back."""

    def __post_init__(self) -> None:
        for name, least in (
            ("context_frames", 1),
            ("sink_frames", 0),
            ("memory_frames", 0),
            ("recency_guard", 0),
            ("block_frames", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name, allowed in (("positions", Positions), ("query", Query)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
        if self.memory_frames > 64:
            raise ValueError(f"memory_frames must be at most 64, got {self.memory_frames}")
        needed = self.sink_frames + self.memory_frames + self.block_frames
        if needed > self.context_frames:
            raise ValueError(
                f"sink_frames + memory_frames + block_frames must fit into context_frames, got "
                f"{self.sink_frames} + {self.memory_frames} + {self.block_frames} = {needed} > {self.context_frames}"
            )

    @classmethod
    def from_backbone(cls, model: Any) -> RetrievalConfig:
        """The paper's memory within the window that a causal video model has by itself: what `patch(model)` uses.

        Window, sink, block length and, where they are published, memory and recency guard are read off the model and
        its pipeline. What they do not say is the paper's.

        Args:
            model: as for `patch`; a pipeline says more than a bare transformer.

        Raises:
            TypeError, ValueError: as `patch` does of a model; or its window has no room for memory.
        """
        # Upwards, so only when called. The answer depends on the family, which the attention's arguments tell: nothing
        # that this module could know, or that could register itself here before `backbones` has been imported.
        from longlive_rag.backbones.patching import config_for

        return config_for(model, "memory")

    @property
    def local_frames(self) -> int:
        """Length of the local window, the block's own frames included."""
        return self.context_frames - self.sink_frames - self.memory_frames
