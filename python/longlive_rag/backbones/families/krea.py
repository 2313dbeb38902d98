"""krea realtime: before each block, the newest frames pass again, all together, and fill the cache anew."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from longlive_rag.backbones.families.family import Arguments, Family
from longlive_rag.backbones.follow import Follower


class Krea(Family):
    """Frames are numbered from the left end of the cache in each block, so the memory counts them by itself.

    The pass that fills the cache is the model's own; the keys that it makes are the frames' keys from then on.
    """

    name = "krea realtime"
    attributes = frozenset({"fused_projections"})
    has_clean_pass = False
    reads_cache = True

    def observe(self, sequence: Follower, frames: int, latents: Tensor, arguments: Arguments) -> Iterable[int] | None:
        if arguments.get("block_mask") is None:
            return None
        block = sequence.block
        if block is None:
            # A video that goes on from given latents.
            sequence.restart()
            sequence.follow(0, frames, latents)
            return range(frames)
        if frames < min(block.stop, len(block) + 1):
            raise ValueError(
                f"kv_cache_num_frames must be at least {len(block) + 1}, a block and the first frame, so that every "
                f"frame gets clean keys, got {frames}"
            )
        sequence.notes["next"] = block.stop
        return [0, *range(block.stop - frames + 1, block.stop)]

    def begin(self, sequence: Follower, start: int, frames: int, latents: Tensor, arguments: Arguments) -> None:
        if start and sequence.block is not None:
            start = sequence.notes.get("next", sequence.block.stop)
        sequence.follow(start, frames, latents)
