"""How tensors and the stream are handed to `longlive_rag._C`.

The extension takes addresses. Every tensor whose address is taken must stay referenced until the launch, so callers
keep it in a variable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""`DType` of csrc/core/scalar.cuh."""


def queue(device: torch.device) -> tuple[int, int]:
    """Where an operation is to run: number of the device, and address of torch's current stream there."""
    return device.index, torch._C._cuda_getCurrentRawStream(device.index)


def workspace(size: int, like: Tensor) -> Tensor | None:
    """Memory for one call on the device of `like`; None if none is needed."""
    return like.new_empty(size, dtype=torch.uint8) if size else None


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def aligned(tensor: Tensor, dimensions: int = 0) -> Tensor:
    """The tensor, copied only if a row does not begin at a multiple of 16 bytes.

    Args:
        tensor: contiguous but for its first `dimensions`; a row is what lies behind them.
    """
    if tensor.data_ptr() % 16 == 0 and (
        not dimensions or math.gcd(*tensor.stride()[:dimensions]) * tensor.element_size() % 16 == 0
    ):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
