"""Everything other than the data that the result of a training depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

    from longlive_rag.embedding import LatentAutoencoder

BadData = Literal["refuse", "skip"]
Precision = Literal["auto", "float32", "float16", "bfloat16"]

SMALL_FRAME = 32
"""Latent frames with a side shorter than this have their own recipe."""


@dataclass(frozen=True)
class CommonSettings:
    """Settings that do not depend on the size of the latents; the defaults are the paper's (arXiv 2606.02553)."""

    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    gradient_clip: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    chunk_frames: int = 8
    """Consecutive latent frames in a chunk (S)."""
    chunks_per_video: int = 1
    """Chunks drawn from each video in an epoch."""
    delta_weight: float = 1.0
    """Weight of the window temporal delta loss; 0 turns it off."""
    delta_window: int = 3
    """Largest distance between the frames it compares, in latent frames (w)."""
    delta_margin: float = 0.85
    """Similarity up to which neighbours are not penalised (m)."""
    validation_fraction: float = 0.1
    """Share of the videos held out for validation."""
    precision: Precision = "auto"
    """Mixed precision; auto is float16 on a GPU, as in the paper, and float32 on a CPU."""
    seed: int = 0
    """Seed of the initial weights, the validation split and the order of chunks."""


@dataclass(frozen=True)
class TrainingConfig(CommonSettings):
    """A complete recipe, by default the paper's; `TrainingOptions` describes the fields.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int = 400
    batch: int = 128
    learning_rate: float = 3e-4
    smooth_weight: float = 1.0
    embedding_dim: int = 1024
    hidden_dims: tuple[int, ...] = (64, 128, 256)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "chunk_frames", "chunks_per_video", "delta_window", "embedding_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "delta_weight", "smooth_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        if not -1 <= self.delta_margin <= 1:
            raise ValueError(f"delta_margin must be a cosine, -1 to 1, got {self.delta_margin}")
        if not self.hidden_dims or min(self.hidden_dims) < 1:
            raise ValueError(f"hidden_dims must be one or more positive numbers, got {self.hidden_dims}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")

    def autoencoder(self, channels: int, height: int, width: int) -> LatentAutoencoder:
        """An untrained autoencoder for latent frames of this size, reproducible by seed."""
        import torch

        from longlive_rag.embedding import LatentAutoencoder

        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return LatentAutoencoder(channels, height, width, self.embedding_dim, self.hidden_dims)

    def autocast_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype of mixed precision; float32 means none."""
        import torch

        if self.precision == "auto":
            return torch.float16 if device.type == "cuda" else torch.float32
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype


PAPER = TrainingConfig()
SMALL = TrainingConfig(
    epochs=100, batch=16, learning_rate=1e-3, smooth_weight=0.02, embedding_dim=128, hidden_dims=(32, 64)
)
"""Two halvings of the resolution, since three would leave the small world a single cell; many small steps, for a CPU;
and a smoothing weight at which the embeddings do not collapse to a point, as they do with the paper's 1
(docs/training.md)."""


@dataclass(frozen=True)
class TrainingOptions(CommonSettings):
    """A recipe as a user gives it: what is left out comes from the paper or, for small latent frames, from `SMALL`."""

    epochs: int | None = None
    """Passes over the videos. Default: 400 as in the paper, or 100 for small latent frames (a side below 32)."""
    batch: int | None = None
    """Chunks per step, over all ranks. Default: 128, or 16 for small frames; never more than one epoch has."""
    learning_rate: float | None = None
    """Constant learning rate of AdamW. Default: 3e-4, or 1e-3 for small frames."""
    smooth_weight: float | None = None
    """Weight of the trajectory smoothing loss; 0 turns it off. Default: 1, or 0.02 for small frames."""
    embedding_dim: int | None = None
    """Width of the embedding. Default: 1024, or 128 for small frames."""
    hidden_dims: tuple[int, ...] | None = None
    """Channels of the encoder's stages, each of which halves the resolution. Default: 64 128 256, or 32 64 for
    small frames."""

    def config(self, height: int, width: int) -> TrainingConfig:
        """The complete recipe for latent frames of this size."""
        recipe = asdict(SMALL if min(height, width) < SMALL_FRAME else PAPER)
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return TrainingConfig(**{**recipe, **{name: value for name, value in given.items() if value is not None}})
