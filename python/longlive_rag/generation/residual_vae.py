"""Wan 2.2's VAE of the 5B model, as published (`Wan2.2_VAE.pth`), in diffusers' names.

diffusers has the model (`AutoencoderKLWan(is_residual=True)`), but converts the file of Wan 2.1's VAE only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Of the latents, by channel: constants of the published VAE, which its weights do not hold.
# fmt: off
LATENTS_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENTS_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on

_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
_STAGE = re.compile(r"(encoder|decoder)\.(?:down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)")


def is_residual(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of such a VAE: its stages are nested."""
    return any(_STAGE.fullmatch(name) for name in state)


def residual_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `AutoencoderKLWan`, from the shapes."""
    channels = state["conv2.weight"].shape[0]
    pixels = state["encoder.conv1.weight"].shape[1]
    return {
        "base_dim": state["encoder.conv1.weight"].shape[0],
        "decoder_base_dim": state["decoder.conv1.weight"].shape[0] // 4,
        "z_dim": channels,
        "is_residual": True,
        "in_channels": pixels,
        "out_channels": pixels,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": list(LATENTS_MEAN[:channels]),
        "latents_std": list(LATENTS_STD[:channels]),
    }


def residual_name(name: str) -> str:
    """A parameter's name in diffusers, if it belongs to one of the stages.

    >>> residual_name("encoder.downsamples.1.downsamples.0.residual.2.weight")
    'encoder.down_blocks.1.resnets.0.conv1.weight'
    >>> residual_name("decoder.upsamples.0.upsamples.3.time_conv.bias")
    'decoder.up_blocks.0.upsampler.time_conv.bias'
    """
    match = _STAGE.fullmatch(name)
    if match is None:
        return name
    half, stage, layer, part = match.groups()
    way = "down" if half == "encoder" else "up"
    if part.startswith(("resample.", "time_conv.")):
        return f"{half}.{way}_blocks.{stage}.{way}sampler.{part}"
    for theirs, ours in {**_RESIDUAL, "shortcut": "conv_shortcut"}.items():
        if part.startswith(f"{theirs}."):
            part = ours + part[len(theirs) :]
            break
    return f"{half}.{way}_blocks.{stage}.resnets.{layer}.{part}"
