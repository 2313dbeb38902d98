"""The page pools on the device, and how far they may grow."""

from __future__ import annotations

import sys

import torch

from longlive_rag.budget import format_bytes

_UNFORESEEN = 1 / 20
"""Of the device's memory, left free for what no block so far has shown: fragmentation of PyTorch's allocator,
workspaces of libraries, larger kernels of a later step. Unmeasured."""


def unforeseen_bytes(total: int) -> int:
    """What is left free of a device that has `total` bytes, unless there is a budget."""
    return int(_UNFORESEEN * total)


class DevicePool:
    """Per layer two pools ``[slot, head, token, dim]``.

    With a limit they take all of it at once, and never move. Without, they double when they are full: on CUDA as far as
    the device has memory beside what the process was seen to need at once (weights, a block's activations, the
    decoder), on a CPU as far as the system lets them.

    Args:
        slots: to begin with, where there is no limit.
        limit: bytes of all pools.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        tokens: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        slots: int,
        limit: int | None,
    ) -> None:
        self.generation = 0
        """How often the pools have moved to other addresses."""
        self._device = device
        self.slot_bytes = 2 * layers * heads * tokens * head_dim * dtype.itemsize
        self._limit = limit
        self._most = None if limit is None else limit // self.slot_bytes
        """Slots at most, once that is known."""
        slots = slots if self._most is None else self._most
        shape = (slots, heads, tokens, head_dim)
        try:
            self.k_pages, self.v_pages = (
                [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)] for _ in range(2)
            )
        except torch.OutOfMemoryError as error:
            what = "the number of videos or the size of the picture"
            raise torch.OutOfMemoryError(
                f"the device has no room for {format_bytes(slots * self.slot_bytes)} of keys and values, "
                f"{format_bytes(self.slot_bytes)} for each latent frame; lower "
                f"{'context_frames' if limit is None else 'budget.device (--device-memory)'}, {what} ({error})"
            ) from error
        _expect_growth([*self.k_pages, *self.v_pages])
        self.slots = slots
        """That every layer has."""
        self.free = list(reversed(range(slots)))

    @property
    def bytes(self) -> int:
        """Allocated."""
        return sum(pool.nbytes for pools in (self.k_pages, self.v_pages) for pool in pools)

    @property
    def limit(self) -> int | None:
        """Bytes of all pools at most; None: not measured yet, or the system decides."""
        return self._most * self.slot_bytes if self._limit is None and self._most is not None else self._limit

    def grow(self, least: int) -> bool:
        """Make `least` more slots, or as many again as there are; False if there is no room for a single one."""
        most = self._measured() if self._most is None else self._most
        before, slots = self.slots, max(2 * self.slots, self.slots + least)
        if most is not None and slots >= most:
            slots = self._most = max(most, before)  # for good: a little more each time would move the pages each time
        if slots <= before:
            return False
        self.generation += 1
        try:
            for layer, pools in enumerate(zip(self.k_pages, self.v_pages, strict=True)):
                larger = [pool.new_empty(slots, *pool.shape[1:]) for pool in pools]
                for new, old in zip(larger, pools, strict=True):
                    new[:before] = old[:before]
                self.k_pages[layer], self.v_pages[layer] = larger
                _expect_growth(larger)
        except torch.OutOfMemoryError:
            self._most = before
            for pools_of in (self.k_pages, self.v_pages):  # some have grown; all have slots of the same number
                pools_of[:] = [pool[:before] for pool in pools_of]
            return False
        self.slots = slots
        self.free[:0] = reversed(range(before, slots))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the old pools fit no later request
        return True

    def close(self) -> None:
        """Free the pools."""
        self.generation += 1
        self.k_pages.clear()
        self.v_pages.clear()
        self.free.clear()
        self.slots = 0

    def _measured(self) -> int | None:
        """Slots that the device has memory for; None: on a CPU the system decides."""
        if self._device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        held, peak = torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        unused = torch.cuda.memory_reserved(self._device) - held
        room = free + unused - (peak - held) - unforeseen_bytes(total)
        return self.slots + max(0, room) // self.slot_bytes


def _expect_growth(pools: list[torch.Tensor]) -> None:
    """Have a compiled model take other numbers of slots without being compiled again."""
    if "torch._dynamo" in sys.modules:  # its import takes a second; what nobody compiles need not wait for it
        for pool in pools:
            torch._dynamo.maybe_mark_dynamic(pool, 0)
