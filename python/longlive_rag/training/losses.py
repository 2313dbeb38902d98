"""The training objective of the retrieval autoencoder (LongLive-RAG, arXiv 2606.02553)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_SQUARE = 1e-8
"""Added under the root of the smoothing loss, whose gradient would be infinite on a straight line."""


class Losses(NamedTuple):
    """The terms of the objective, unweighted scalars."""

    reconstruction: Tensor
    delta: Tensor
    smooth: Tensor

    def total(self, delta_weight: float, smooth_weight: float) -> Tensor:
        """reconstruction + delta_weight * delta + smooth_weight * smooth."""
        return self.reconstruction + delta_weight * self.delta + smooth_weight * self.smooth


def reconstruction_loss(recon: Tensor, latents: Tensor) -> Tensor:
    """Mean of (recon - x)^2 over all elements. Tensors of the same shape; computed in float32 or wider."""
    return F.mse_loss(_wide(recon), _wide(latents))


def temporal_delta_loss(embeddings: Tensor, window: int = 3, margin: float = 0.85) -> Tensor:
    """Window Temporal Delta Loss: 1/w sum over k = 1..w of mean_t max(0, cos(e_t, e_{t-k}) - margin).

    Pushes temporal neighbours apart, but only if they are more similar than `margin`. Every offset has the same weight,
    however many pairs it has.

    Args:
        embeddings: [B, S, D], consecutive frames, not normalised.
        window: largest offset w; offsets of S or more have no pairs and are left out.
        margin: similarity up to which neighbours are not penalised.
    """
    embeddings = _wide(embeddings)
    offsets = range(1, min(window, embeddings.shape[1] - 1) + 1)
    hinges = [
        F.relu(F.cosine_similarity(embeddings[:, k:], embeddings[:, :-k], dim=-1) - margin).mean() for k in offsets
    ]
    return torch.stack(hinges).mean() if hinges else embeddings.new_zeros(())


def smoothing_loss(embeddings: Tensor) -> Tensor:
    """Trajectory smoothing: mean_t sqrt(|e_{t+1} - 2 e_t + e_{t-1}|^2 + 1e-8), the magnitude of the acceleration.

    It is computed before normalisation, so shorter embeddings count as smoother.

    Args:
        embeddings: [B, S, D], consecutive frames; with S < 3 there is no acceleration and the loss is 0.
    """
    if embeddings.shape[1] < 3:
        return _wide(embeddings).new_zeros(())
    acceleration = _wide(embeddings).diff(n=2, dim=1)
    return (acceleration.square().sum(dim=-1) + SMALLEST_SQUARE).sqrt().mean()


def autoencoder_losses(
    recon: Tensor, embeddings: Tensor, chunks: Tensor, window: int = 3, margin: float = 0.85
) -> Losses:
    """All terms for chunks [B, S, C, H, W], their reconstruction [B * S, C, H, W] and embeddings [B * S, D]."""
    sequences = embeddings.unflatten(0, chunks.shape[:2])
    return Losses(
        reconstruction_loss(recon, chunks.flatten(0, 1)),
        temporal_delta_loss(sequences, window, margin),
        smoothing_loss(sequences),
    )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
