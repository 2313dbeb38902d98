"""Every variant of attend's kernel on a Hopper GPU: key tiles, at the sizes of videos.

The contract tests in tests/ops run on the operation's own choice. `longlive-rag bench attend --sweep` measures the
variants tested here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longlive_rag import ops
from longlive_rag.bench import common
from longlive_rag.bench.attend import Arguments, Sizes, random_arguments
from longlive_rag.bench.attend_sweep import SM80, VARIANTS, Variant, launch

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
"""Table entries that hold extreme integers, beside pages that hold NaN."""


@pytest.fixture
def device() -> torch.device:
    machine = common.machine()
    if not machine.hopper:
        pytest.skip("not a Hopper GPU, or no kernels for sm_90a")
    return machine.device


def poisoned(arguments: Arguments) -> Arguments:
    """The same call with NaN in every page that it does not use, and with unused entries in its tables."""
    batch = arguments.slots.shape[0]
    for pool in (arguments.k_pages, arguments.v_pages):
        unused = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
        unused[arguments.slots.flatten().long()] = False
        pool[unused] = torch.nan
    extreme = torch.full((batch, UNUSED), 2**31 - 1, dtype=torch.int32, device=arguments.q.device)
    order = torch.randperm(arguments.slots.shape[1] + UNUSED, device=arguments.q.device)
    return arguments._replace(
        slots=torch.cat([arguments.slots, -extreme], dim=1)[:, order].contiguous(),
        positions=torch.cat([arguments.positions, extreme], dim=1)[:, order].contiguous(),
    )


def run(variant: Variant, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, poisoned before."""
    out = torch.full_like(arguments.q, torch.nan)
    lse = torch.full(out.shape[:3], torch.nan, device=out.device)
    launch(variant, arguments, out, lse)
    return out, lse


def pages_elsewhere(arguments: Arguments) -> Arguments:
    places = torch.randperm(len(arguments.k_pages), device=arguments.q.device)
    k_pages, v_pages = torch.empty_like(arguments.k_pages), torch.empty_like(arguments.v_pages)
    k_pages[places], v_pages[places] = arguments.k_pages, arguments.v_pages
    slots = arguments.slots
    moved = torch.where(slots < 0, slots, places[slots.clamp(min=0).long()].int())
    return arguments._replace(k_pages=k_pages, v_pages=v_pages, slots=moved)


def check_against_float64(arguments: Arguments, out: Tensor, lse: Tensor) -> None:
    """One sample and head at a time, since scores in float64 are large."""
    eps = torch.finfo(out.dtype).eps
    for sample in range(len(out)):
        one = slice(sample, sample + 1)
        tables = (arguments.slots[one], arguments.positions[one], arguments.query_position[one], arguments.frequencies)
        for head in range(out.shape[2]):
            part = slice(head, head + 1)
            q = arguments.q[one, :, part].double().contiguous()
            k_pages, v_pages = (p[:, part].double().contiguous() for p in (arguments.k_pages, arguments.v_pages))
            expected, expected_lse = ops.attend(q, k_pages, v_pages, *tables, return_lse=True)
            error = (out[sample, :, head].double() - expected[0, :, 0]).norm() / expected.norm()
            # The output, the weights and the rotated part of the query are rounded, each to within eps / 2.
            assert error < 0.75 * eps, f"sample {sample}, head {head}: relative error {error:.2e} against float64"
            difference = (lse[sample, :, head] - expected_lse[0, :, 0]).abs().max()
            assert difference < 2 * eps, f"sample {sample}, head {head}: log-sum-exp is off by {difference:.2e}"


@pytest.mark.parametrize("variant, sizes, dtype", CASES, ids=str)
def test_variant(device: torch.device, variant: Variant, sizes: Sizes, dtype: torch.dtype) -> None:
    """Right against float64 and the kernel for sm_80; the same bits again, from a graph, and with pages elsewhere."""
    torch.manual_seed(0)
    arguments = poisoned(random_arguments(sizes, dtype, device))
    out, lse = run(variant, arguments)
    check_against_float64(arguments, out, lse)
    other, _ = run(SM80, arguments)
    assert (out.double() - other.double()).norm() < 1.5 * torch.finfo(dtype).eps * other.double().norm()

    def same_bits(again: Callable[[], tuple[Tensor, Tensor]]) -> bool:
        return all(torch.equal(x, y) for x, y in zip((out, lse), again(), strict=True))

    assert same_bits(lambda: run(variant, arguments))
    assert same_bits(lambda: run(variant, pages_elsewhere(arguments)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(variant, arguments)
    for _ in range(2):
        graph.replay()
        assert same_bits(lambda: captured)
