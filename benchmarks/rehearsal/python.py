"""Stands in for the interpreter in a rehearsal: `python.py -m MODULE ARGUMENTS` or `python.py FILE ARGUMENTS`.

Only the packages that `gpu_plan` names can be imported, torch takes the CPU for a GPU, and sizes are tiny. The
operations run the emulated kernels, but in whole models PyTorch, since that is faster.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main(arguments: list[str]) -> None:
    sys.path[:1] = [str(HERE), str(HERE.parent), str(ROOT / "tests")]
    as_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if as_module else arguments
    name = sys.argv[0]

    import only

    only.import_only(only.allowed(with_carried=sys.argv[:2] == ["benchmarks/end_to_end.py", "video"]))

    import cpu_as_gpu
    import tiny

    cpu_as_gpu.pretend()
    whole_model = name == "benchmarks/end_to_end.py" or sys.argv[1:3] == ["bench", "block"]
    with contextlib.nullcontext() if whole_model else cpu_as_gpu.emulated_kernels():
        if name == "pytest":
            import pytest
            import sample_tests

            sys.exit(pytest.main(sys.argv[1:], plugins=[sample_tests]))
        tiny.shrink(sys.argv)
        if as_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
