"""What the CUDA implementations of the operations share: how tensors and the stream are handed to `longlive_rag._C`.

The extension takes addresses. Every tensor whose address is taken must stay referenced until the launch, so callers
keep it in a variable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longlive_rag import native

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""`DType` of csrc/core/scalar.cuh."""


def available() -> bool:
    """Whether the kernels are compiled in, so that they are what a CUDA tensor gets."""
    return native.kernels() is not None


def call(function: str, device: torch.device, *arguments: object) -> Any:
    """Call a function of the extension with `device` as CUDA's current device."""
    kernels = native.kernels()
    assert kernels is not None
    if device.index == torch.cuda.current_device():
        return getattr(kernels, function)(*arguments)
    with torch.cuda.device(device):
        return getattr(kernels, function)(*arguments)


def stream(device: torch.device) -> int:
    """Address of torch's current stream of the device."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def launch(operation: str, device: torch.device, *arguments: object) -> None:
    """Launch the extension's `operation` on torch's current stream of `device`.

    Raises:
        RuntimeError: CUDA refused the launch; the message names the operation and CUDA's reason.
    """
    call(operation, device, *arguments, stream(device))


_counters: dict[tuple[torch.device, int], Tensor] = {}


def zero_counters(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros for a kernel to count with; it leaves zeros behind. One buffer for each stream."""
    key = (device, stream(device))
    if key not in _counters or len(_counters[key]) < count:
        counters = torch.zeros(max(64, count), dtype=torch.int32, device=device)
        if torch.cuda.is_current_stream_capturing():
            return counters  # set to zero by the graph, whenever that runs: of no use to anybody else
        _counters[key] = counters
    return _counters[key]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def aligned(tensor: Tensor, dimensions: int) -> Tensor:
    """The tensor, copied only if a row does not begin at a multiple of 16 bytes.

    Args:
        tensor: the rows lie along the dimensions after the first `dimensions`.
    """
    size = tensor.element_size()
    steps = (
        stride * size
        for stride, count in zip(tensor.stride()[:dimensions], tensor.shape[:dimensions], strict=True)
        if count > 1
    )
    if tensor.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
