"""The small world's backbone: a `CausalWanModel` small enough to ship, its prompts and its settings."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from longlive_rag.embedding import LatentAutoencoder
from longlive_rag.models.causal_wan import Attention, CausalWanModel, Prompt
from longlive_rag.small_world import world
from longlive_rag.small_world.codec import LATENT_CHANNELS, Codec

ASSETS = Path(__file__).parent / "assets"
DENOISING_STEPS = (1000, 750, 500, 250, 60)
TIMESTEP_SHIFT = 5.0
SMALLEST_SIGMA = 1e-3


class SmallBackbone(CausalWanModel):
    """A causal Wan transformer that predicts the clean latent, and the learned prompts of the world.

    The network outputs the clean latent itself, so that noise need not pass through a narrow transformer. `forward`
    turns it into the flow that samplers expect.
    """

    def __init__(self, dim: int = 192, ffn_dim: int = 576, num_heads: int = 3, num_layers: int = 4) -> None:
        super().__init__(
            dim=dim,
            ffn_dim=ffn_dim,
            freq_dim=64,
            text_dim=64,
            text_len=4,
            num_heads=num_heads,
            num_layers=num_layers,
            in_dim=LATENT_CHANNELS,
            out_dim=LATENT_CHANNELS,
        )
        self.prompts = nn.Parameter(torch.randn(world.VIEWS, self.text_len, self.text_dim))

    def predict_clean(self, latents: Tensor, timestep: Tensor, prompt: Prompt, attention: Attention) -> Tensor:
        """The network itself: arguments and shapes of `CausalWanModel.forward`, the clean latents out."""
        return super().forward(latents, timestep, prompt, attention)

    def forward(self, latents: Tensor, timestep: Tensor, prompt: Prompt, attention: Attention) -> Tensor:
        """The flow (noise - clean latent), as `CausalWanModel.forward`."""
        clean = self.predict_clean(latents, timestep, prompt, attention)
        sigma = (timestep.to(latents.dtype) / 1000).clamp(min=SMALLEST_SIGMA)
        return (latents - clean) / sigma.reshape(*sigma.shape, *[1] * (latents.ndim - sigma.ndim))


def load_codec(path: Path = ASSETS / "codec.safetensors") -> Codec:
    """The bundled codec.

    Raises:
        OSError, ValueError: the file is missing, damaged or belongs to another model.
    """
    codec = Codec()
    load_weights(codec, path)
    return codec.eval().requires_grad_(False)


def load_backbone(path: Path = ASSETS / "backbone.safetensors", words: Path | None = None) -> SmallBackbone:
    """The bundled backbone, in float32; raises as `load_codec`.

    Args:
        words: weights that replace some of it: other prompts, and how they are read.
    """
    backbone = SmallBackbone()
    load_weights(backbone, path)
    if words:
        load_weights(backbone, words, part=True)
    return backbone.eval().requires_grad_(False)


def load_encoder() -> LatentAutoencoder:
    """The bundled retrieval encoder, trained on the backbone's own videos; raises as `load_codec`."""
    return LatentAutoencoder.from_checkpoint(ASSETS / "encoder.safetensors").requires_grad_(False)


def load_weights(module: nn.Module, path: Path, part: bool = False) -> None:
    """Fill a module, or part of it, with weights of any precision; raises as `load_codec`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the installation is incomplete")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    own = module.state_dict() if part else {}
    try:
        module.load_state_dict({**own, **state})
    except RuntimeError:
        raise ValueError(f"{path} holds other weights than {type(module).__name__} expects") from None
