"""The contract of `ops.attend` on nvcc's PTX for sm_80."""

from __future__ import annotations

import pytest
import torch

from longlive_rag import ops
from ops.test_attend import (  # noqa: F401
    HALF,
    check,
    make_case,
    test_a_sample_does_not_depend_on_its_batch,
    test_large_scores,
    test_log_sum_exp,
    test_pages_beyond_32_bit_offsets,
    test_pools_at_any_address,
    test_positions_an_hour_in,
    test_repeats_bit_for_bit,
    test_scale,
    test_slots_may_be_anywhere,
    test_without_pages,
)
from ptx import execute
from support import emulated
from support.attend_cases import exact

SOURCE = "cuda/attend.cu"
CPU = torch.device("cpu")


def test_every_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both head sizes and both tiles in each dtype: tails, straddled frames, unused entries, poisoned pages."""
    module = execute.build(SOURCE)
    with execute.executed(module) as names:
        for kilobytes in ("164", "60"):  # of shared memory on a multiprocessor: room for tiles of 64, or of 32
            monkeypatch.setenv("SIMT_SHARED_KB", kilobytes)
            with emulated.backend(module):  # a device of its own, whose plans are made anew
                for dtype in HALF:
                    for head_dim in (64, 128):
                        check(make_case(CPU, dtype, frames=2, tokens=75, head_dim=head_dim, entries=2))
    assert names == set(execute.kernels(SOURCE))


@pytest.mark.parametrize("order", ["forward", "reverse", "late0"])
def test_cut_tiles(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wave and a remainder, each tile of which is cut; parts that begin within a page; samples with unlike numbers of
    pages, one of them without any."""
    monkeypatch.setenv("SIMT_ORDER", order)
    with emulated.backend(execute.build(SOURCE)):
        check(make_case(CPU, torch.bfloat16, tokens=64, heads=10, entries=12))
        check(make_case(CPU, torch.float16, tokens=75, head_dim=128, entries=7))
        case = make_case(CPU, torch.float16, batch=3, tokens=75, entries=7)
        case.slots[1] = -1
        case.slots[2, case.slots[2].argmax()] = -1
        out, (expected, _) = ops.attend(*case), exact(case)
        assert (out[1] == 0).all() and (out.double() - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("dtype", HALF)
def test_beside_the_emulated_body(dtype: torch.dtype) -> None:
    """nvcc contracts multiply-adds and the executor's approximations are as bad as allowed, so not bit for bit."""
    case = make_case(CPU, dtype, batch=2, frames=2, tokens=70, head_dim=64, entries=2)
    results = []
    for module in (execute.build(SOURCE), emulated.build()):
        with emulated.backend(module):
            results.append(ops.attend(*case, return_lse=True))
    (out, lse), (body, body_lse) = results
    # Weights near the middle between two numbers are rounded to one or the other.
    assert (out.double() - body.double()).norm() <= 0.5 * torch.finfo(dtype).eps * body.double().norm()
    torch.testing.assert_close(lse, body_lse, rtol=1e-6, atol=2e-6)
