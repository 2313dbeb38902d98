"""Chunks of consecutive latent frames, redrawn for every epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from longlive_rag.training.latents import LatentVideo

Chunk = tuple[int, int]
"""Number of the video, first frame."""


class ChunkDataset(Dataset[Tensor]):
    """Maps a `Chunk` to its latents, float32 [S, C, H, W]; reads only these frames."""

    def __init__(self, videos: Sequence[LatentVideo], chunk_frames: int) -> None:
        self.videos, self.chunk_frames = videos, chunk_frames

    def __getitem__(self, chunk: Chunk) -> Tensor:
        video, start = chunk
        return self.videos[video].read(start, self.chunk_frames)


def split_videos(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the training and the validation videos, at least one each, reproducible by seed.

    Raises:
        ValueError: fewer than two videos.
    """
    if count < 2:
        raise ValueError(f"the latents must hold at least 2 videos, one of them for validation, got {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(count - 1, max(1, round(fraction * count)))
    return sorted(order[held_out:]), sorted(order[:held_out])


def draw_chunks(
    videos: Sequence[LatentVideo], numbers: Sequence[int], chunk_frames: int, per_video: int, generator: torch.Generator
) -> list[Chunk]:
    """One epoch: `per_video` chunks from each video at random places, in random order."""
    chunks = [
        (number, int(torch.randint(videos[number].frames - chunk_frames + 1, (), generator=generator)))
        for number in numbers
        for _ in range(per_video)
    ]
    return [chunks[place] for place in torch.randperm(len(chunks), generator=generator).tolist()]


def fixed_chunks(
    videos: Sequence[LatentVideo], numbers: Sequence[int], chunk_frames: int, per_video: int
) -> list[Chunk]:
    """`per_video` chunks evenly spaced over each video, the same in every epoch, for validation."""
    return [
        (number, start)
        for number in numbers
        for start in torch.linspace(0, videos[number].frames - chunk_frames, per_video).round().long().tolist()
    ]
