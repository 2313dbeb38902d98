"""What `on_gpu.py` does: parts that stand alone, each of steps with a time limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PYTHON = "{python}"
"""Stands in a command for the interpreter."""
FIGURES = "{figures}"
"""Stands in a command for the JSON file that it writes its figures to."""
SITE = "{site}"
"""Stands in a command for the folder that the package is installed into."""

LONGEST_CALL = 600
"""Seconds that a part may take, the build included."""

ON_THE_MACHINE = ("hypothesis", "numpy", "pybind11", "pytest", "safetensors", "scikit_build_core", "torch", "tqdm")
"""What all parts together need, by the names that Python imports; also cmake, ninja, nvcc and pip."""
CARRIED = ("av", "diffusers")
"""What only the part end-to-end needs, and a machine with torch is unlikely to have."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: within its part.
        command: with `PYTHON`, `FIGURES` and `SITE` where their values belong.
        limit: seconds after which it is stopped.
        hopper: it makes sense on a GPU of compute capability 9.0 only.
        subcommand: of longlive-rag, which this version must have; else the step is left out.
        needs: packages, by the names that Python imports, besides torch and what torch needs.
        environment: more variables.
    """

    name: str
    command: tuple[str, ...]
    limit: int
    hopper: bool = False
    subcommand: str | None = None
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Steps that belong together and fit into one call, if need be after `BUILD`."""

    purpose: str
    steps: tuple[Step, ...]

    @property
    def limit(self) -> int:
        """Seconds that its steps may take together."""
        return sum(step.limit for step in self.steps)


# Without isolation: the machine may have no network. In a folder of its own: the machine's packages stay as they are.
BUILD = Step(
    "build",
    (
        PYTHON,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--upgrade",
        "--target",
        SITE,
        ".",
    ),
    180,
    needs=("pybind11", "scikit_build_core"),
)

SMALL_TESTS = {
    "tests/ops/test_insert.py": ("test_matches_float64", "test_rows_at_any_address"),
    "tests/ops/test_retrieve.py": (
        "test_matches_float64",
        "test_ties_go_to_the_lower_index",
        "test_keys_with_gaps_in_their_rows",
    ),
    "tests/ops/test_attend.py": ("test_matches_float64", "test_log_sum_exp", "test_without_pages"),
}
"""Tests for compute-sanitizer, which slows kernels down a hundredfold. Their frames are too short for the Hopper
kernel."""
SMALL_HOPPER_TESTS = {"tests/ops/test_attend.py": ("test_frames_of_any_length",)}
"""Tests of `attend`, some with frames long enough for the Hopper kernel."""
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def longlive_rag(*arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "longlive_rag", *arguments)


def pytest(*arguments: str) -> tuple[str, ...]:
    """Tests that need a GPU. pytest fails if it selects none."""
    return (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", *arguments)


def tests(name: str, limit: int, *arguments: str, hopper: bool = False) -> Step:
    return Step(name, pytest(*arguments), limit, hopper=hopper, needs=("hypothesis", "numpy", "pytest", "safetensors"))


def sanitize(tool: str, selected: Mapping[str, tuple[str, ...]], *, hopper: bool = False) -> Step:
    names = dict.fromkeys(name for group in selected.values() for name in group)
    sanitizer = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--kernel-name", "kns=longlive")
    return Step(
        tool,
        (*sanitizer, *pytest(*selected, "-k", " or ".join(names))),
        100,
        hopper=hopper,
        needs=("hypothesis", "numpy", "pytest", "safetensors"),
        # Each tensor gets an allocation of its own, past whose end a store is seen.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def bench(name: str, limit: int, *arguments: str, hopper: bool = False) -> Part:
    command = longlive_rag("bench", *(arguments or (name,)), "--json", FIGURES)
    step = Step("bench", command, limit, hopper=hopper, needs=("safetensors", "tqdm"))
    return Part(f"how fast: {' '.join(arguments or (name,))}", (step,))


PARTS = {
    "build": Part(
        "what is there, and the first contact: attend on Hopper before all else",
        (
            Step("info", longlive_rag("info", "--json"), 30),
            tests("attend on Hopper", 180, "tests/kernels/test_attend_variants.py", hopper=True),
            Step("quick check", longlive_rag("check", "--quick"), 120, subcommand="check"),
        ),
    ),
    "check": Part(
        "every kernel against its definition, in a process of its own",
        (Step("check", longlive_rag("check", "--report", FIGURES), 400, subcommand="check"),),
    ),
    "tests": Part(
        "the tests that need a GPU",
        (
            tests("operations", 250, "tests/ops"),
            tests("all others", 150, "tests/kernels/test_attend_sm90.py", "tests/training", "tests/test_package.py"),
        ),
    ),
    "sanitize": Part("compute-sanitizer over small cases", tuple(sanitize(tool, SMALL_TESTS) for tool in TOOLS)),
    "sanitize-hopper": Part(
        "compute-sanitizer over attend on Hopper, where its tools may misread bulk copies and their barriers",
        tuple(sanitize(tool, SMALL_HOPPER_TESTS, hopper=True) for tool in TOOLS),
    ),
    "bench-insert": bench("insert", 120),
    "bench-retrieve": bench("retrieve", 120),
    "bench-attend": bench("attend", 240),
    "bench-layer": bench("layer", 180),
    "bench-encoder": bench("encoder", 240),
    "bench-sweep": bench("sweep", 400, "attend", "--sweep", hopper=True),
    # 78 executions: at a sustained 600 TFLOP/s, 137 s.
    "block": bench("block", 400),
    "end-to-end": Part(
        "30 s of video at 1.3B and 480 x 832, with random weights",
        (
            Step("latents", (PYTHON, "benchmarks/end_to_end.py", "latents", "--json", FIGURES), 180, needs=("tqdm",)),
            Step(
                "video",
                (PYTHON, "benchmarks/end_to_end.py", "video", "--json", FIGURES),
                220,
                needs=("tqdm", *CARRIED),
            ),
        ),
    ),
}

GROUPS = {"all": tuple(PARTS), "bench": tuple(name for name in PARTS if name.startswith("bench-"))}
"""Names for several parts, which need several calls."""
