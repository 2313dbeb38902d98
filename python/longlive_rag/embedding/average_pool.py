"""The embedding that needs no training."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


class AveragePool:
    """Mean of each latent channel over an even grid of cells; with the default single cell, the paper's baseline.

    Args:
        grid: cells per side. More than one preserves where things are, at C * grid ** 2 numbers per frame.
    """

    def __init__(self, grid: int = 1) -> None:
        if grid < 1:
            raise ValueError(f"grid must be at least 1, got {grid}")
        self.grid = grid

    def embed(self, latents: Tensor) -> Tensor:
        """Latents [N, C, H, W] to [N, C * grid ** 2]."""
        if self.grid == 1:
            return latents.mean(dim=(-2, -1))
        if latents.shape[-2] < self.grid or latents.shape[-1] < self.grid:
            raise ValueError(f"latents must be at least {self.grid} x {self.grid}, the grid, got {list(latents.shape)}")
        return adaptive_avg_pool2d(latents, self.grid).flatten(1)
