"""What can be shown: a backbone with all that it needs to turn wishes into pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longlive_rag.budget import Budget
from longlive_rag.config import RetrievalConfig
from longlive_rag.embedding import Embedding
from longlive_rag.generation.sampling import Sampling
from longlive_rag.generation.video import Frames
from longlive_rag.models import CausalWanModel
from longlive_rag.selection import Selection

CAMERAS = ("cut", "pan")


@dataclass(frozen=True)
class Wish:
    """What viewers want to see from the next block on."""

    prompt: str
    camera: str = "cut"
    """How a new place is reached, where places have an order: "cut" or "pan"."""


@dataclass(frozen=True)
class Shot:
    """What one block shows."""

    prompt: str
    view: int = 0
    """Where the camera stands, in a scene that has places."""


@dataclass(frozen=True)
class ShownPolicy:
    """A context policy that viewers may choose."""

    label: str
    config: RetrievalConfig
    selection: Selection | None = None
    """Default the most similar frames."""


class Scene(ABC):
    """A backbone and its surroundings.

    Everything random follows from a seed and a number, not from a state: a block that is made again is the same block.
    """

    name: str
    model: CausalWanModel
    embedding: Embedding
    sampling: Sampling
    budget: Budget
    fps: float
    block_frames: int
    latent_shape: tuple[int, int, int]
    """Channels, height and width of a latent frame."""
    policies: Mapping[str, ShownPolicy]
    default_policies: tuple[str, ...]
    default_prompt: str
    places: Sequence[str] = ()
    """Prompts that can be had by pressing a button; with these, no other prompt is understood."""
    enlarge: int = 1
    """Every pixel is shown as a square of so many."""

    @abstractmethod
    def understand(self, prompt: str) -> str:
        """The prompt as this scene will use it.

        Raises:
            ValueError: it means nothing here; the message is for viewers.
        """

    @abstractmethod
    def next_shot(self, wish: Wish, before: Shot | None) -> Shot:
        """What the block after the one that showed `before` shows."""

    @abstractmethod
    def embeds(self, shot: Shot) -> Tensor:
        """Prompt embeddings [1, text_len, text_dim]; the same tensor as long as the prompt is the same."""

    @abstractmethod
    def new_decoder(self) -> BlockDecoder:
        """A decoder for a video from its first frame on."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def noise(self, seed: int, block: int) -> Tensor:
        """Initial noise of a block, [1, F, C, H, W]; the same whatever the policy."""
        return self._normal(seed, 2 * block, (1, self.block_frames, *self.latent_shape))

    def sampling_from(self, seed: int, block: int) -> Sampling:
        """The sampler's settings for a stream that draws its first fresh noise for this block."""
        draws = len(self.sampling.denoising_steps) - 1

        def renoise(index: int, shape: Sequence[int]) -> Tensor:
            return self._normal(seed, 2 * (block * draws + index) + 1, shape)

        steps, shift, context = (
            self.sampling.denoising_steps,
            self.sampling.timestep_shift,
            self.sampling.context_noise,
        )
        return Sampling(steps, shift, context, seed, renoise)

    def _normal(self, seed: int, number: int, shape: Sequence[int]) -> Tensor:
        # On the CPU, so that every machine draws the same; an odd multiplier keeps all pairs below 2**32 apart.
        mixed = (seed * 0x9E3779B97F4A7C15 + number) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)


@dataclass
class BlockDecoder:
    """Turns the latents [F, C, H, W] of one block after the other into uint8 pictures [N, H, W, 3]."""

    decode: Callable[[Tensor], Frames]
    reach: int
    """Latent frames before a block that a decoder must have seen to show it; 0: it needs none."""
    close: Callable[[], None] = lambda: None
