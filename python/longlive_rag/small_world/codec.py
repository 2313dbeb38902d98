"""The small world's video codec: one latent frame of 16 x 8 x 8 for each frame of 64 x 64 pixels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

LATENT_CHANNELS, LATENT_SIZE, PATCH = 16, 8, 8
LATENT_SHAPE = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
ENCODER_WIDTH, DECODER_WIDTHS = 192, (96, 48, 32)


class Codec(nn.Module):
    """Convolutional encoder and decoder.

    The encoder sees one 8 x 8 patch for each latent position, so that a sprite changes the latents of its own cell
    only; the decoder overlaps, so that no seams show. Latent channels have mean 0 and variance 1 over the world.
    """

    def __init__(self) -> None:
        super().__init__()
        width = ENCODER_WIDTH
        first, second, third = DECODER_WIDTHS
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, PATCH, PATCH),
            nn.SiLU(),
            nn.Conv2d(width, width, 1),
            nn.SiLU(),
            nn.Conv2d(width, LATENT_CHANNELS, 1),
            nn.BatchNorm2d(LATENT_CHANNELS, affine=False),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, first, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(first, 4 * second, 3, padding=1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(second, 4 * third, 3, padding=1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(third, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Frames [N, 64, 64, 3] uint8 to latents [N, 16, 8, 8] float32."""
        return self.encoder(to_signal(frames))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [N, 16, 8, 8] to frames [N, 64, 64, 3] uint8."""
        signal = self.decoder(latents.float())
        pixels = ((signal + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_signal(frames: np.ndarray) -> Tensor:
    """Frames [N, H, W, 3] uint8 to [N, 3, H, W] float32 in -1 .. 1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
