"""How an operation is registered with `torch.library`, and the checks that all operations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, bfloat16, float16, float32, float64
from torch.library import Library

from longlive_rag import native
from longlive_rag.checking.trust import trusted

LIBRARY = Library("longlive_rag", "DEF")

CUDA_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""What each operation does with tensors of a device that may have kernels."""

FLOATING = (float32, float16, bfloat16, float64)


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register an operation that is the same on every device.

    Args:
        schema: as `torch.library.Library.define` reads it.
        fake: makes outputs of the right shape and dtype, without looking at data.

    Returns:
        The operation, to be called with the schema's arguments by position.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"longlive_rag::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.longlive_rag, name).default


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: Callable[..., Any],
    takes: Callable[..., bool],
    checked_as: str | None = None,
) -> torch._ops.OpOverload:
    """Register an operation: the kernel where it runs and takes the arguments, else the reference.

    Args:
        schema: as for `register`; the first argument is a tensor on the operation's device.
        reference: the operation in PyTorch.
        fake: as for `register`.
        kernel: launches the CUDA kernel; gets the extension before the arguments.
        takes: whether the kernel takes these arguments.
        checked_as: name of `checking.variants` under which the kernel must have been found right on this machine; None:
            `kernel` asks by itself.

    Returns:
        The operation, to be called with the schema's arguments by position.
    """
    name = schema.partition("(")[0]

    def kernel_or_reference(*arguments: Any) -> Any:
        extension = native.kernels_on(arguments[0].device)
        if extension is None or not takes(*arguments):
            return reference(*arguments)
        if checked_as is not None and not trusted(checked_as, arguments[0].device):
            return reference(*arguments)
        return kernel(extension, *arguments)

    operation = register(schema, reference, fake)
    LIBRARY.impl(name, kernel_or_reference, "CUDA")
    CUDA_IMPLEMENTATIONS[name] = kernel_or_reference
    return operation


def check_no_grad(operation: str, **tensors: Tensor | None) -> None:
    """Raise ValueError where a gradient would be lost: the operations are for inference only."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{operation}: {name} requires grad, but there is no backward; call it under torch.no_grad()"
            )


class Check:
    """Checks of one operation's arguments, in microseconds: an operation is called twice per layer and pass.

    Args:
        operation: its name.
        first: name of the argument that tells the device.
    """

    def __init__(self, operation: str, first: str) -> None:
        self.operation, self.first = operation, first

    def __call__(
        self,
        name: str,
        tensor: Tensor,
        device: torch.device | None,
        dtypes: tuple[torch.dtype, ...],
        form: str,
        sizes: tuple[int | None, ...],
    ) -> torch.Size:
        """The shape of `tensor`.

        Args:
            device: None for the first argument.
            form: the sizes in words.
            sizes: None stands for any.

        Raises:
            TypeError: it is no tensor, or of none of the dtypes.
            ValueError: its shape or its device is wrong.
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.operation}: {name} must be a tensor, got {type(tensor).__name__}")
        shape = tensor.shape
        if shape != sizes and not _fits(shape, sizes):
            expected = ", ".join("any" if size is None else str(size) for size in sizes)
            raise ValueError(f"{self.operation}: {name} must be {form} = [{expected}], got {list(shape)}")
        if device is not None and tensor.device != device:
            raise ValueError(
                f"{self.operation}: {name} is on {tensor.device}, but {self.first} is on {device}; expected one device"
            )
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            got = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"{self.operation}: {name} must be {wanted}, got {got}")
        return shape


def _fits(shape: torch.Size, sizes: tuple[int | None, ...]) -> bool:
    if len(shape) != len(sizes):
        return False
    for size, expected in zip(shape, sizes, strict=True):  # noqa: SIM110, a generator would take three times as long
        if expected is not None and size != expected:
            return False
    return True
