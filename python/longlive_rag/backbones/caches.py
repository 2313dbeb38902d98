"""The pipeline's key-value caches: which one belongs to which follower, and freeing what they hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longlive_rag.backbones.follow import Follower, Kind


@dataclass
class _Tracked:
    keys: weakref.ref[Tensor]
    """Keys of the cache's first layer: as long as the tensor lives, so does the cache."""
    follower: Follower[Any]


class Followers:
    """One follower for each cache.

    Conditional and unconditional passes have a cache each, and so a follower each. The follower of a cache that is gone
    takes the next new one, with its memory if that is of the same kind.
    """

    def __init__(self, make_follower: Callable[[], Follower[Any]]) -> None:
        self._make_follower = make_follower
        self._tracked: list[_Tracked] = []

    @property
    def all(self) -> list[Follower[Any]]:
        return [tracked.follower for tracked in self._tracked]

    def follower(self, keys: Tensor, kind: Kind) -> Follower[Any]:
        """The follower of a cache, for a pass of this kind.

        Args:
            keys: the tensor that holds the keys of the cache's first layer.
        """
        tracked = next((tracked for tracked in self._tracked if tracked.keys() is keys), None) or self._adopt(
            keys, kind
        )
        tracked.follower.expect(kind)
        return tracked.follower

    def in_video(self, keys: Tensor) -> bool:
        """Whether blocks of the current video in this cache have gone through memory."""
        return any(tracked.keys() is keys and tracked.follower.block is not None for tracked in self._tracked)

    def _adopt(self, keys: Tensor, kind: Kind) -> _Tracked:
        free = [tracked for tracked in self._tracked if tracked.keys() is None]
        for tracked in free:
            if tracked.follower.kind == kind:
                tracked.follower.reset()
                tracked.keys = weakref.ref(keys)
                return tracked
        for tracked in free:
            tracked.follower.retire()
        if free:
            free[0].keys = weakref.ref(keys)
            return free[0]
        self._tracked.append(_Tracked(weakref.ref(keys), self._make_follower()))
        return self._tracked[-1]


class FreedCaches:
    """Frees keys and values of the pipeline's caches, and gives them their size back.

    A freed tensor is replaced by an empty one, known here by a weak reference: restoring resizes that one in place, so
    that nothing needs to know the dictionary that holds it, or keeps it alive.
    """

    def __init__(self) -> None:
        self.bytes = 0
        """Freed so far."""
        self._placeholders: list[tuple[weakref.ref[Tensor], torch.Size]] = []

    def free(self, cache: dict[str, Any]) -> None:
        """Free the keys and values of one layer, unless they are free already."""
        for name in ("k", "v"):
            tensor = cache[name]
            if not isinstance(tensor, Tensor) or not tensor.numel():
                continue
            with torch.inference_mode(False):  # the placeholder may be resized outside of it
                cache[name] = torch.empty(
                    tensor.shape[0], 0, *tensor.shape[2:], dtype=tensor.dtype, device=tensor.device
                )
            self._placeholders = [entry for entry in self._placeholders if entry[0]() is not None]
            self._placeholders.append((weakref.ref(cache[name]), tensor.shape))
            self.bytes += tensor.nbytes

    def restore(self) -> None:
        """Give every freed tensor that is still in use its size back, filled with zeros."""
        for reference, shape in self._placeholders:
            placeholder = reference()
            if placeholder is not None:
                placeholder.resize_(shape).zero_()
        self._placeholders = []
