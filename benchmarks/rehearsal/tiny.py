"""Sizes that the emulator computes in a moment, under the names of the real ones, so that summaries find them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any


def shrink(arguments: list[str]) -> None:
    """Prepare for the program of these arguments, whose first is a module or a file."""
    if arguments[:2] == ["longlive_rag", "bench"]:
        _shrink_bench()
    elif arguments[:2] == ["longlive_rag", "check"]:
        _check_on_stand_ins()
    elif arguments[0] == "longlive_rag.checking":
        arguments[:] = [argument for argument in arguments if argument != "--thorough"]
    elif arguments[0] == "benchmarks/end_to_end.py":
        arguments += ["--size", "tiny"]


def _check_on_stand_ins() -> None:
    """The processes of a check run on the same interpreter as this one."""
    from longlive_rag.checking import isolated

    shim = str(Path(__file__).resolve().parent / "python.py")
    isolated.check.__kwdefaults__ = {
        **(isolated.check.__kwdefaults__ or {}),
        "command": (sys.executable, shim, *isolated.CHILD[1:]),
    }


def _shrink_bench() -> None:
    from longlive_rag.bench import attend, attend_sweep, block, common, encoder, insert, layer, retrieve

    common.REPLAYS, common.MAX_SETS, common._PRODUCT_SIZE = 2, 1, 64
    for name, value in {"copy_rate": 1e9, "matmul_rate": 1e9, "hopper": True}.items():
        setattr(common.Machine, name, value)

    def shrunk(sizes: attend.Sizes) -> attend.Sizes:
        return replace(sizes, heads=1, tokens=64, frames=1, entries=1, batch=1)

    attend.CASES.update({name: shrunk(sizes) for name, sizes in attend.CASES.items()})
    changed: dict[Any, dict[str, Any]] = {
        attend_sweep: {
            "FIGURES": [shrunk(attend_sweep.FIGURES[0])],
            "SWEPT": [shrunk(attend_sweep.SWEPT[0])],
            "WAN_1_3B": shrunk(attend.WAN_1_3B),
        },
        insert: {"CASES": dict.fromkeys(insert.CASES, (1, 2, 3, 1))},
        retrieve: {"COUNTS": [64, 300], "WIDTH": 64},
        layer: {"CASES": dict.fromkeys(layer.CASES, (1, 2, 3)), "START": 12},
        block: {"CASES": dict.fromkeys(block.CASES, ({**block.CPU_MODEL, "num_layers": 1}, (4, 6))), "START": 12},
        encoder: {"HEIGHT": 8, "WIDTH": 8, "HIDDEN_DIMS": (4, 8, 8), "EMBEDDING_DIM": 16},
    }
    for module, values in changed.items():
        for name, value in values.items():
            setattr(module, name, value)
