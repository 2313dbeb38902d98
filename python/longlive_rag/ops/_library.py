"""The `torch.library` namespace of the package, and the checks that all operations share."""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32, float64, is_grad_enabled
from torch.library import Library

LIBRARY = Library("longlive_rag", "DEF")

FLOATING = (float32, float16, bfloat16, float64)


def check_tensors(operation: str, **tensors: Tensor | None) -> None:
    """Raise unless all are tensors of one device and none would need a gradient.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: devices differ, or a gradient would be lost: the operations are for inference only.
    """
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operation}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.requires_grad and is_grad_enabled():
            raise ValueError(
                f"{operation}: {name} requires grad, but there is no backward; call it under torch.no_grad()"
            )
        if device is None:
            device, first = tensor.device, name
        elif tensor.device != device:
            raise ValueError(
                f"{operation}: {name} is on {tensor.device}, but {first} is on {device}; expected one device"
            )


def check_dtype(operation: str, name: str, tensor: Tensor, *expected: object) -> None:
    """Raise TypeError unless `tensor` has one of the expected dtypes."""
    if tensor.dtype not in expected:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        raise TypeError(f"{operation}: {name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_shape(operation: str, name: str, tensor: Tensor, form: str, *expected: int | None) -> None:
    """Raise ValueError unless `tensor` has the expected sizes; None stands for any."""
    shape = tensor.shape
    if len(shape) != len(expected) or any(e is not None and s != e for s, e in zip(shape, expected, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{operation}: {name} must be {form} = [{sizes}], got {list(shape)}")
