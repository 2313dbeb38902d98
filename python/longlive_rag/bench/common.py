"""Timing, limits and tables that all benchmarks share.

On a GPU a figure is the median over replays of a CUDA graph. The graph calls the operation once on each of several sets
of random data (zeros would run faster), together twice the L2 cache, so that no call finds its input there. At most
`MAX_SETS` are made, so inputs of less than a megabyte or two (`retrieve` of 64 keys) do stay in L2.
"""

from __future__ import annotations

import functools
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import longlive_rag
from longlive_rag import figures
from longlive_rag.native import cuda_status

Call = Callable[[int], object]
"""Runs once on the data set of that number."""
Case = Callable[[], "Row"]
"""Measures one case."""

REPLAYS = 25
MAX_SETS = 64
HEAD_START_CYCLES = 2_000_000
"""About a millisecond, in which the host launches a graph while the GPU is still busy. On an idle stream, some 10 us of
the launch would be counted."""
LOAD_SECONDS = 1.0
"""How long the GPU is kept busy while nvidia-smi reads its clocks."""
_PRODUCT_SIZE = 8192


@dataclass(frozen=True)
class Machine:
    """Where a benchmark runs."""

    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @functools.cached_property
    def hopper(self) -> bool:
        """Whether `attend` uses its Hopper kernel here."""
        if not self.cuda or "sm_90a" not in cuda_status().architectures:
            return False
        return torch.cuda.get_device_capability(self.device) == (9, 0)

    @functools.cached_property
    def copy_rate(self) -> float:
        """Bytes per second, read and written, of a large copy."""
        count = 2**30 if self.cuda else 2**25
        source, target = (torch.empty(count, dtype=torch.uint8, device=self.device).random_() for _ in range(2))
        return 2 * count / self.seconds([lambda _: target.copy_(source)], sets=1)[0]

    @functools.cached_property
    def matmul_rate(self) -> float:
        """Multiplications and additions per second of a large matrix product: bfloat16 on a GPU, float32 elsewhere."""
        size = _PRODUCT_SIZE if self.cuda else 512
        dtype = torch.bfloat16 if self.cuda else torch.float32
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2 * size**3 / self.seconds([lambda _: a @ b], sets=1)[0]

    @functools.cached_property
    def launch_time(self) -> float:
        """Seconds that the smallest kernel takes in a graph."""
        one = torch.zeros(1, device=self.device)
        return self.seconds([lambda _: one.add_(1)], sets=64)[0]

    def seconds(self, calls: Sequence[Call], *, sets: int, graph: bool = True) -> list[float]:
        """Median seconds of one call of each, measured in turns so that a change of clocks affects all alike.

        Args:
            sets: data sets; each call is made on all of them in turn.
            graph: on a GPU, capture in a CUDA graph; False for a call that synchronises with the host, or to count the
                launches.
        """
        graph = graph and self.cuda
        runs = [self._prepare(call, sets, graph) for call in calls]
        samples: list[list[float]] = [[] for _ in runs]
        for _ in range(REPLAYS if self.cuda else 5):
            for run, sample in zip(runs, samples, strict=True):
                sample.append(self._time(run, graph) / sets)
        return [statistics.median(sample) for sample in samples]

    def _prepare(self, call: Call, sets: int, graph: bool) -> Callable[[], object]:
        def run() -> None:
            for index in range(sets):
                call(index)

        if not graph:
            run()
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        return captured.replay

    def _time(self, run: Callable[[], object], graph: bool) -> float:
        if not self.cuda:
            begun = time.perf_counter()
            run()
            return time.perf_counter() - begun
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if graph:
            torch.cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def sets(self, bytes_per_set: int) -> int:
        """Data sets that together are twice the L2 cache, at most `MAX_SETS`; one on a CPU."""
        if not self.cuda:
            return 1
        l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(MAX_SETS, -(-2 * l2_bytes // bytes_per_set)))

    def free(self) -> None:
        """Give back the GPU memory of what is no longer referenced, so that the next case finds room."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def facts(self) -> dict[str, Any]:
        """What a stored result has to say about its machine."""
        facts: dict[str, Any] = {
            "longlive_rag": longlive_rag.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.cuda else f"CPU, {platform.machine()}",
        }
        if not self.cuda:
            return {**facts, "kernels": "none: the PyTorch reference was measured", "threads": torch.get_num_threads()}
        return {
            **facts,
            "kernels": "CUDA" if cuda_status().available else "none: the PyTorch reference was measured",
            "cuda": torch.version.cuda,
            "clocks_under_load": self._clocks_under_load(),
            "copy_TB_per_s": round(self.copy_rate / 1e12, 3),
            "matmul_TFLOP_per_s": round(self.matmul_rate / 1e12, 1),
            "launch_us": round(self.launch_time * 1e6, 2),
        }

    def _clocks_under_load(self) -> str:
        """Clocks while matrix products run; those of an idle GPU say nothing about a measurement."""
        a, b = (torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE, device=self.device).to(torch.bfloat16) for _ in range(2))
        for _ in range(math.ceil(LOAD_SECONDS * self.matmul_rate / (2 * _PRODUCT_SIZE**3))):
            a @ b
        clocks = _clocks()
        torch.cuda.synchronize(self.device)
        return clocks


def machine() -> Machine:
    """The GPU if there is one, else the CPU."""
    return Machine(
        torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    )


@dataclass(frozen=True)
class Row:
    """One case, times in seconds.

    Attributes:
        ours: our time.
        limit, limit_is: the least time that the machine allows, and by what.
        peers: their times; None: cannot run here.
        goal: the time to reach.
    """

    operation: str
    case: str
    ours: float
    limit: float | None = None
    limit_is: str = ""
    peers: dict[str, float | None] = field(default_factory=dict)
    goal: float | None = None

    def as_json(self) -> dict[str, Any]:
        ratios = {name: peer / self.ours for name, peer in self.peers.items() if peer is not None}
        return {**asdict(self), "of_limit": self.limit / self.ours if self.limit else None, "faster_than": ratios}


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def table(rows: Sequence[Row]) -> str:
    """Ours, limit, goal and peers; behind each peer how many times longer it takes."""
    lines = [["operation", "case", "ours", "limit", "of limit", "goal", "peers (times ours)"]]
    for row in rows:
        peers = ", ".join(
            f"{name} {duration(peer)}" + (f" ({peer / row.ours:.2f}x)" if peer is not None else "")
            for name, peer in row.peers.items()
        )
        share = f"{row.limit / row.ours:.0%}" if row.limit else "-"
        limit = f"{duration(row.limit)} {row.limit_is}" if row.limit else "-"
        goal = f"{duration(row.goal)}, {'reached' if row.ours <= row.goal else 'missed'}" if row.goal else "-"
        lines.append([row.operation, row.case, duration(row.ours), limit, share, goal, peers])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of our time, the limit and the peers, each relative to ours."""
    figure = figures.figure(10, 1 + 0.7 * len(rows))
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        times = {"ours": row.ours, **{name: peer for name, peer in row.peers.items() if peer is not None}}
        height = 0.8 / len(times)
        for i, (name, seconds) in enumerate(times.items()):
            y = place - 0.4 + (i + 0.5) * height
            axes.barh(y, seconds / row.ours, 0.9 * height, color="C0" if name == "ours" else "0.75")
            axes.text(seconds / row.ours, y, f" {name}, {duration(seconds)}", va="center", fontsize=7)
        if row.limit:
            axes.plot([row.limit / row.ours] * 2, [place - 0.4, place + 0.4], color="C3", linewidth=2)
    axes.set_yticks(range(len(rows)), [f"{row.operation}\n{row.case}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time relative to ours; red: the machine's limit")
    axes.spines[["top", "right"]].set_visible(False)
    figures.save(figure, path, dpi=150)


def _clocks() -> str:
    """Clocks of the multiprocessors and of the memory, and the power limit, from nvidia-smi."""
    import subprocess

    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
