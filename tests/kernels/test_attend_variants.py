"""Every variant of attend's kernel on a Hopper GPU: key tiles, at the sizes of videos.

The contract tests in tests/ops run on the operation's own choice. `longlive-rag bench attend --sweep` measures the
variants tested here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longlive_rag.bench import common
from longlive_rag.bench.attend import Sizes
from longlive_rag.bench.attend_sweep import SM80, VARIANTS, Variant, launch
from support.attend_cases import Case, exact, make_case

pytestmark = pytest.mark.cuda

CHOSEN = Variant("sm90")
"""As the kernel itself chooses."""
SIZES = [
    *(Sizes(2, 128, tokens, 3, 3) for tokens in (64, 112, 880, 1024, 1560, 3600)),
    Sizes(3, 128, 100, 5, 64, batch=3),
    Sizes(1, 128, 1560, 1, 1),
    Sizes(40, 128, 1560, 3, 2),
    Sizes(12, 128, 880, 3, 2, batch=4),
    Sizes(6, 64, 300, 3, 5, batch=2),
]
CASES = [
    *((CHOSEN, sizes, dtype) for sizes in SIZES for dtype in (torch.bfloat16, torch.float16)),
    *((variant, Sizes(2, 128, 1560, 3, 3), torch.bfloat16) for variant in VARIANTS),
]
UNUSED = 3
"""Table entries that hold extreme integers, and pages that hold NaN."""


@pytest.fixture
def device() -> torch.device:
    machine = common.machine()
    if not machine.hopper:
        pytest.skip("not a Hopper GPU, or no kernels for sm_90a")
    return machine.device


def run(variant: Variant, arguments: Case) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, poisoned before."""
    out = torch.full_like(arguments.q, torch.nan)
    lse = torch.full(out.shape[:3], torch.nan, device=out.device)
    launch(variant, arguments, out, lse)
    return out, lse


def check_against_float64(case: Case, out: Tensor, lse: Tensor) -> None:
    eps = torch.finfo(out.dtype).eps
    expected, expected_lse = exact(case)
    for sample in range(len(out)):
        for head in range(out.shape[2]):
            one = expected[sample, :, head]
            error = (out[sample, :, head].double().cpu() - one).norm() / one.norm()
            # The output, the weights and the rotated part of the query are rounded, each to within eps / 2.
            assert error < 0.75 * eps, f"sample {sample}, head {head}: relative error {error:.2e} against float64"
    difference = (lse.cpu() - expected_lse).abs().max()
    assert difference < 2 * eps, f"log-sum-exp is off by {difference:.2e}"


@pytest.mark.parametrize("variant, sizes, dtype", CASES, ids=str)
def test_variant(device: torch.device, variant: Variant, sizes: Sizes, dtype: torch.dtype) -> None:
    """Right against float64 and the kernel for sm_80; the same bits again, from a graph, and with pages elsewhere."""
    arguments = make_case(
        device,
        dtype,
        batch=sizes.batch,
        frames=sizes.frames,
        tokens=sizes.tokens,
        heads=sizes.heads,
        head_dim=sizes.head_dim,
        entries=sizes.entries,
        spare=UNUSED,
    )
    out, lse = run(variant, arguments)
    check_against_float64(arguments, out, lse)
    other, _ = run(SM80, arguments)
    assert (out.double() - other.double()).norm() < 1.5 * torch.finfo(dtype).eps * other.double().norm()

    def same_bits(again: Callable[[], tuple[Tensor, Tensor]]) -> bool:
        return all(torch.equal(x, y) for x, y in zip((out, lse), again(), strict=True))

    assert same_bits(lambda: run(variant, arguments))
    assert same_bits(lambda: run(variant, arguments.with_pages_moved()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(variant, arguments)
    for _ in range(2):
        graph.replay()
        assert same_bits(lambda: captured)
