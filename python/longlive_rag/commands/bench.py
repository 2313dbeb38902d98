"""`longlive-rag bench`: the operations, the layer and the block beside their peers and the machine's limit."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longlive_rag.files import check_writable, write_json
from longlive_rag.options import Positional

if TYPE_CHECKING:
    from longlive_rag.bench.common import Case, Machine

Benchmark = Literal[
    "insert", "retrieve", "attend", "pack", "layer", "block", "encoder", "portable", "decode", "parallel"
]


@dataclass(frozen=True)
class Bench:
    """Measure how fast the operations run on this machine.

    Each line gives our time, the least time that the machine allows (from the copy and matrix-product rates measured in
    the same run), the share of that limit reached, the goal if there is one, and the times of other implementations.
    Without a GPU, the PyTorch reference is measured at small sizes, which says nothing about the kernels.

    Examples:
      longlive-rag bench
      longlive-rag bench retrieve attend --json results.json --plot results.png
    """

    benchmarks: Positional[tuple[Benchmark, ...]] = (
        "insert",
        "retrieve",
        "attend",
        "pack",
        "layer",
        "block",
        "encoder",
    )
    """What to measure. portable, PyTorch's attention beside the definition, decode, latents to pictures, and parallel,
    a layer on several ranks, are measured only when they are asked for."""
    sweep: bool = False
    """With attend, on a Hopper GPU: more sizes, every variant of the kernel, and what the rotation costs."""
    json: Path | None = None
    """Write the results to this JSON file after each case, with the machine, its clocks and the versions."""
    plot: Path | None = None
    """Draw the results to this image file."""

    def run(self) -> int:
        for path in (self.json, self.plot):
            if path is not None:
                check_writable(path)
        if self.sweep and "attend" not in self.benchmarks:
            raise ValueError(f"--sweep belongs to the benchmark attend, got {', '.join(self.benchmarks)}")
        import torch
        from tqdm import tqdm

        from longlive_rag.bench import common

        machine = common.machine()
        cases = self._cases(machine)
        facts = machine.facts()
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
        if facts["kernels"] != "CUDA":
            print("The CUDA kernels do not run here: this is the PyTorch reference, and no measure of them.")
        torch.manual_seed(0)
        rows: list[common.Row] = []
        without_room: list[str] = []
        for name, measure in tqdm(cases.items(), unit="case", leave=False, file=sys.stderr):
            try:
                rows.append(measure())
            except torch.cuda.OutOfMemoryError:
                without_room.append(name)
            else:
                tqdm.write(f"{rows[-1].operation}  {rows[-1].case}  {common.duration(rows[-1].ours)}", file=sys.stdout)
                sys.stdout.flush()
            machine.free()
            if self.json is not None:  # after each case: an interrupted run keeps what it measured
                rows_json = [row.as_json() for row in rows]
                write_json(self.json, {"machine": facts, "rows": rows_json, "out_of_memory": without_room})
        print(f"\n{common.table(rows)}")
        if without_room:
            print(f"not measured, for lack of GPU memory: {'; '.join(without_room)}")
        if self.plot is not None:
            common.plot(rows, self.plot)
        return 0

    def _cases(self, machine: Machine) -> dict[str, Case]:
        modules = list(dict.fromkeys(self.benchmarks))
        found: dict[str, Case] = {}
        for module in [*modules, "attend_sweep"] if self.sweep else modules:
            cases = importlib.import_module(f"longlive_rag.bench.{module}").cases(machine)
            found |= {f"{module}: {name}": case for name, case in cases.items()}
        return found
