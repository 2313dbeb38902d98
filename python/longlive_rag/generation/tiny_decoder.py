"""Latents to pictures by a tiny decoder: taehv's `taew2_1` and `taew2_2`, made for the latents of Wan's VAEs.

It was trained by its author (github.com/madebyollin/taehv, MIT licence) to imitate the decoder of the VAE. Where that
has 3-D convolutions at full width, this one has 2-D ones, each of whose blocks sees the picture before, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from longlive_rag.generation.decoder import Decoder, check_latents, in_bytes
from longlive_rag.models.checkpoints import load_strict
from longlive_rag.models.tensor_files import read_tensors

_WIDTHS = (256, 128, 64, 64)
_GROWTH = (1, 2, 2)
"""Pictures for one at each rise of the resolution."""
_FIRST, _LAST = "1.weight", "22.weight"
"""The outer convolutions, whose sizes tell how many latent channels and pixels per patch there are."""


class _SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class _PastBlock(nn.Module):
    """A residual block that sees each picture beside the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _convolution(2 * width, width), nn.ReLU(), _convolution(width, width), nn.ReLU(), _convolution(width, width)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x [T, C, H, W], and the picture before its first, [1, C, H, W]."""
        past = torch.cat([before, x[:-1]])
        return torch.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class _Grow(nn.Module):
    """Several pictures for one: [T, C, H, W] to [T * times, C, H, W]."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * times, 1, bias=False)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.times, -1)).flatten(0, 1)


def tiny_layers(channels: int, patch: int) -> nn.Sequential:
    """The decoder's layers, under the names of the published weights.

    Args:
        channels: latent channels, 16 for Wan 2.1 and 48 for Wan 2.2's 5B.
        patch: pixels along a side that each output pixel stands for, 1 or 2.
    """
    layers: list[nn.Module] = [_SoftClamp(), _convolution(channels, _WIDTHS[0]), nn.ReLU()]
    for width, next_width, times in zip(_WIDTHS, _WIDTHS[1:], _GROWTH, strict=False):
        layers += [_PastBlock(width) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), _Grow(width, times), _convolution(width, next_width, bias=False)]
    layers += [nn.ReLU(), _convolution(_WIDTHS[-1], 3 * patch**2)]
    return nn.Sequential(*layers)


class TinyDecoder(Decoder):
    """A `Decoder` that does a twenty-fifth of the VAE's work (`bench decode`).

    Args:
        layers: as `tiny_layers` makes them.
    """

    temporal_factor = 4
    # Each block of the past sees one picture back: three latent frames, three halves and three quarters of one.
    reach = 6

    def __init__(self, layers: nn.Sequential) -> None:
        self.layers = layers.eval().requires_grad_(False)
        first, last = (cast(nn.Conv2d, layers.get_submodule(name.partition(".")[0])) for name in (_FIRST, _LAST))
        self.device, self.dtype = first.weight.device, first.weight.dtype
        self._channels, self._patch = first.in_channels, round((last.out_channels / 3) ** 0.5)
        self.reset()

    @classmethod
    def from_file(cls, path: Path, *, device: torch.device | str, dtype: torch.dtype) -> TinyDecoder:
        """Load the author's file; its encoder is left out.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is no such decoder; the message names what is missing, unexpected or of another size.
        """
        tensors = dict(read_tensors(path))
        state = {
            name.removeprefix("decoder."): tensor for name, tensor in tensors.items() if name.startswith("decoder.")
        }
        for name in (_FIRST, _LAST):
            if name not in state or state[name].ndim != 4:
                raise ValueError(f"{path} holds no tiny decoder for Wan: it lacks decoder.{name}")
        layers = tiny_layers(state[_FIRST].shape[1], round((state[_LAST].shape[0] / 3) ** 0.5))
        for name, layer in layers.named_modules():
            weight = state.get(f"{name}.conv.weight")
            if isinstance(layer, _Grow) and weight is not None:
                # Where more pictures were trained than are made, the last of them count.
                state[f"{name}.conv.weight"] = weight[-layer.conv.out_channels :]
        load_strict(layers, {name: tensor.to(device, dtype) for name, tensor in state.items()}, path)
        return cls(layers)

    @property
    def channels(self) -> int:
        return self._channels

    @property
    def spatial_factor(self) -> int:
        return 8 * self._patch

    def reset(self) -> None:
        self._past: dict[int, Tensor] = {}
        self._first = True

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        check_latents(latents, self.channels)
        pictures = []
        # One latent frame at a time, so that memory does not grow with the block.
        for frame in latents.to(self.device, self.dtype).split(1):
            x = frame
            for index, layer in enumerate(self.layers):
                if isinstance(layer, _PastBlock):
                    before = self._past.get(index)
                    self._past[index] = x[-1:]
                    x = layer(x, torch.zeros_like(x[:1]) if before is None else before)
                else:
                    x = layer(x)
            if self._patch > 1:
                x = nn.functional.pixel_shuffle(x, self._patch)
            pictures.append(in_bytes(x[self.temporal_factor - 1 :] if self._first else x))
            self._first = False
        return torch.cat(pictures)

    def offload(self) -> None:
        self._move("cpu")

    def restore(self) -> None:
        self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        self.layers.to(device)
        self._past = {index: tensor.to(device) for index, tensor in self._past.items()}


def _convolution(before: int, after: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, **options)
