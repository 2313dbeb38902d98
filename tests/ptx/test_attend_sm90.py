"""attend on Hopper: nvcc's PTX for sm_90a, with its asynchronous instructions as the PTX ISA has them."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from kernels.test_attend_sm90 import attend_sm90, check, exact, make_case
from ptx import execute
from support import emulated

SOURCE = "cuda/attend_sm90.cu"
TILES = [(112, 150), (128, 130), (144, 144), (176, 200)]
"""Key tiles, and frames of tokens with a tail, or that are whole tiles."""


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return execute.build(SOURCE)


@pytest.fixture(params=["forward", "reverse", "late0", "late1"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SIMT_ORDER", request.param)
    return request.param


def test_every_entry(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMT_ORDER", "reverse")
    with execute.executed(module) as names:
        for dtype in (torch.bfloat16, torch.float16):
            for head_dim in (64, 128):
                for key_tile, tokens in TILES:
                    check(module, make_case(dtype, head_dim=head_dim, tokens=tokens), key_tile=key_tile)
    assert names == set(execute.kernels(SOURCE))


def test_schedules(module: ModuleType, order: str) -> None:
    """Frames of 70 tokens, of which three share a query tile; tiles cut and merged; unused entries; a batch."""
    check(module, make_case(frames=4, tokens=70, head_dim=64, entries=3, batch=2))


def test_cut_tiles(module: ModuleType, order: str) -> None:
    check(module, make_case(tokens=64, head_dim=64, heads=6, entries=5))


def test_samples_with_unlike_numbers_of_pages(module: ModuleType, order: str) -> None:
    """Each sample's work is cut on the device, by its own pages."""
    case = make_case(batch=3, tokens=64, head_dim=64, heads=5, entries=5)
    for sample, unused in enumerate([0, 4, 2]):
        used = (case.slots[sample] >= 0).nonzero()[:, 0]
        case.slots[sample, used[:unused]] = -1
    check(module, case)


def test_sample_without_pages(module: ModuleType) -> None:
    case = make_case(batch=2, tokens=64, head_dim=64, heads=6)
    case.slots[0] = -1
    out, lse = attend_sm90(module, case)
    expected, _ = exact(case)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert (out[1].double() - expected[1]).norm() < 0.01 * expected[1].norm()


@pytest.mark.parametrize("pairs, head_dim", [(0, 128), (24, 128), (16, 64)])
def test_number_of_turning_pairs(module: ModuleType, pairs: int, head_dim: int) -> None:
    check(module, make_case(pairs=pairs, head_dim=head_dim, tokens=80))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_the_emulated_body(module: ModuleType, dtype: torch.dtype) -> None:
    """nvcc contracts multiply-adds and the executor's approximations are as bad as allowed, so not bit for bit."""
    case = make_case(dtype, frames=2, tokens=120, heads=2, head_dim=64)
    out, lse = attend_sm90(module, case)
    body, body_lse = attend_sm90(emulated.build(), case)
    assert (out.double() - body.double()).norm() <= 0.5 * torch.finfo(dtype).eps * body.double().norm()
    torch.testing.assert_close(lse, body_lse, rtol=1e-6, atol=2e-6)
