"""The compiled extension `longlive_rag._C`: the one place that imports it, and says what it can do here and why."""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import dataclass
from types import ModuleType

import torch


@dataclass(frozen=True)
class CudaStatus:
    """State of the CUDA kernels.

    Attributes:
        built: the kernels are compiled in.
        architectures: what they are compiled for, such as ``sm_90a`` (machine code) and ``compute_120`` (PTX).
        available: they can run on torch's current CUDA device.
        reason: why they are not available; None if they are.
    """

    built: bool
    architectures: tuple[str, ...]
    available: bool
    reason: str | None


def kernels() -> ModuleType | None:
    """The extension module if it has CUDA kernels, whatever GPU is there; else None."""
    module, _ = _load()
    return module if module is not None and module.cuda_version else None


@functools.cache
def kernels_on(device: torch.device) -> ModuleType | None:
    """The extension module if its CUDA kernels can run on this device; else None. Once a device: the answer is kept."""
    module = kernels()
    if module is None or device.type != "cuda" or _unavailable(module, device.index) is not None:
        return None
    return module


def cuda_status() -> CudaStatus:
    """Tell whether the CUDA kernels are built, for what, and whether they can run here. Does not raise."""
    module, problem = _load()
    if module is None:
        return CudaStatus(False, (), False, problem)
    if not module.cuda_version:
        return CudaStatus(False, (), False, "built without CUDA: no nvcc was found, or LONGLIVE_RAG_CUDA was OFF")
    reason = _unavailable(module, None)
    return CudaStatus(True, tuple(module.cuda_architectures.split()), reason is None, reason)


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code built for `architecture` (as in `CudaStatus`) runs on a device of this compute capability.

    Machine code runs on the same major version with an equal or higher minor one; with the suffix ``a`` (or ``f``) on
    exactly its own (or its family, taken as the major version); PTX on everything that is not older.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if match is None:
        raise ValueError(f"architecture must look like sm_90a or compute_120, got {architecture!r}")
    kind, major, minor, suffix = match.groups()
    built_for = (int(major), int(minor))
    if suffix == "a":
        return capability == built_for
    if kind == "sm" or suffix == "f":
        return capability[0] == built_for[0] and capability[1] >= built_for[1]
    return capability >= built_for


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None for every other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else None


def attend_variants(device: torch.device) -> list[str]:
    """The kernels of attend that a GPU may use, best first, as `checking.variants` names them."""
    hopper = capability(device) == (9, 0) and "sm_90a" in cuda_status().architectures
    return ["attend-hopper", "attend-ampere"] if hopper else ["attend-ampere"]


def extension() -> ModuleType | None:
    """The extension module, whatever it was built with; None if it cannot be imported."""
    return _load()[0]


def driver_version() -> int:
    """Newest CUDA version that the driver supports, such as 13000; 0 without a driver or without CUDA compiled in."""
    module = kernels()
    return module.cuda_driver_version() if module is not None else 0


def driver_is_too_old() -> bool:
    """Whether there is a driver, but for an older major version of CUDA than the kernels were built with."""
    module = kernels()
    return module is not None and 0 < driver_version() < 1000 * int(module.cuda_version.split(".")[0])


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("longlive_rag._C"), ""
    except ImportError as error:
        return None, f"the extension module longlive_rag._C could not be imported: {error}"


def _unavailable(module: ModuleType, index: int | None) -> str | None:
    """Why the kernels cannot run on the CUDA device of this number (None: the current one); None if they can."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    driver = driver_version()
    if driver == 0:
        return "no NVIDIA driver was found"
    if driver_is_too_old():
        supported = f"{driver // 1000}.{driver % 1000 // 10}"
        return f"the kernels are built with CUDA {module.cuda_version}, but the driver supports only CUDA {supported}"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA GPU"
    capability = torch.cuda.get_device_capability(index)
    architectures = module.cuda_architectures.split()
    if not any(runs_on(architecture, capability) for architecture in architectures):
        return (
            f"the kernels are built for {', '.join(architectures)}, but {torch.cuda.get_device_name(index)} has "
            f"compute capability {capability[0]}.{capability[1]}"
        )
    return None
