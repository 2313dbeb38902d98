"""What a family of causal video models declares, and what attaching memory to one needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

from torch import nn

from longlive_rag.backbones.caches import Followers, FreedCaches
from longlive_rag.backbones.forwards import Forwards
from longlive_rag.backbones.own_context import OwnContext, Said
from longlive_rag.config import RetrievalConfig


@dataclass(frozen=True)
class CausalTransformer:
    """A causal video transformer that was found in a model."""

    module: nn.Module
    attentions: tuple[Any, ...]
    """Cached self-attention of each layer."""
    family: Family


@dataclass(frozen=True)
class Attachment:
    """What connects a transformer to its memories."""

    config: RetrievalConfig
    followers: Followers
    forwards: Forwards
    """Takes the replaced forwards back."""
    freed_caches: FreedCaches | None
    """Where to free the pipeline's caches; None: they stay allocated."""
    one_call: AbstractContextManager[Any] = field(default_factory=RLock)
    """Held while the transformer is called: its layers learn from what they share which call they are in."""


class Family(ABC):
    """How models of a family are found, and how memory attaches to them."""

    name: str
    looked_for: str
    """How its cached self-attention looks, for the error when none is found."""
    drafts = True
    """Whether the first pass over a block is its first denoising step, whose result can ask for memory."""
    unstated = RetrievalConfig()
    """The default config for a model that does not say what its own window is."""
    reads_cache = False
    """Whether something still reads the pipeline's own cache, or its size; then it cannot be freed."""

    @abstractmethod
    def is_attention(self, module: nn.Module) -> bool:
        """Whether a module is cached self-attention such as this family's, or a relative's."""

    @abstractmethod
    def arguments(self, attention: Any) -> frozenset[str]:
        """Names that the attention takes."""

    @property
    @abstractmethod
    def known_arguments(self) -> frozenset[str]:
        """Names that the attention of this family may take."""

    @abstractmethod
    def fits(self, attention: Any) -> bool:
        """Whether the attention is this family's own."""

    @abstractmethod
    def check(self, transformer: CausalTransformer) -> None:
        """Raise `ValueError` or `TypeError` if memory would compute something else than the transformer."""

    def longest_pass(self, model: Any, transformer: CausalTransformer) -> int | None:
        """Latent frames of the longest pass that `model` will make, as far as it says; None: it does not say."""
        return None

    def own_context(self, model: Any, transformer: CausalTransformer) -> OwnContext | None:
        """What the transformer attends to by itself, as far as `model`, its pipeline or wrapper, and it say."""
        return None

    def switch_frames(self, config: RetrievalConfig, own: OwnContext | None) -> int | None:
        """Latent frames that a prompt switch writes and sees in one pass; None: it makes no such pass."""
        return None

    @abstractmethod
    def heads(self, attention: Any) -> tuple[int, int]:
        """Number of heads and their width."""

    def new_state(self, said: Said) -> Any:
        """What the family remembers of a video, when one begins.

        Args:
            said: what the model and its pipeline say of themselves, now and later.
        """
        return None

    @abstractmethod
    def attach(self, transformer: CausalTransformer, attachment: Attachment) -> None:
        """Replace the transformer's forwards by ones that use memory."""
