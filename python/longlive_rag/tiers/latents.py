"""The latents of all frames, from which keys and values that lie nowhere are rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from longlive_rag import ops
from longlive_rag.context import UNUSED, ContextPlan


class CleanPass(Protocol):
    """Runs a model over clean latents, as it did when the block was finished."""

    def __call__(self, video: int, frames: range, latents: Tensor, attention: BlockAttention) -> None:
        """
        Args:
            video: its number in the batch.
            frames: of the block.
            latents: [1, F, C, H, W] on the memory's device.
            attention: in place of the memory.
        """
        ...


class LatentTier:
    """Clean latents by block, pinned if they come from a GPU.

    A rebuilt block sees itself and the sink at their old positions, and no longer what else its context held: exact in
    the first layer, an approximation in the others.

    Args:
        clean_pass: of the model.
        k_pages, v_pages: the page pools; written to.
        rotation: cosine and sine of the spatial pairs (`ops.insert`).
        frequencies: radians per frame of the temporal pairs (`ops.attend`).
    """

    def __init__(
        self,
        clean_pass: CleanPass,
        k_pages: list[Tensor],
        v_pages: list[Tensor],
        rotation: Tensor,
        frequencies: Tensor,
    ) -> None:
        self._clean_pass = clean_pass
        self._k_pages, self._v_pages = k_pages, v_pages
        self._rotation, self._frequencies = rotation, frequencies
        self._latents: dict[int, Tensor] = {}
        self._plans: dict[int, ContextPlan] = {}

    @property
    def bytes(self) -> int:
        """Of all latents."""
        return sum(latents.nbytes for latents in self._latents.values())

    def __contains__(self, frame: int) -> bool:
        return frame in self._plans

    def put(self, plan: ContextPlan, latents: Tensor) -> None:
        """Keep the clean latents [B, F, C, H, W] of a committed block, in place of those of a block made before."""
        for start in [start for start in self._latents if start >= plan.start]:
            del self._latents[start]
        host = torch.empty(latents.shape, dtype=latents.dtype, pin_memory=latents.device.type == "cuda")
        self._latents[plan.start] = host.copy_(latents, non_blocking=True)
        for frame in [frame for frame in self._plans if frame >= plan.start]:
            del self._plans[frame]
        self._plans.update(dict.fromkeys(range(plan.start, plan.end), plan))

    @torch.no_grad()
    def rebuild(self, video: int, slots: Mapping[int, int], resident: Mapping[int, int]) -> None:
        """Fill pages with the keys and values of frames.

        Args:
            slots: by frame.
            resident: slots of the frames on the device, the sink among them.
        """
        for start in sorted({self._plans[frame].start for frame in slots}):
            plan = self._plans[start]
            frames = range(plan.start, plan.end)
            wanted = {frame: slots[frame] for frame in frames if frame in slots}
            sink = {frame: resident[frame] for frame in range(min(start, plan.config.sink_frames))}
            attention = BlockAttention(
                plan, wanted, sink, self._k_pages, self._v_pages, self._rotation, self._frequencies
            )
            latents = self._latents[start][video : video + 1].to(self._rotation.device, non_blocking=True)
            self._clean_pass(video, frames, latents, attention)

    def clear(self) -> None:
        """Forget all latents."""
        self._latents.clear()
        self._plans.clear()


class BlockAttention:
    """Attention of one video's block to itself and to the sink, which leaves its keys and values in their pages.

    Args:
        plan: of the block.
        slots: by frame, where its own pages go; other frames of the block need none.
        sink_slots: by frame, where the sink lies.
    """

    def __init__(
        self,
        plan: ContextPlan,
        slots: Mapping[int, int],
        sink_slots: Mapping[int, int],
        k_pages: list[Tensor],
        v_pages: list[Tensor],
        rotation: Tensor,
        frequencies: Tensor,
    ) -> None:
        self._pools = k_pages, v_pages
        self._rotation, self._frequencies = rotation, frequencies
        device = rotation.device
        seen = [*sink_slots, *range(plan.start, plan.end)]
        position = {frame: at for frame, at in zip(*plan.fixed_entries(), strict=True) if frame != UNUSED}

        def table(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        # The pages that the block sees, of one layer: the sink, then its own.
        self._scratch = [
            torch.empty(len(seen), *pools[0].shape[1:], dtype=pools[0].dtype, device=device) for pools in self._pools
        ]
        self._sink = table(list(sink_slots.values()), torch.int64)
        self._own = table(list(range(len(sink_slots), len(seen))))[None]
        self._all = table(list(range(len(seen))))[None]
        self._positions = table([position[frame] for frame in seen])[None]
        self._query_positions = table(plan.query_positions())[None]
        self._from = table([seen.index(frame) for frame in slots], torch.int64)
        self._to = table(list(slots.values()), torch.int64)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
    ) -> Tensor:
        """The model's `Attention`, of one video."""
        k_pages, v_pages = self._pools[0][layer], self._pools[1][layer]
        k_scratch, v_scratch = self._scratch
        seen = len(self._sink)
        k_scratch[:seen], v_scratch[:seen] = k_pages[self._sink], v_pages[self._sink]
        turned = ops.insert(k, v, k_weight, self._rotation, k_scratch, v_scratch, self._own, eps, q, q_weight)
        assert turned is not None
        k_pages[self._to], v_pages[self._to] = k_scratch[self._from], v_scratch[self._from]
        context = (self._all, self._positions, self._query_positions, self._frequencies)
        return ops.attend(turned, k_scratch, v_scratch, *context)
