"""An embedding that needs no training and does not mind the light."""

from __future__ import annotations

from torch import Tensor

from longlive_rag.embedding.average_pool import AveragePool

SMALLEST_SPREAD = 1e-6


class LayoutPool:
    """Where in the frame each latent channel is above its own mean, in units of its own spread.

    Average pooling over a grid, and then each channel less its mean over the grid and by its standard deviation. Light
    or weather that changes a channel by a factor and an offset, the same all over the frame, leaves it as it is. A
    frame whose channels do not vary has nothing to compare.

    Args:
        grid: cells per side, at least 2; C * grid ** 2 numbers per frame.

    Source: our own (instance normalisation, Ulyanov et al., arXiv 1607.08022, of a grid); docs/findings.md has what it
    brings.
    """

    def __init__(self, grid: int = 4) -> None:
        if grid < 2:
            raise ValueError(f"grid must be at least 2, got {grid}")
        self.grid = grid

    def embed(self, latents: Tensor) -> Tensor:
        """Latents [N, C, H, W] to [N, C * grid ** 2]."""
        cells = AveragePool(self.grid).embed(latents).unflatten(1, (latents.shape[1], -1))
        cells = cells - cells.mean(dim=2, keepdim=True)
        return (cells / cells.std(dim=2, keepdim=True).clamp_min(SMALLEST_SPREAD)).flatten(1)
