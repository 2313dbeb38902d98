"""Latents to pictures, block by block: the decoder of Wan's causal VAEs, 2.1 and 2.2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longlive_rag.generation.decoder import Decoder, check_latents, in_bytes
from longlive_rag.generation.residual_vae import is_residual, residual_config, residual_name
from longlive_rag.generation.wan_files import WanFiles
from longlive_rag.models.checkpoints import load_strict
from longlive_rag.models.tensor_files import read_tensors


class StreamingDecoder(Decoder):
    """Decodes a video while it is being made, keeping only what its causal convolutions need of the past.

    Args:
        vae: diffusers' `AutoencoderKLWan`.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        parameter = next(vae.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(vae.config.latents_mean, device=self.device).view(shape)
        self._std = torch.tensor(vae.config.latents_std, device=self.device).view(shape)
        self.reset()

    @classmethod
    def from_files(cls, files: WanFiles, *, device: torch.device | str, dtype: torch.dtype) -> StreamingDecoder:
        """Load the VAE of a Wan folder, in Wan's own layout or diffusers'.

        Raises:
            ValueError: the files do not hold a Wan VAE; the message names what is missing or unexpected.
        """
        return cls(load_vae(files, device=device, dtype=dtype))

    @property
    def channels(self) -> int:
        channels: int = self.vae.config.z_dim
        return channels

    @property
    def spatial_factor(self) -> int:
        factor: int = self.vae.config.scale_factor_spatial
        return factor

    @property
    def temporal_factor(self) -> int:
        factor: int = self.vae.config.scale_factor_temporal
        return factor

    @property
    def reach(self) -> int:
        # Two for each causal convolution, those at the finest rate too.
        return 2 * len(self._cache)

    def reset(self) -> None:
        self.vae.clear_cache()
        # Our own reference: if the VAE is used elsewhere, it makes a new list and leaves this one alone.
        self._cache: list[Any] = self.vae._feat_map
        self._first = True

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        check_latents(latents, self.channels)
        z = latents.to(self.device, torch.float32).transpose(0, 1)[None] * self._std + self._mean
        pictures = []
        for frame in z.to(self.dtype).split(1, dim=2):
            pixels = self.vae.decoder(
                self.vae.post_quant_conv(frame), feat_cache=self._cache, feat_idx=[0], first_chunk=self._first
            )
            self._first = False
            if self.vae.config.patch_size is not None:
                pixels = unpatchify(pixels, patch_size=self.vae.config.patch_size)
            pictures.append(in_bytes(pixels[0].transpose(0, 1).float().add(1).div(2)))
        return torch.cat(pictures)

    def offload(self) -> None:
        self._move("cpu")

    def restore(self) -> None:
        self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        self.vae.to(device)
        for index, entry in enumerate(self._cache):
            # Or the string "Rep", if the convolution has not seen a second frame yet.
            if isinstance(entry, Tensor):
                self._cache[index] = entry.to(device)


def load_vae(files: WanFiles, *, device: torch.device | str, dtype: torch.dtype) -> Any:
    """diffusers' `AutoencoderKLWan` from a Wan folder, 2.1 or 2.2's 5B; see `StreamingDecoder.from_files`."""
    from diffusers import AutoencoderKLWan

    path = files.vae
    state = dict(read_tensors(path))
    if path.is_dir():
        config = AutoencoderKLWan.load_config(path, local_files_only=True)
    else:
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        residual = is_residual(state)
        for name in ("encoder.conv1.weight", "conv2.weight", *(["decoder.conv1.weight"] if residual else [])):
            if name not in state:
                raise ValueError(f"{path} holds no Wan VAE: it lacks {name}")
        config = {"base_dim": state["encoder.conv1.weight"].shape[0], "z_dim": state["conv2.weight"].shape[0]}
        if residual:
            config = residual_config(state)
            state = {residual_name(name): tensor for name, tensor in state.items()}
        state = convert_wan_vae_to_diffusers(state)
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config)
    load_strict(vae, {name: tensor.to(device, dtype) for name, tensor in state.items()}, path)
    return vae.eval().requires_grad_(False)
