"""The repositories that docs/backbones.md names, and what is the same for each checkout of one."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from backbones.checkouts.comfyui import ComfyUI
from backbones.checkouts.driver import Driver
from backbones.checkouts.longlive import LongLive, LongLive2, LongLiveRAG, MemFlow
from backbones.checkouts.self_forcing import CausalForcing, CausVid, InfinityRoPE, Krea, RollingForcing

# The first that fits counts, since most repositories have kept the files of Self-Forcing.
DRIVERS: tuple[type[Driver], ...] = (
    ComfyUI, LongLive2, CausVid, Krea, LongLiveRAG, LongLive, MemFlow, RollingForcing, InfinityRoPE, CausalForcing,
    Driver,
)  # fmt: skip


LIMIT = 1e-5
"""A difference beyond this is a fault: float32 rounds each block by about 2e-7, a wrong position costs 9e-3."""


def recognised(root: Path) -> type[Driver]:
    """The driver of a checkout, seen from its files.

    Raises:
        SystemExit: it is no checkout of a known repository.
    """
    driver = next((driver for driver in DRIVERS if driver.fits(root)), None)
    if driver is None:
        raise SystemExit(f"{root} is no checkout of a repository that docs/backbones.md names")
    return driver


def options(description: str | None, frames: int) -> argparse.ArgumentParser:
    """What both scripts take.

    Args:
        frames: the default of `--frames`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="DIR", help="checkout of a public repository")
    parser.add_argument("--frames", type=int, default=frames, help=f"latent frames of a long video (default: {frames})")
    parser.add_argument("--layers", type=int, default=3, help="layers of the model (default: 3)")
    parser.add_argument("--heads", type=int, default=12, help="heads of its attention (default: 12)")
    parser.add_argument("--head-dim", type=int, default=128, help="width of a head (default: 128)")
    return parser


def commit(root: Path) -> str:
    """Of the checkout, or as an export of one notes it in `.commit`."""
    noted = root / ".commit"
    if noted.is_file():
        return noted.read_text().strip()
    result = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def fill(module: torch.nn.Module) -> None:
    """Fill the parameters as those of the recorded traces, by formulas."""
    path = Path(__file__).parents[2] / "golden" / "params.py"
    spec = importlib.util.spec_from_file_location("golden_parameters", path)
    assert spec is not None and spec.loader is not None
    parameters = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parameters)
    parameters.fill(module, 0)


def largest_difference(made: Tensor, own: Tensor) -> float:
    """The largest relative error of a latent frame; both [B, F, C, H, W]."""
    difference, size = ((tensor.double().flatten(2).norm(dim=2)) for tensor in (made - own, own))
    return float((difference / size).max())
