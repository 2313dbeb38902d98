"""From a clean latent frame to the vector that memory is searched by."""

from typing import Protocol

from torch import Tensor

from longlive_rag.embedding.autoencoder import LatentAutoencoder
from longlive_rag.embedding.average_pool import AveragePool
from longlive_rag.embedding.layout_pool import LayoutPool

__all__ = ["AveragePool", "Embedding", "LatentAutoencoder", "LayoutPool"]


class Embedding(Protocol):
    """Anything that embeds latent frames."""

    def embed(self, latents: Tensor) -> Tensor:
        """Latents [N, C, H, W] to embeddings [N, D]."""
        ...
