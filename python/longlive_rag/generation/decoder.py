"""What the pipeline asks of whatever makes pictures of latents."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Decoder(ABC):
    """Decodes a video while it is being made, keeping only what it needs of the past.

    The result is that of decoding the whole video at once. The first latent frame becomes one picture, each later one
    `temporal_factor`.
    """

    @property
    @abstractmethod
    def channels(self) -> int:
        """Latent channels."""

    @property
    @abstractmethod
    def spatial_factor(self) -> int:
        """Pixels per latent column or row."""

    @property
    @abstractmethod
    def temporal_factor(self) -> int:
        """Pictures per latent frame after the first."""

    @property
    @abstractmethod
    def reach(self) -> int:
        """Latent frames before a picture's own that it depends on, at most."""

    def pictures(self, latent_frames: int) -> int:
        """Pictures that the first `latent_frames` of a video become."""
        return max(0, self.temporal_factor * (latent_frames - 1) + 1)

    @abstractmethod
    def reset(self) -> None:
        """Begin a new video."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next frames of the video.

        Args:
            latents: [F, C, H, W], normalised, as the transformer outputs them.

        Returns:
            uint8 [N, H', W', 3] on the CPU, N = 4F, or 4F - 3 at the start of the video.
        """

    @abstractmethod
    def offload(self) -> None:
        """Move weights and past to the CPU until `restore`, to leave the GPU to the transformer."""

    @abstractmethod
    def restore(self) -> None:
        """Move weights and past back."""


def check_latents(latents: Tensor, channels: int) -> None:
    """Raise unless these are latents [F, channels, H, W].

    Raises:
        ValueError: they are not.
    """
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"latents must be [F, {channels}, H, W], got {list(latents.shape)}")


def in_bytes(pixels: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] of numbers from 0 to 1 as uint8 [N, H, W, 3] on the CPU."""
    return pixels.permute(0, 2, 3, 1).float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
