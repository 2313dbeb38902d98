"""attend on Hopper, every variant of its kernel: more sizes, key tiles, and what the rotation costs.

`tests/kernels/test_attend_variants.py` shows on the same GPU that each variant is right.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from longlive_rag import ops
from longlive_rag.bench import attend
from longlive_rag.bench.attend import WAN_1_3B, WAN_14B, Sizes
from longlive_rag.bench.common import Call, Case, Machine, Row
from longlive_rag.native import kernels_on
from longlive_rag.ops._attend_arguments import Arguments
from longlive_rag.ops.attend import launch as launch_kernel
from longlive_rag.ops.attend import plan


class Variant(NamedTuple):
    """A kernel of `attend`, whatever the operation would choose."""

    kernel: str
    """"sm80" or "sm90"."""
    key_tile: int = 0
    """Of the Hopper kernel; zero: as it chooses."""

    def __str__(self) -> str:
        return "sm_80 kernel" if self.kernel == "sm80" else f"tile {self.key_tile}"


SM80 = Variant("sm80")
VARIANTS = [Variant("sm90", tile) for tile in (112, 128, 144, 176)]
FIGURES = [
    Sizes(12, 128, tokens, frames, 12, batch)
    for tokens in (880, 1024, 3600)
    for frames in (1, 3)
    for batch in (1, 2, 4)
]
SWEPT = [WAN_1_3B, WAN_14B, *(Sizes(12, 128, tokens, 3, 12) for tokens in (880, 1024, 3600))]
GOAL_OF_ROTATION = 1.01
"""Time with rotation to time without."""


def cases(machine: Machine) -> dict[str, Case]:
    """Raises ValueError unless this machine runs the Hopper kernel."""
    if not machine.hopper:
        raise ValueError(
            "--sweep compares variants of the Hopper kernel: it needs a GPU of compute capability 9.0 and kernels "
            "compiled for sm_90a (longlive-rag info)"
        )
    return {
        **{str(sizes): partial(attend.measure, machine, str(sizes), sizes) for sizes in FIGURES},
        **{f"variants, {sizes}": partial(measure_variants, machine, sizes) for sizes in SWEPT},
        "rotation": partial(measure_rotation, machine),
    }


def measure_variants(machine: Machine, sizes: Sizes) -> Row:
    """The operation's own choice beside every variant."""
    data = attend.data_sets(machine, sizes)
    calls: list[Call] = [lambda index: ops.attend(*data[index])]
    calls += [partial(_run_variant, variant, data) for variant in (*VARIANTS, SM80)]
    chosen, *others = machine.seconds(calls, sets=len(data))
    peers: dict[str, float | None] = dict(zip(map(str, (*VARIANTS, SM80)), others, strict=True))
    return Row("attend", f"variants, {sizes}", chosen, sizes.work / machine.matmul_rate, "matmul rate", peers)


def measure_rotation(machine: Machine) -> Row:
    """The same kernel with and without pairs to turn."""
    data = attend.data_sets(machine, WAN_1_3B)
    still = [arguments._replace(frequencies=arguments.frequencies[:0]) for arguments in data]
    calls: list[Call] = [lambda index: ops.attend(*data[index]), lambda index: ops.attend(*still[index])]
    turning, without = machine.seconds(calls, sets=len(data))
    case = f"rotation costs {turning / without - 1:.2%}, {WAN_1_3B}"
    return Row("attend", case, turning, without, "no rotation", goal=GOAL_OF_ROTATION * without)


def _run_variant(variant: Variant, data: list[Arguments], index: int) -> Tensor:
    arguments = data[index]
    out = torch.empty_like(arguments.q)
    launch(variant, arguments, out, torch.empty(out.shape[:3], device=out.device))
    return out


def launch(variant: Variant, arguments: Arguments, out: Tensor, lse: Tensor) -> None:
    """Run one variant into `out` [B, L, H, D] and `lse` float32 [B, L, H]."""
    extension = kernels_on(out.device)
    assert extension is not None
    planned = plan(extension, arguments, variant.kernel, variant.key_tile)
    launch_kernel(planned, out, lse, arguments, out.shape[3] ** -0.5)
