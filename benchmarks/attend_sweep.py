"""attend on Hopper in one go: check it, measure it against its peers, sweep its variants. Under ten minutes on an H200.

    python benchmarks/attend_sweep.py --json benchmarks/results/attend_sweep_h200.json

Checks come first and stop everything: against float64, against the kernel for sm_80, with unused pages and table
entries poisoned, pages moved, samples alone, runs repeated and replayed from a CUDA graph, for every variant. Then the
figures of the issue's table, each beside torch SDPA (cuDNN and flash) on keys gathered and rotated beforehand and the
cuBLAS rate measured in the same run; then the key tiles, and what the rotation costs. Goals not reached are listed
last; they are findings, not failures, so the exit status is 0 unless a check fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from longlive_rag import ops
from longlive_rag.bench.common import Call, Machine, Row, machine, table
from longlive_rag.files import write_json
from longlive_rag.native import kernels_on
from longlive_rag.ops.attend import launch as launch_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support import attend_cases
from support.attend_cases import Case

PEERS = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}
KEY_TILES = [112, 128, 144, 176]


@dataclass(frozen=True)
class Sizes:
    tokens: int
    frames: int
    heads: int
    batch: int = 1
    entries: int = 12
    head_dim: int = 128
    goal_rate: float | None = None
    """TFLOP/s."""
    goal_ratio: float = 1.0
    """Of the best peer's time to ours."""

    @property
    def name(self) -> str:
        return (
            f"{self.batch} x {self.frames} x {self.tokens}, {self.entries} pages, {self.heads} heads of {self.head_dim}"
        )

    @property
    def work(self) -> int:
        """Multiplications and additions."""
        return 4 * self.batch * self.frames * self.entries * self.tokens**2 * self.heads * self.head_dim


FIGURES = [
    Sizes(1560, 3, 12, goal_rate=640, goal_ratio=1.1),
    Sizes(1560, 3, 40, goal_rate=660, goal_ratio=1.05),
    *(Sizes(tokens, frames, 12, batch) for tokens in (880, 1024, 3600) for frames in (1, 3) for batch in (1, 2, 4)),
]
CHECKS = [
    *(Sizes(tokens, 3, 2, entries=3) for tokens in (64, 112, 880, 1024, 1560, 3600)),
    Sizes(100, 5, 3, batch=3, entries=64),
    Sizes(1560, 1, 1, entries=1),
    Sizes(1560, 3, 40, entries=2),
    Sizes(880, 3, 12, batch=4, entries=2),
    Sizes(300, 3, 6, batch=2, entries=5, head_dim=64),
]


def make_case(sizes: Sizes, dtype: torch.dtype, device: torch.device, spare: int = 0) -> Case:
    """`spare`: unused table entries of each sample, and unused pages."""
    return attend_cases.make_case(
        device,
        dtype,
        batch=sizes.batch,
        frames=sizes.frames,
        tokens=sizes.tokens,
        heads=sizes.heads,
        head_dim=sizes.head_dim,
        entries=sizes.entries,
        spare=spare,
    )


def launch(case: Case, kernel: str, key_tile: int = 0, *, poison: bool = True) -> tuple[Tensor, Tensor]:
    """One of the two kernels, whatever `ops.attend` would choose; output and log-sum-exp."""
    extension = kernels_on(case.q.device)
    assert extension is not None
    out, lse = torch.empty_like(case.q), torch.empty(case.q.shape[:3], device=case.q.device)
    if poison:
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
    options = extension.AttendOptions(kernel=kernel, key_tile=key_tile)
    launch_kernel(extension, out, lse, *case, case.q.shape[3] ** -0.5, options)
    return out, lse


def check(case: Case, key_tile: int) -> None:
    """Raises AssertionError on the first thing that is wrong."""
    out, lse = launch(case, "sm90", key_tile)
    eps = torch.finfo(out.dtype).eps
    for sample in range(len(case.q)):  # one at a time: float64 scores are large
        one = [case.q, *case[3:6]]
        q, slots, positions, query_position = (tensor[sample : sample + 1] for tensor in one)
        for head in range(case.q.shape[2]):
            pages = [pool[:, head : head + 1].double() for pool in case[1:3]]
            tables = (slots, positions, query_position, case.frequencies)
            expected, expected_lse = ops.attend(q[:, :, head : head + 1].double(), *pages, *tables, return_lse=True)
            got = out[sample, :, head].double()
            error = (got - expected[0, :, 0]).norm() / expected.norm()
            assert error < 0.75 * eps, f"sample {sample}, head {head}: relative error {error:.2e} against float64"
            difference = (lse[sample, :, head] - expected_lse[0, :, 0]).abs().max()
            assert difference < 2 * eps, f"sample {sample}, head {head}: log-sum-exp is off by {difference:.2e}"
    other, _ = launch(case, "sm80")
    assert (out.double() - other.double()).norm() < 1.5 * eps * other.double().norm(), "the kernel for sm_80 disagrees"

    def same(what: str, again: tuple[Tensor, Tensor]) -> None:
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1]), f"other bits {what}"

    same("when run again", launch(case, "sm90", key_tile))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch(case, "sm90", key_tile)
    for _ in range(2):
        graph.replay()
        same("when replayed from a graph", captured)
    same("when the pages lie elsewhere", launch(case.with_pages_moved(), "sm90", key_tile))
    same("with more unused entries", launch(case.with_unused_entries(2, 3), "sm90", key_tile))
    for sample in range(len(case.q)):
        alone = launch(case.sample(sample), "sm90", key_tile)
        one = slice(sample, sample + 1)
        assert torch.equal(alone[0], out[one]) and torch.equal(alone[1], lse[one]), f"other bits alone: {sample}"


def run_checks(device: torch.device) -> None:
    jobs = [(sizes, 0, dtype) for sizes in CHECKS for dtype in (torch.bfloat16, torch.float16)]
    jobs += [(Sizes(1560, 3, 2, entries=3), key_tile, torch.bfloat16) for key_tile in KEY_TILES]
    for sizes, key_tile, dtype in tqdm(jobs, desc="checks"):
        try:
            check(make_case(sizes, dtype, device, spare=3), key_tile)
        except AssertionError as error:
            raise AssertionError(f"{sizes.name}, {dtype}, tile {key_tile}: {error}") from None


def measured_cases(here: Machine, sizes: Sizes) -> list[Case]:
    bytes_per_set = 4 * sizes.batch * sizes.entries * sizes.heads * sizes.tokens * sizes.head_dim
    return [make_case(sizes, torch.bfloat16, here.device) for _ in range(here.sets(bytes_per_set))]


def figures(here: Machine) -> Iterator[tuple[Sizes, Row]]:
    """ops.attend against its peers on the issue's shapes."""
    for sizes in tqdm(FIGURES, desc="figures"):
        cases = measured_cases(here, sizes)
        gathered = []
        for case in cases:  # rotating the keys changes no peer's time, so they get them as they are
            pages = [pool[case.slots.long()].transpose(1, 2).flatten(2, 3).contiguous() for pool in case[1:3]]
            gathered.append((case.q.transpose(1, 2).contiguous(), *pages))
        peers: dict[str, Call] = {}
        for name, backend in PEERS.items():

            def peer(
                index: int, backend: SDPBackend = backend, gathered: list[tuple[Tensor, ...]] = gathered
            ) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(*gathered[index])

            try:
                peer(0)
            except RuntimeError as error:
                print(f"{name} does not run here: {error}", file=sys.stderr)
            else:
                peers[name] = peer
        calls = [lambda i, cases=cases: ops.attend(*cases[i]), *peers.values()]
        ours, *theirs = here.seconds(calls, sets=len(cases))
        times: dict[str, float | None] = dict(zip(peers, theirs, strict=True))
        rate = f"{sizes.name}: {sizes.work / ours / 1e12:.0f} TFLOP/s"
        yield sizes, Row("attend", rate, ours, sizes.work / here.matmul_rate, "cuBLAS rate", times)


def sweep(here: Machine) -> Iterator[Row]:
    """Every variant, measured in turns, on the two main shapes and on one of each other frame size."""
    for sizes in tqdm([*FIGURES[:2], *(Sizes(tokens, 3, 12) for tokens in (880, 1024, 3600))], desc="sweep"):
        cases = measured_cases(here, sizes)
        calls: list[Call] = [
            lambda i, cases=cases, key_tile=key_tile: launch(cases[i], "sm90", key_tile, poison=False)
            for key_tile in KEY_TILES
        ]
        calls.append(lambda i, cases=cases: launch(cases[i], "sm80", poison=False))
        names = [*(f"tile {key_tile}" for key_tile in KEY_TILES), "sm_80 kernel"]
        for name, seconds in zip(names, here.seconds(calls, sets=len(cases)), strict=True):
            case = f"{name}, {sizes.name}: {sizes.work / seconds / 1e12:.0f} TFLOP/s"
            yield Row("sweep", case, seconds, sizes.work / here.matmul_rate, "cuBLAS rate")


def rotation_cost(here: Machine) -> Row:
    """The same kernel with and without pairs that turn."""
    cases = measured_cases(here, FIGURES[0])
    still = [case._replace(frequencies=case.frequencies[:0]) for case in cases]
    with_rotation, without = here.seconds(
        [lambda i: ops.attend(*cases[i]), lambda i: ops.attend(*still[i])], sets=len(cases)
    )
    name = f"rotation costs {with_rotation / without - 1:.2%}, {FIGURES[0].name}"
    return Row("rotation", name, with_rotation, without, "no rotation")


def missed_goals(measured: list[tuple[Sizes, Row]], rotation: Row) -> list[str]:
    missed = []
    for sizes, row in measured:
        rate, best = sizes.work / row.ours / 1e12, min((t for t in row.peers.values() if t is not None), default=None)
        if sizes.goal_rate is not None and rate < sizes.goal_rate:
            missed.append(f"{sizes.name}: {rate:.0f} TFLOP/s, goal {sizes.goal_rate:.0f}")
        if best is not None and best < sizes.goal_ratio * row.ours:
            missed.append(f"{sizes.name}: {best / row.ours:.3f} x the best peer, goal {sizes.goal_ratio}")
    if rotation.limit is not None and rotation.ours > 1.01 * rotation.limit:
        missed.append(f"{rotation.case}, goal 1%")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--checks-only", action="store_true", help="do not measure")
    arguments = parser.parse_args()
    here = machine()
    if not here.cuda or torch.cuda.get_device_capability() != (9, 0) or kernels_on(here.device) is None:
        parser.error("needs a Hopper GPU, and kernels compiled for sm_90a")
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            run_checks(here.device)
    except AssertionError as error:
        print(f"CHECK FAILED: {error}", file=sys.stderr)
        return 1
    if arguments.checks_only:
        return 0
    with torch.no_grad():
        measured = list(figures(here))
        rows = [*(row for _, row in measured), *sweep(here), rotation := rotation_cost(here)]
    missed = missed_goals(measured, rotation)
    print(table(rows))
    print("goals missed:", *(missed or ["none"]), sep="\n  ")
    if arguments.json:
        results = {"machine": here.facts(), "rows": [row.as_json() for row in rows], "goals_missed": missed}
        write_json(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
