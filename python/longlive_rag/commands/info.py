"""`longlive-rag info`: what is installed, whether the CUDA kernels can be used here, and what to do if not."""

from __future__ import annotations

import importlib.util
import json
import shutil
import textwrap
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import NamedTuple

import longlive_rag

EXTRAS = {
    "diffusers": "wan",
    "ftfy": "wan",
    "transformers": "wan",
    "tensorboard": "tensorboard",
    "starlette": "serve",
    "uvicorn": "serve",
    "websockets": "serve",
}
"""Packages that come with an extra of this one: missing, they are the user's choice and no fault."""

_EXTRA_IS_FOR = {
    "wan": "To make videos from checkpoints with `generate`",
    "serve": "To watch a video grow in the browser with `serve`",
    "tensorboard": "To write TensorBoard events with `train --tensorboard`",
}
_INSTALL = "pip install --force-reinstall --no-deps ."
_MIN_CAPABILITY = (8, 0)


class Step(NamedTuple):
    """Something to do next: what for, and the command."""

    purpose: str
    command: str


@dataclass(frozen=True)
class Info:
    """Show what is installed, and whether a GPU can be used.

    If something is missing, the last lines say what to do about it.

    Examples:
      longlive-rag info
      longlive-rag info --json
    """

    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        import torch

        from longlive_rag.native import cuda_status, driver_is_too_old

        status = cuda_status()
        if self.json:
            facts = {"version": longlive_rag.__version__, "torch": torch.__version__, "cuda": asdict(status)}
            print(json.dumps(facts, indent=2))
            return 0
        print(f"longlive_rag   {longlive_rag.__version__}")
        print(f"torch          {torch.__version__}")
        print(f"CUDA kernels   {'built for ' + ', '.join(status.architectures) if status.built else 'not built'}")
        if status.available:
            print(f"GPU            {torch.cuda.get_device_name()}")
        else:
            print(f"GPU            not used: {status.reason}")
            print("               The PyTorch implementation is used instead; it gives the same results.")
        missing = [package for package in EXTRAS if importlib.util.find_spec(package) is None]
        print(f"extras         {'not installed: ' + ', '.join(missing) if missing else 'all installed'}")

        steps = extra_steps(missing)
        if not status.available:
            steps = [
                *gpu_steps(
                    importable=importlib.util.find_spec("longlive_rag._C") is not None,
                    built=status.built,
                    torch_has_cuda=torch.version.cuda is not None,
                    driver_fits=not driver_is_too_old(),
                    capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
                ),
                Step("The demo runs on the CPU, in a few minutes:", "longlive-rag demo --output demo"),
                *steps,
            ]
        if steps:
            print("\nWhat to do next:")
        width = max(40, min(shutil.get_terminal_size().columns, 100))
        for purpose, command in steps:
            print(textwrap.fill(purpose, width, initial_indent="  ", subsequent_indent="  "))
            print(f"      {command}")
        return 0


def gpu_steps(
    *, importable: bool, built: bool, torch_has_cuda: bool, driver_fits: bool, capability: tuple[int, int] | None
) -> list[Step]:
    """What to do where the CUDA kernels cannot be used.

    Args:
        importable: the compiled module is there.
        built: it has CUDA kernels.
        torch_has_cuda: so does torch.
        driver_fits: the driver, if there is one, is not too old for the kernels.
        capability: compute capability of torch's current GPU; None if it finds none.
    """
    if not importable:
        return [Step("The compiled module is missing. Install the package again, in a clone of its source:", _INSTALL)]
    if not built:
        purpose = (
            "To use an NVIDIA GPU, install a CUDA toolkit (nvcc 12.4 or newer) and rebuild, in a clone of the source:"
        )
        return [Step(purpose, f"LONGLIVE_RAG_CUDA=ON {_INSTALL}")]
    if not torch_has_cuda:
        purpose = (
            "To use an NVIDIA GPU, install a torch with CUDA, for example this one "
            "(all are listed at https://pytorch.org/get-started/locally):"
        )
        command = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        return [Step(purpose, command)]
    if not driver_fits:
        purpose = (
            "Update the NVIDIA driver (https://www.nvidia.com/drivers), or rebuild with the nvcc of an older CUDA "
            "toolkit, in a clone of the source:"
        )
        return [Step(purpose, f"CUDACXX=/usr/local/cuda-12/bin/nvcc LONGLIVE_RAG_CUDA=ON {_INSTALL}")]
    if capability is None:
        purpose = (
            "If this machine has an NVIDIA GPU, install its driver (https://www.nvidia.com/drivers), then check that "
            "it finds the GPU:"
        )
        return [Step(purpose, "nvidia-smi")]
    if capability < _MIN_CAPABILITY:
        return []
    architecture = "".join(map(str, capability))
    purpose = "Rebuild the kernels for this GPU, in a clone of the source:"
    return [Step(purpose, f"CUDAARCHS={architecture}-real LONGLIVE_RAG_CUDA=ON {_INSTALL}")]


def extra_steps(missing: Collection[str]) -> list[Step]:
    """How to install the extras that these packages belong to."""
    return [
        Step(f"{_EXTRA_IS_FOR[extra]}:", f"pip install 'longlive_rag[{extra}]'")
        for extra in dict.fromkeys(EXTRAS[package] for package in missing)
    ]
