"""Light and weather of the small world: a day that goes round, through which the same place is seen differently.

Between a place and the eye is air, which has a colour of its own: golden in the evening, nearly black at night, grey in
the rain. What is seen is a mixture, `clear` of the place and the rest of the air. At midnight `clear` is a sixth: every
place looks like night, and hardly like itself.

The mixture holds for pixels and, as the definition of the light, for latents too: seen = clear * latent + (1 - clear) *
latent of the air. It can be undone, which is how a backbone that was trained in daylight works at all hours
(`LitBackbone`), with no training and no loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longlive_rag.models.causal_wan import Attention, Prompt
from longlive_rag.small_world import world
from longlive_rag.small_world.backbone import SmallBackbone, load_codec

Colour = tuple[int, int, int]


class Hour(NamedTuple):
    """The air at one moment of the day."""

    name: str
    clear: float
    """Share of what is seen that comes from the place itself."""
    sky: Colour
    """Colour of the air above the horizon, 0 to 255; below, it shades off into `ground`."""
    ground: Colour
    lamp: tuple[int, int, Colour] | None = None
    """Where the sun or the moon shines through the air (column, row), and its colour."""


DAY = (
    Hour("noon", 1.0, (255, 255, 255), (255, 255, 255)),
    Hour("afternoon", 0.85, (255, 236, 190), (255, 214, 150), (50, 16, (255, 244, 200))),
    Hour("evening", 0.6, (250, 170, 90), (190, 90, 60), (57, 28, (255, 220, 140))),
    Hour("sunset", 0.4, (170, 60, 90), (80, 34, 60), (60, 36, (255, 120, 80))),
    Hour("dusk", 0.25, (56, 40, 100), (26, 20, 54)),
    Hour("night", 0.18, (18, 22, 60), (8, 10, 30), (12, 20, (120, 130, 170))),
    Hour("midnight", 0.16, (10, 12, 42), (4, 6, 22), (32, 10, (130, 140, 180))),
    Hour("small hours", 0.18, (14, 24, 52), (6, 14, 28), (50, 20, (110, 120, 160))),
    Hour("rain", 0.25, (92, 104, 120), (60, 72, 84)),
    Hour("fog", 0.3, (206, 202, 214), (230, 228, 234)),
    Hour("sunrise", 0.5, (255, 180, 170), (200, 130, 140), (6, 34, (255, 226, 160))),
    Hour("morning", 0.8, (214, 236, 255), (236, 244, 255), (14, 18, (255, 250, 220))),
)
CYCLE = 25  # frames of a day, five visits of `cuts`; from one entry of DAY to the next, the air changes evenly
HORIZON = 38  # row of pixels


def clear() -> np.ndarray:
    """`Hour.clear` of every frame of the cycle, [CYCLE]."""
    return _between(np.array([hour.clear for hour in DAY]))


@cache
def air() -> np.ndarray:
    """The air alone in every frame of the cycle, [CYCLE, SIZE, SIZE, 3] float, 0 .. 255."""
    return _between(np.stack([_paint(hour) for hour in DAY]))


def shine(frames: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Daylight frames [N, SIZE, SIZE, 3] uint8 as they look in frames [N] of the walk, counted from noon."""
    share = clear()[moments % CYCLE][:, None, None, None]
    return np.round(share * frames + (1 - share) * air()[moments % CYCLE]).astype(np.uint8)


def _between(hours: np.ndarray) -> np.ndarray:
    """Values of DAY [hours, ...] to values of each frame of the cycle."""
    time = np.arange(CYCLE) * len(DAY) / CYCLE
    now = time.astype(int)
    part = (time - now).reshape(-1, *[1] * (hours.ndim - 1))
    return hours[now] * (1 - part) + hours[(now + 1) % len(DAY)] * part


def _paint(hour: Hour) -> np.ndarray:
    fine = 4
    grid = (np.arange(world.SIZE * fine) + 0.5) / fine
    x, y = np.meshgrid(grid, grid)
    sky, ground = np.array(hour.sky, float), np.array(hour.ground, float)
    picture = sky + (ground - sky) * world.smooth((y - HORIZON + 12) / 36)[..., None]
    if hour.lamp:
        column, row, colour = hour.lamp
        world.glow(picture, x, y, (column, row), 4.5, colour)
    return picture.reshape(world.SIZE, fine, world.SIZE, fine, 3).mean(axis=(1, 3))


@dataclass(frozen=True)
class Lights:
    """The light in latents.

    clear: [CYCLE].  veil: [CYCLE, 16, 8, 8], what the air adds.
    """

    clear: Tensor
    veil: Tensor

    def cast(self, latents: Tensor, first: int = 0) -> Tensor:
        """Daylight latents [..., F, 16, 8, 8] of frames `first` .. as they are seen."""
        share, veil = self._of(latents, first)
        return share * latents + veil

    def lift(self, latents: Tensor, first: int = 0) -> Tensor:
        """The inverse of `cast`."""
        share, veil = self._of(latents, first)
        return (latents - veil) / share

    def _of(self, latents: Tensor, first: int) -> tuple[Tensor, Tensor]:
        moments = torch.arange(first, first + latents.shape[-4]) % CYCLE
        return self.clear[moments][:, None, None, None], self.veil[moments]


@cache
def lights() -> Lights:
    """Of the bundled codec."""
    share = torch.from_numpy(clear()).float()
    latents = load_codec().encode(air().round().astype(np.uint8))
    return Lights(share, (1 - share)[:, None, None, None] * latents)


class LitBackbone(SmallBackbone):
    """The small backbone at all hours, by a change of variables.

    Its prompts have one word more, which names the moment of the day. With that, a latent of clear * x + veil under
    noise of level s is x under noise of level s / (clear * (1 - s) + s), which the daylight backbone knows; its answer
    is seen through the light again. Darkness thus costs what it should: less signal in the same noise. Keys and values
    in memory are those of the latents in daylight.
    """

    def prepare_prompt(self, prompt_embeds: Tensor) -> Prompt:
        """As `CausalWanModel.prepare_prompt`, of prompts [B, 4 + 1, text_dim] with `moment` last; behind the layers'
        keys and values come the light's share [B] and veil [B, 16, 8, 8]."""
        light = lights()
        moment = prompt_embeds[:, -1, :CYCLE]
        share, veil = moment @ light.clear, torch.einsum("bm,mchw->bchw", moment, light.veil)
        return [*super().prepare_prompt(prompt_embeds[:, :-1]), (share, veil)]

    def predict_clean(self, latents: Tensor, timestep: Tensor, prompt: Prompt, attention: Attention) -> Tensor:
        *words, (share, veil) = prompt
        share, veil = share.view(-1, 1, 1, 1, 1), veil[:, None]
        if timestep.ndim == 1:
            timestep = timestep[:, None].expand(-1, latents.shape[1])
        noise = (timestep.to(latents.dtype) / 1000)[..., None, None, None]
        scale = share * (1 - noise) + noise
        plain = (latents - (1 - noise) * veil) / scale
        level = 1000 * (noise / scale)[..., 0, 0, 0]
        return share * super().predict_clean(plain, level, words, attention) + veil


def moment(frame: int, words: int) -> Tensor:
    """The word [1, words] that names the moment of a frame."""
    word = torch.zeros(1, words)
    word[0, frame % CYCLE] = 1
    return word
