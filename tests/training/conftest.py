from pathlib import Path

import pytest
import torch

from longlive_rag.training.latents import write_latents


def write_videos(folder: Path, videos: int, frames: int = 12, channels: int = 4, size: int = 8) -> Path:
    """Latents of three patterns that come and go slowly, so that there is something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    patterns = torch.randn(3, channels * size * size, generator=torch.Generator().manual_seed(99))
    for number in range(videos):
        generator = torch.Generator().manual_seed(number)
        amounts = torch.randn(frames, 3, generator=generator).cumsum(0) / 3
        latents = (amounts @ patterns).view(frames, channels, size, size)
        write_latents(folder / f"latent_{number:06d}.safetensors", latents, {"number": str(number)})
    return folder


@pytest.fixture
def latents_folder(tmp_path: Path) -> Path:
    return write_videos(tmp_path / "latents", 7)
