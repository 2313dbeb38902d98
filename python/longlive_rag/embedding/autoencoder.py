"""The retrieval autoencoder: the paper's only trained part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longlive_rag.files import atomic_path, load_checkpoint

# Names of the sizes in the released checkpoint's config -> our arguments.
_SIZES = {
    "in_channels": "in_channels",
    "spatial_h": "height",
    "spatial_w": "width",
    "latent_dim": "embedding_dim",
    "hidden_dims": "hidden_dims",
}


class LatentAutoencoder(nn.Module):
    """Convolutional autoencoder from a latent frame to one vector and back; retrieval uses the encoder only.

    The encoder halves the resolution with each of `hidden_dims`, averages over space and projects; the decoder, which
    only training needs, expands the vector again. Parameter names are those of the released checkpoint.

    Args:
        in_channels, height, width: of a latent frame. The encoder accepts any size; the decoder makes this one.
        embedding_dim: width of the embedding.
        hidden_dims: channels of the encoder's stages.

    Source: LongLive-RAG (arXiv 2606.02553), retrieval autoencoder; sizes of the released checkpoint.
    """

    def __init__(
        self,
        in_channels: int = 16,
        height: int = 60,
        width: int = 104,
        embedding_dim: int = 1024,
        hidden_dims: Sequence[int] = (64, 128, 256),
    ) -> None:
        super().__init__()
        if not hidden_dims:
            raise ValueError("hidden_dims must name at least one stage, got none")
        self.in_channels, self.height, self.width = in_channels, height, width
        self.embedding_dim, self.hidden_dims = embedding_dim, tuple(hidden_dims)
        self.encoder = Encoder(in_channels, self.hidden_dims, embedding_dim)
        self.decoder = Decoder(embedding_dim, self.hidden_dims, in_channels, height, width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Residual):
                module.start_as_identity()

    def embed(self, latents: Tensor) -> Tensor:
        """Latents [N, C, H, W] to L2-normalised embeddings [N, embedding_dim]; no gradient."""
        if latents.ndim != 4 or latents.shape[1] != self.in_channels:
            raise ValueError(f"latents must be [N, {self.in_channels}, H, W], got {list(latents.shape)}")
        with torch.no_grad():
            return F.normalize(self.encoder(latents.to(self.encoder.fc.weight.dtype)), dim=-1)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [N, C, H, W] to their reconstruction, of the same shape, and their embeddings, not normalised."""
        embedding = self.encoder(latents)
        return self.decoder(embedding), embedding

    @property
    def config(self) -> dict[str, Any]:
        """The sizes, under their names in the released checkpoint."""
        sizes = {name: getattr(self, argument) for name, argument in _SIZES.items()}
        return {**sizes, "hidden_dims": list(self.hidden_dims)}

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> LatentAutoencoder:
        """Load the released format, ``{"model", "config"}`` in a `.pt` file, or our safetensors.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or does not hold a retrieval autoencoder.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no autoencoder checkpoint at {path}")
        state, config = _read_safetensors(path) if path.suffix == ".safetensors" else _read_released(path)
        missing = [name for name in _SIZES if name not in config]
        if missing:
            raise ValueError(
                f"{path}: the autoencoder's config lacks {', '.join(missing)}; it has {', '.join(map(str, config))}"
            )
        model = cls(**{argument: config[name] for name, argument in _SIZES.items()})
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        return model.eval()

    def save(self, path: str | Path) -> None:
        """Write the released format (`.pt`) or safetensors, depending on the file's suffix, atomically."""
        path = Path(path)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_path(path) as temporary:
            if path.suffix == ".safetensors":
                save_file(state, temporary, metadata={"config": json.dumps(self.config)})
            else:
                torch.save({"model": state, "config": self.config}, temporary)


class Residual(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            _group_norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            _group_norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def start_as_identity(self) -> None:
        """Zero the last convolution."""
        for parameter in self.block[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Encoder(nn.Module):
    """Latents [N, C, H, W] to vectors [N, embedding_dim]."""

    def __init__(self, in_channels: int, hidden_dims: Sequence[int], embedding_dim: int) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for before, after in zip((in_channels, *hidden_dims), hidden_dims, strict=False):
            stages += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                _group_norm(after),
                nn.SiLU(),
                Residual(after),
            ]
        self.conv_stack = nn.Sequential(*stages)
        self.final_norm = nn.Sequential(_group_norm(hidden_dims[-1]), nn.SiLU())
        self.fc = nn.Linear(hidden_dims[-1], embedding_dim)

    def forward(self, latents: Tensor) -> Tensor:
        return self.fc(self.final_norm(self.conv_stack(latents)).mean(dim=(-2, -1)))


class Decoder(nn.Module):
    """Vectors [N, embedding_dim] to latents [N, C, height, width]."""

    def __init__(self, embedding_dim: int, hidden_dims: Sequence[int], channels: int, height: int, width: int) -> None:
        super().__init__()
        reduction = 2 ** len(hidden_dims)
        self.size = (height, width)
        self.coarse = (hidden_dims[-1], -(-height // reduction), -(-width // reduction))
        self.fc = nn.Sequential(nn.Linear(embedding_dim, self.coarse[0] * self.coarse[1] * self.coarse[2]), nn.SiLU())
        stages: list[nn.Module] = []
        for before, after in zip(hidden_dims[::-1], hidden_dims[-2::-1], strict=False):
            stages += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(before, after, 3, padding=1),
                _group_norm(after),
                nn.SiLU(),
                Residual(after),
            ]
        self.upsample_stack = nn.Sequential(*stages)
        self.final = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(hidden_dims[0], channels, 3, padding=1))

    def forward(self, embedding: Tensor) -> Tensor:
        x = self.final(self.upsample_stack(self.fc(embedding).unflatten(1, self.coarse)))
        return x[..., : self.size[0], : self.size[1]]


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(groups for groups in (32, 16, 8, 4, 1) if channels % groups == 0), channels)


def _read_released(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    content = load_checkpoint(path)
    if not isinstance(content, dict) or not {"model", "config"} <= content.keys():
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path} must hold a dict with "model" and "config", got {found}')
    return content["model"], content["config"]


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, config
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
