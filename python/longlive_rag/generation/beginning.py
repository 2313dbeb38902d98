"""A video that begins with a picture, or goes on from another video: their pictures, and the VAE's latents of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from longlive_rag.generation.settings import VideoSettings
from longlive_rag.generation.video import Frames, VideoReader

_PICTURES = 4
"""Pictures of a latent frame of Wan's VAEs after the first, which is of one."""


@dataclass(frozen=True)
class Beginning:
    """What a video begins with, as whole blocks or a single latent frame.

    Attributes:
        identity: what tells it from others: a digest of the file.
        latent_frames: of the beginning.
        pictures: reads ``4 * latent_frames - 3`` pictures, uint8 [H, W, 3], in the size of the video.
    """

    identity: str
    latent_frames: int
    pictures: Callable[[], Iterator[Frames]]


def from_image(path: Path, settings: VideoSettings, *, one_frame: bool = False) -> Beginning:
    """A picture that is held for the first block, cut to the video's proportions.

    Args:
        one_frame: it is the first latent frame alone, around which the rest of the block is made.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no picture, or there is nothing but one block to make.
    """
    identity = f"image sha256:{_digest(path)}"
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"image must be a picture, got {path}: {error}") from error
    fitted = _fitted(picture, settings)
    frames = 1 if one_frame else settings.policy.block_frames
    _check_length("image", frames, settings)
    return Beginning(identity, frames, lambda: (fitted for _ in range(_pictures(frames))))


def from_video(path: Path, settings: VideoSettings) -> Beginning:
    """The whole blocks at the end of a video, cut to the new video's proportions.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no video, of another frame rate, shorter than a block, or no shorter than what is to be made.
    """
    identity = f"video sha256:{_digest(path)}"
    with VideoReader(path) as reader:
        if abs(reader.fps - settings.fps) > 0.01:
            raise ValueError(
                f"video must have fps = {settings.fps:g} pictures a second like the new one, got {reader.fps:g}"
            )
        count = sum(1 for _ in reader)
    block = settings.policy.block_frames
    frames = ((count - 1) // _PICTURES + 1) // block * block
    if not frames:
        raise ValueError(
            f"video must be at least {_pictures(block)} pictures long, a block of {block} latent frames, got {count}"
        )
    _check_length("video", frames, settings)

    def pictures() -> Iterator[Frames]:
        with VideoReader(path) as reader:
            # The end is what the new video goes on from.
            for frame in islice(reader, count - _pictures(frames), None):
                yield _fitted(Image.fromarray(frame), settings)

    return Beginning(identity, frames, pictures)


@torch.no_grad()
def encode(vae: Any, pictures: Iterable[Frames]) -> Tensor:
    """Latents of pictures, a few at a time, with what the VAE's causal convolutions need of those before.

    Args:
        vae: diffusers' `AutoencoderKLWan`.
        pictures: uint8 [H, W, 3], 4 n - 3 of them.

    Returns:
        [n, C, H / 8, W / 8], or / 16 for Wan 2.2's 5B, float32 on the CPU, normalised as the transformer's.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    weight = next(vae.parameters())
    vae.clear_cache()
    cache = vae._enc_feat_map
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    latents: list[Tensor] = []
    left = iter(pictures)
    while group := list(islice(left, _PICTURES if latents else 1)):
        x = torch.from_numpy(np.stack(group)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        if vae.config.patch_size is not None:
            x = patchify(x, patch_size=vae.config.patch_size)
        moments = vae.quant_conv(vae.encoder(x.to(weight), feat_cache=cache, feat_idx=[0]))
        # The mean of the distribution: nothing is drawn.
        latents.append((moments[0, : vae.config.z_dim].transpose(0, 1).float().cpu() - mean) / std)
    vae.clear_cache()
    return torch.cat(latents)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _fitted(picture: Image.Image, settings: VideoSettings) -> Frames:
    return np.asarray(
        ImageOps.fit(picture, (settings.width, settings.height), Image.Resampling.LANCZOS), dtype=np.uint8
    )


def _pictures(latent_frames: int) -> int:
    return _PICTURES * latent_frames - _PICTURES + 1


def _check_length(name: str, frames: int, settings: VideoSettings) -> None:
    whole = settings.latent_frames(_PICTURES)
    if frames >= whole:
        raise ValueError(
            f"seconds must be longer than the {name} that the video begins with ({frames} latent frames), got "
            f"{settings.seconds:g} ({whole})"
        )
