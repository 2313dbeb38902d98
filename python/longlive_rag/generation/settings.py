"""What decides what a video looks like, besides weights and prompts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from longlive_rag.config import RetrievalConfig
from longlive_rag.generation.sampling import PAPER_SAMPLING, Sampling

# Rows and columns of pixels per token, at least: the VAE's 8 times the patch of 2.
_PIXELS_PER_TOKEN = 16


@dataclass(frozen=True)
class VideoSettings:
    """Everything besides weights and prompt that decides what a video looks like.

    Raises:
        ValueError: a value is out of range.
    """

    seconds: float = 30.0
    fps: float = 16.0
    height: int = 480
    width: int = 832
    sampling: Sampling = PAPER_SAMPLING
    """Its seed also fixes the initial noise; its `renoise` is not used."""
    policy: RetrievalConfig = field(default_factory=RetrievalConfig)

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be positive, got {self.seconds}")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps must be above 0 and at most 1000, got {self.fps}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < _PIXELS_PER_TOKEN or value % _PIXELS_PER_TOKEN:
                raise ValueError(f"{name} must be a positive multiple of {_PIXELS_PER_TOKEN} pixels, got {value}")

    def record(self) -> dict[str, Any]:
        """What a video's JSON file says of its settings."""
        return {
            "seconds": self.seconds,
            "fps": self.fps,
            "height": self.height,
            "width": self.width,
            "denoising_steps": list(self.sampling.denoising_steps),
            "timestep_shift": self.sampling.timestep_shift,
            "context_noise": self.sampling.context_noise,
            "seed": self.sampling.seed,
            "memory": asdict(self.policy),
        }

    def flat(self) -> dict[str, Any]:
        """The same under the names of the command line's options."""
        return flat_settings(self.record())

    def latent_frames(self, temporal_factor: int) -> int:
        """Whole blocks of latent frames that make at least `seconds` of video."""
        pictures = math.ceil(self.seconds * self.fps - 1e-6)
        frames = math.ceil((pictures - 1) / temporal_factor) + 1
        block = self.policy.block_frames
        return math.ceil(frames / block) * block


def flat_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Settings as a video's JSON file has them, on one level."""
    return {**{name: value for name, value in record.items() if name != "memory"}, **record["memory"]}
