"""attend for sm_80, emulated, where the last wave of blocks is cut along the keys: parts that begin within a page, one
page and many, samples with unlike numbers of pages; the merge in the order of the keys, whichever block is last."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from kernels.test_attend_sm90 import check, launched, make_case, plan_of
from support import emulated
from support.attend_cases import Case

AT_A_TIME = 8
"""Blocks on the four multiprocessors of the emulated device."""


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return emulated.build()


@pytest.fixture(params=["forward", "reverse"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SIMT_ORDER", request.param)
    return request.param


def is_cut(module: ModuleType, case: Case) -> bool:
    return plan_of(module, case, "sm80").workspace > 0


def unlike_numbers_of_pages() -> Case:
    """Cut into three parts and into two, whole, and empty."""
    case = make_case(batch=4, tokens=64, head_dim=64, entries=12)
    for sample, unused in enumerate([0, 1, 8, 12]):
        used = (case.slots[sample] >= 0).nonzero()[:, 0]
        case.slots[sample, used[:unused]] = -1
    return case


@pytest.mark.parametrize("dtype, head_dim", [(torch.bfloat16, 128), (torch.float16, 64)])
def test_parts_that_begin_within_a_page(module, order, dtype, head_dim):
    """Fourteen steps of seven pages in three parts: the last begins with the tail of a page."""
    case = make_case(dtype, tokens=75, head_dim=head_dim, entries=7)
    assert is_cut(module, case)
    check(module, case, kernel="sm80")


def test_one_page(module, order, monkeypatch):
    """Of sixteen tiles of 32 keys."""
    monkeypatch.setenv("SIMT_SHARED_KB", "60")
    case = make_case(tokens=500, head_dim=64, entries=1, spare=1)
    assert is_cut(module, case)
    check(module, case, kernel="sm80")


def test_a_wave_and_a_remainder(module, order):
    case = make_case(tokens=64, head_dim=64, heads=AT_A_TIME + 1, entries=12)
    assert is_cut(module, case)
    assert not is_cut(module, make_case(tokens=64, head_dim=64, heads=AT_A_TIME, entries=12))
    check(module, case, kernel="sm80")


def test_samples_with_unlike_numbers_of_pages(module, order):
    case = unlike_numbers_of_pages()
    out, lse = launched(module, case, "sm80")
    assert (out[3] == 0).all() and (lse[3] == -torch.inf).all()
    case = Case(*(tensor[:3] if len(tensor) == 4 else tensor for tensor in case))
    assert is_cut(module, case)
    check(module, case, kernel="sm80")


def test_a_sample_is_cut_as_if_alone(module):
    """The same bits, whatever the rest of the batch is and however many entries of the table are unused."""
    case = unlike_numbers_of_pages()
    together = launched(module, case, "sm80")
    for sample in range(3):
        for alone in (case.sample(sample), case.sample(sample).with_unused_entries(3, 40)):
            for got, expected in zip(launched(module, alone, "sm80"), together, strict=True):
                assert torch.equal(got[0], expected[sample])


def test_hopper_cuts_nothing(module, order, monkeypatch):
    """There is a kernel of its own; what runs beside it leaves the last wave whole."""
    case = unlike_numbers_of_pages().sample(0)
    assert is_cut(module, case)
    monkeypatch.setenv("SIMT_CAPABILITY", "90")
    assert not is_cut(module, case)
    check(module, case, kernel="sm80")


def test_a_kernel_that_does_not_cut(order):
    """As machine code for Hopper, under a launcher that would: the blocks that are left over have nothing to do."""
    module = emulated.build(("cuda/attend_sm80_parts.cuh", "kForHopper = false", "kForHopper = true"))
    case = make_case(tokens=64, head_dim=64, heads=AT_A_TIME + 1, entries=12)
    assert is_cut(module, case)
    check(module, case, kernel="sm80")


def bits_in_both_orders(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    case = make_case(tokens=64, head_dim=64, heads=2, entries=12)
    results: list[tuple[torch.Tensor, ...]] = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("SIMT_ORDER", order)
        results.append(launched(module, case, "sm80"))
    return results


def test_bits_do_not_depend_on_the_order_of_blocks(module, monkeypatch):
    """Whichever finishes first, and whichever merges."""
    forward, reverse = bits_in_both_orders(module, monkeypatch)
    assert all(torch.equal(x, y) for x, y in zip(forward, reverse, strict=True))


def test_another_order_of_merging_would_be_noticed(monkeypatch):
    """Were the merge to begin with the part of the block that merges."""
    file = "cuda/attend_sm80_parts.cuh"
    faulty = emulated.build(
        (file, "int part = 0; part < work.parts; ++part)", "int turn = 0; turn < work.parts; ++turn)"),
        (file, "float keep[2], add[2];", "float keep[2], add[2]; const int part = (turn + work.part) % work.parts;"),
    )
    forward, reverse = bits_in_both_orders(faulty, monkeypatch)
    assert not torch.equal(forward[1], reverse[1])


def test_a_nan_of_one_part_stays_one(module):
    """In a query row whose NaN no part can lose."""
    case = make_case(tokens=64, head_dim=64, entries=12)
    case.q[0, 5, 0, 3] = torch.nan
    out, lse = launched(module, case, "sm80")
    assert out[0, 5].isnan().all() and lse[0, 5].isnan().all()
    assert out[0, :5].isfinite().all() and out[0, 6:].isfinite().all()
