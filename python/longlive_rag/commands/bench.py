"""`longlive-rag bench`: the operations, the layer and the block beside their peers and the machine's limit."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longlive_rag.files import check_writable, write_json
from longlive_rag.options import Positional

Benchmark = Literal["insert", "retrieve", "attend", "layer", "block"]


@dataclass(frozen=True)
class Bench:
    """Measure how fast the operations run on this machine.

    Each line gives our time, the least time that the machine allows (from the copy and matrix-product rates measured in
    the same run), the share of that limit reached, and the times of other implementations. Without a GPU, the PyTorch
    reference is measured at small sizes, which says nothing about the kernels.

    Examples:
      longlive-rag bench
      longlive-rag bench retrieve attend --json results.json --plot results.png
    """

    benchmarks: Positional[tuple[Benchmark, ...]] = (
        "insert",
        "retrieve",
        "attend",
        "layer",
        "block",
    )
    """What to measure."""
    json: Path | None = None
    """Write the results to this JSON file, with the machine, its clocks and the versions."""
    plot: Path | None = None
    """Draw the results to this image file."""

    def run(self) -> int:
        for path in (self.json, self.plot):
            if path is not None:
                check_writable(path)
        import sys

        import torch
        from tqdm import tqdm

        from longlive_rag.bench import common

        machine = common.machine()
        facts = machine.facts()
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
        if facts["kernels"] != "CUDA":
            print("The CUDA kernels do not run here: this is the PyTorch reference, and no measure of them.")
        torch.manual_seed(0)
        rows = []
        for name in tqdm(dict.fromkeys(self.benchmarks), unit="benchmark", leave=False, file=sys.stderr):
            module = importlib.import_module(f"longlive_rag.bench.{name}")
            rows += list(module.rows(machine))
        print(common.table(rows))
        if self.json is not None:
            write_json(self.json, {"machine": facts, "rows": [row.as_json() for row in rows]})
        if self.plot is not None:
            common.plot(rows, self.plot)
        return 0
