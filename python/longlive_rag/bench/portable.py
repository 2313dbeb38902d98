"""attend without a kernel: PyTorch's attention in the tensors' own dtype beside the definition, time and memory."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from longlive_rag.bench.attend import Sizes, random_arguments
from longlive_rag.bench.common import Case, Machine, Row
from longlive_rag.ops import _portable
from longlive_rag.ops._attend_arguments import Arguments
from longlive_rag.ops.attend import definition

SIZES = [Sizes(4, 128, tokens, 3, 12) for tokens in (96, 390, 880)]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
IMPLEMENTATIONS = {"portable": _portable.attend, "definition": definition}


def cases(machine: Machine) -> dict[str, Case]:
    return {f"{sizes}, {name}": partial(measure, machine, sizes, name) for sizes in SIZES for name in DTYPES}


def measure(machine: Machine, sizes: Sizes, dtype: str) -> Row:
    """Both implementations on the same arguments; their memory and error stand in the name of the row."""
    arguments = random_arguments(sizes, DTYPES[dtype], machine.device)
    scale = sizes.head_dim**-0.5
    ours, theirs = machine.seconds(
        [lambda _: _portable.attend(arguments, scale), lambda _: definition(arguments, scale)], sets=1
    )
    memory = {name: _peak_bytes(machine, name, sizes, dtype) for name in IMPLEMENTATIONS}
    errors = {name: _error(call(arguments, scale), arguments) for name, call in IMPLEMENTATIONS.items()}
    facts = "; ".join(f"{name} {memory[name] / 2**20:.0f} MiB, error {errors[name]:.1e}" for name in IMPLEMENTATIONS)
    return Row("portable", f"{sizes}, {dtype} ({facts})", ours, peers={"definition": theirs})


def _error(out: torch.Tensor, arguments: Arguments) -> float:
    """Relative error of the first head against float64."""
    first = slice(0, 1)
    head = arguments._replace(
        q=arguments.q[:, :, first].double(),
        k_pages=arguments.k_pages[:, first].double(),
        v_pages=arguments.v_pages[:, first].double(),
    )
    exact = definition(head, arguments.q.shape[3] ** -0.5)
    return float((out[:, :, first].double() - exact).norm() / exact.norm())


def _peak_bytes(machine: Machine, name: str, sizes: Sizes, dtype: str) -> int:
    """What one call needs at its peak beside its arguments: of the GPU, or in a process of its own."""
    if machine.cuda:
        arguments = random_arguments(sizes, DTYPES[dtype], machine.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        IMPLEMENTATIONS[name](arguments, sizes.head_dim**-0.5)
        return torch.cuda.max_memory_allocated() - before
    call = f"_measure_process({name!r}, {sizes!r}, {dtype!r})"
    script = f"from longlive_rag.bench.portable import Sizes, _measure_process; {call}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout)


def _measure_process(name: str, sizes: Sizes, dtype: str) -> None:
    """The inside of the process: prints by how many bytes one call raised its peak."""
    small = random_arguments(Sizes(1, sizes.head_dim, 16, 1, 2), DTYPES[dtype], torch.device("cpu"))
    IMPLEMENTATIONS[name](small, 1.0)  # what PyTorch allocates once
    arguments = random_arguments(sizes, DTYPES[dtype], torch.device("cpu"))
    # Linux. The peak that getrusage tells includes that of the process which started this one.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_kilobytes()
    IMPLEMENTATIONS[name](arguments, sizes.head_dim**-0.5)
    print(1024 * (_peak_kilobytes() - before))


def _peak_kilobytes() -> int:
    """What this process held at most since its peak was reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])
