"""The inside of a repository's own script that runs on a CPU at a tiny size; `against_scripts.py` is the outside.

Replaced while it runs: what `foreign` says; the text encoder and the VAE, whose weights are not at hand; the size of
the pictures; and the GPU and bfloat16, which the script asks for. Its files stay as they are.
"""

from __future__ import annotations

import ast
import atexit
import importlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partialmethod, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backbones.checkouts import repositories
from backbones.checkouts.driver import TextEncoder
from backbones.checkouts.foreign import Sizes, double_missing, enter

VARIABLE = "LONGLIVE_RAG_CHECKOUT"
"""Environment variable that holds the orders."""
PUBLISHED_SIZE, TINY_SIZE = [60, 104], [4, 8]
"""Rows and columns of a latent frame."""


@dataclass(frozen=True)
class Orders:
    latents: str
    """Where to save what the script generated."""
    sizes: dict[str, int]
    records: str | None = None
    """Patch the pipeline as it is made, and save here what was retrieved; None: do not."""

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


def begin(script: str) -> None:
    """Prepare this process, which is about to run `script` in the folder of a checkout."""
    orders = Orders(**json.loads(os.environ[VARIABLE]))
    root, sizes = Path.cwd(), Sizes(**orders.sizes)
    enter(root, sizes)
    double_missing(ast.parse((root / script).read_text()))
    repositories.recognised(root)(root, sizes, repositories.fill)
    wrappers: Any = importlib.import_module("utils.wan_wrapper")
    wrappers.WanTextEncoder = _made_with(TextEncoder, sizes)
    wrappers.WanVAEWrapper = _made_with(SavingDecoder, Path(orders.latents))
    _after_making(importlib.import_module("pipeline").CausalInferencePipeline, sizes, orders.records)
    vars(torch.cuda).update(memory_stats=lambda *_: defaultdict(int), mem_get_info=lambda *_: (2**36, 2**36))
    OnCPU().__enter__()


def _made_with(parent: Any, *args: Any) -> type:
    """A class, since annotations name it, that is made without arguments."""
    return type(parent.__name__, (parent,), {"__init__": partialmethod(parent.__init__, *args)})


class SavingDecoder(torch.nn.Module):
    """Stands for the VAE, and saves the latents of each video."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.model = SimpleNamespace(clear_cache=lambda: None)
        self._path = path
        self._videos: list[Tensor] = []

    def decode_to_pixel(self, latents: Tensor, use_cache: bool = False) -> Tensor:
        """[B, F, C, H, W] to [B, F, 3, H, W]."""
        self._videos.append(latents.clone())
        torch.save(self._videos, self._path)
        return latents[:, :, :3]

    decode_to_pixel_chunk = decode_to_pixel


class OnCPU(TorchFunctionMode):
    """Reads "cuda" as the CPU, bfloat16 as float32, and noise of the published size as that of the tiny one."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*map(_here, args), **{name: _here(value) for name, value in (kwargs or {}).items()})


def _here(value: Any) -> Any:
    if value is torch.bfloat16:
        return torch.float32
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, list) and all(isinstance(entry, int) for entry in value) and value[-2:] == PUBLISHED_SIZE:
        return [*value[:-2], *TINY_SIZE]
    return value


def _after_making(pipeline_class: Any, sizes: Sizes, records: str | None) -> None:
    """Tell each pipeline how many layers its model has, which it takes for 30, and patch it, if that was ordered."""
    make: Callable[..., None] = pipeline_class.__init__

    @wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.num_transformer_blocks = sizes.layers
        if records is not None:
            from longlive_rag import patch

            patched = patch(self)
            atexit.register(
                lambda: Path(records).write_text(
                    json.dumps([
                        [[entry.block_start, entry.frames[0]] for entry in video]
                        for video in [*patched.earlier_videos, patched.retrieved]
                        if video
                    ])
                )
            )  # fmt: skip

    pipeline_class.__init__ = __init__


if __name__ == "__main__":
    sys.exit("this is imported by the sitecustomize that against_scripts.py writes")
