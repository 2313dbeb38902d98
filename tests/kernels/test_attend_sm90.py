"""attend on Hopper, emulated: the kernel's own body against a model of TMA, wgmma and transaction barriers
(csrc/emulator/hopper.h), where the contract tests of tests/ops do not reach: each tile, schedules that hold a warp up,
the cut of the work, planted faults. On a Hopper GPU the last test compares the kernel with the one for sm_80."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from longlive_rag import ops
from longlive_rag.native import kernels_on
from longlive_rag.ops._cuda import DTYPE_CODES
from longlive_rag.ops.attend import launch, plan
from support import attend_cases, emulated
from support.attend_cases import Case, exact

MULTIPROCESSORS = 4
"""Of the emulated device."""


def make_case(dtype: torch.dtype = torch.bfloat16, *, tokens: int = 150, head_dim: int = 128, **sizes: int) -> Case:
    return attend_cases.make_case(torch.device("cpu"), dtype, tokens=tokens, head_dim=head_dim, **sizes)


def plan_of(module: ModuleType, case: Case, kernel: str = "sm90", key_tile: int = 0) -> Any:
    entries, pairs = case.slots.shape[1], case.frequencies.shape[0]
    sizes = case.q.shape, case.k_pages.shape, entries, pairs, DTYPE_CODES[case.q.dtype]
    return module.AttendPlan(*sizes, kernel, key_tile, 0)


def launched(module: ModuleType, case: Case, kernel: str, key_tile: int = 0) -> tuple[Tensor, Tensor]:
    """An emulated kernel's output and log-sum-exp; both, and the workspace, are poisoned before."""
    planned = plan_of(module, case, kernel, key_tile)
    size = planned.workspace
    workspace = torch.full((size // 4 + 4,), torch.nan)
    out, lse = torch.full_like(case.q, torch.nan), torch.full(case.q.shape[:3], torch.nan)
    addresses = [tensor.data_ptr() for tensor in (*case, out, lse, workspace)]
    planned.launch(*addresses, case.q.shape[3] ** -0.5, 0)
    assert workspace[size // 4 :].isnan().all(), "a store went past the end of the workspace"
    return out, lse


def attend_sm90(module: ModuleType, case: Case, key_tile: int = 0) -> tuple[Tensor, Tensor]:
    return launched(module, case, "sm90", key_tile)


def check(module: ModuleType, case: Case, key_tile: int = 0, kernel: str = "sm90") -> None:
    out, lse = launched(module, case, kernel, key_tile)
    expected, expected_lse = exact(case)
    error = (out.double() - expected).norm() / expected.norm()
    # The output, the weights and the rotated part of the query are rounded, each to within eps / 2.
    assert error < 1.5 * torch.finfo(out.dtype).eps / 2, f"relative error {error:.2e}"
    assert (lse - expected_lse).abs().max() < 2 * torch.finfo(out.dtype).eps


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return emulated.build()


@pytest.fixture(params=["forward", "reverse", "late0"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SIMT_ORDER", request.param)
    return request.param


@pytest.mark.parametrize("key_tile, tokens", [(112, 150), (128, 130), (144, 144), (176, 200)])
@pytest.mark.parametrize("dtype, head_dim", [(torch.bfloat16, 128), (torch.float16, 64)])
def test_key_tiles(module, order, dtype, head_dim, key_tile, tokens):
    """Full tiles, tails, and a tile that is a whole page; the query tile's rows do not fill the last tile."""
    check(module, make_case(dtype, head_dim=head_dim, tokens=tokens), key_tile)


def test_query_tiles_straddle_frames(module, order):
    """Frames of 70 tokens: the 128 rows of a query tile are of three frames, each at its own distance to each page."""
    check(module, make_case(frames=4, tokens=70, head_dim=64, entries=3))


@pytest.mark.parametrize("pairs, head_dim", [(0, 128), (1, 128), (24, 128), (16, 64)])
def test_number_of_turning_pairs(module, pairs, head_dim):
    check(module, make_case(pairs=pairs, head_dim=head_dim, tokens=80))


def test_distant_frames(module):
    """A million frames away, where a float32 angle would be off by a hundredth of a turn."""
    check(module, make_case(distance=1_000_000, tokens=80))


@pytest.mark.parametrize("tiles, is_cut", [(MULTIPROCESSORS, False), (MULTIPROCESSORS + 2, True), (1, True)])
def test_whole_and_cut_tiles(module, order, tiles, is_cut):
    """Waves of whole tiles need no workspace; a remainder is cut, and merged to the same result."""
    case = make_case(tokens=64, head_dim=64, heads=tiles, entries=8)
    assert (plan_of(module, case).workspace > 0) == is_cut
    check(module, case)


def test_samples_with_unlike_numbers_of_pages(module, order):
    """Each sample is cut by its own pages, and has its own place for partial results."""
    case = make_case(batch=4, tokens=64, head_dim=64, heads=5, entries=6)
    for sample, unused in enumerate([0, 3, 5, 1]):
        used = (case.slots[sample] >= 0).nonzero()[:, 0]
        case.slots[sample, used[:unused]] = -1
    check(module, case)


def test_bits_do_not_depend_on_the_order_of_blocks(module, monkeypatch):
    """Whichever finishes first, and whichever merges the parts of a cut tile."""
    case = make_case(tokens=64, head_dim=64, heads=6, entries=5)
    monkeypatch.setenv("SIMT_ORDER", "forward")
    first = attend_sm90(module, case)
    monkeypatch.setenv("SIMT_ORDER", "reverse")
    for a, b in zip(first, attend_sm90(module, case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("heads", [1, 6])
def test_sample_without_pages(module, heads):
    """Zeros and -inf beside a sample whose tiles are cut, which is not touched by it."""
    case = make_case(batch=2, tokens=64, head_dim=64, heads=heads)
    case.slots[0] = -1
    out, lse = attend_sm90(module, case)
    expected, _ = exact(case)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert (out[1].double() - expected[1]).norm() < 0.01 * expected[1].norm()


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 96},
        {"tokens": 63},
        {"pairs": 25},
        {"head_dim": 64, "pairs": 17},
        {"dtype": 0},
        {"heads": 0},
        {"slots": 0},
        {"entries": 0},
    ],
)
def test_sizes_left_to_the_other_kernel(module, change, monkeypatch):
    monkeypatch.setenv("SIMT_CAPABILITY", "90")
    few = {"heads": 1, "head_dim": 128, "slots": 4, "tokens": 64, "entries": 4, "pairs": 22, "dtype": 2}

    def kernel(heads, head_dim, slots, tokens, entries, pairs, dtype, wanted="auto"):
        sizes = ((1, 128, heads, head_dim), (slots, heads, tokens, head_dim), entries, pairs, dtype)
        return module.AttendPlan(*sizes, wanted, 0, 0).kernel

    assert kernel(**few) == "sm90" and kernel(**few, wanted="sm80") == "sm80"
    assert kernel(**few | change) == "sm80"
    with pytest.raises(ValueError, match="sm_90a"):
        kernel(**few | change, wanted="sm90")
    monkeypatch.setenv("SIMT_CAPABILITY", "100")
    assert kernel(**few) == "sm80"


def test_a_kernel_of_another_name_is_refused(module):
    with pytest.raises(ValueError, match="kernel must be auto, sm80 or sm90, got hopper"):
        plan_of(module, make_case(), "hopper")


LAUNCHER, CONSUMER, PRODUCERS = "cuda/attend_sm90.cu", "cuda/attend_sm90.cuh", "cuda/attend_sm90_producers.cuh"
# One instantiation only, so that the faulty builds compile in a second or two.
LEAN = (
    LAUNCHER,
    """if (DType(a.dtype) == DType::kFloat16)
         choose_head_dim<__half>(a, key_tile, workspace, static_cast<cudaStream_t>(stream));
       else
         choose_head_dim<__nv_bfloat16>(a, key_tile, workspace, static_cast<cudaStream_t>(stream));""",
    "launch_attend<__nv_bfloat16, 128, 112>(a, workspace, static_cast<cudaStream_t>(stream));",
)
AWAIT_QUERY = "ptx::mbarrier_wait(&shared.query_full, queries++ & 1);"
AWAIT_OUTPUT = "ptx::wgmma_wait<0>();  // the output is there"
RELEASE_VALUES = "\nrelease(&shared.value_empty[previous.stage]);"
FAULTS = {
    "keys not waited for": [
        (CONSUMER, "ptx::mbarrier_wait(&shared.key_full[ring.stage], ring.parity); await_turn();", "await_turn();")
    ],
    "rotations not waited for": [
        (CONSUMER, "ptx::mbarrier_wait(&shared.rotation_full[rotation_ring.stage], rotation_ring.parity);", "")
    ],
    "scores not waited for": [(CONSUMER, "ptx::wgmma_wait<1>();  // the scores are there", "")],
    "output scaled while its product is under way": [(CONSUMER, AWAIT_OUTPUT + RELEASE_VALUES, "")],
    "values released before their product is done": [
        (CONSUMER, AWAIT_OUTPUT + RELEASE_VALUES, f"{RELEASE_VALUES} ptx::wgmma_wait<0>();")
    ],
    "query released before the last product": [
        (CONSUMER, AWAIT_QUERY, f"{AWAIT_QUERY} release(&shared.query_empty);"),
        (CONSUMER, "release(&shared.query_empty); ptx::mbarrier_wait", "ptx::mbarrier_wait"),
    ],
    "wrong phase": [
        (
            PRODUCERS,
            "ptx::mbarrier_wait(&shared.value_empty[ring.stage], ring.parity ^ 1);",
            "ptx::mbarrier_wait(&shared.value_empty[ring.stage], ring.parity);",
        )
    ],
    "fewer bytes expected than come": [
        (PRODUCERS, "&shared.query_full, Shared::kQueryBytes)", "&shared.query_full, Shared::kQueryBytes / 2)")
    ],
    "plan changed while it is carried out": [
        (PRODUCERS, "ptx::mbarrier_wait(&shared.plan_empty[ring.stage], ring.parity ^ 1);", "")
    ],
    "no fence before the product": [
        (CONSUMER, "multiply_keys(int stage) { ptx::wgmma_fence();", "multiply_keys(int stage) {")
    ],
    "leading dimension offset of V": [(CONSUMER, "kPattern, kKeyTile * 128), true", "kPattern, kPattern), true")],
    "swizzle not undone": [(CONSUMER, "(chunk ^ r % 8)", "chunk")],
    "tail not masked": [(CONSUMER, "if (valid < kKeyTile)", "if (valid < 0)")],
    "frame of the other row": [(CONSUMER, "rotation_ring.stage][frame[half]]", "rotation_ring.stage][frame[0]]")],
    "merged by the first part": [
        (CONSUMER, "shared.arrived[consumer] + 1 < static_cast<uint32_t>(piece.parts)", "shared.arrived[consumer] > 0")
    ],
    "partial results of all samples in one place": [(CONSUMER, "int64_t(plan.sample) * p.partials_a_sample +", "")],
    "the next sample's first unit left out": [(PRODUCERS, "unit -= unit_count(schedule);", "unit = blockIdx.x + 1;")],
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_are_caught(fault, monkeypatch):
    """The emulation would not let any of these pass: it stops, or the result is wrong, under one of the schedules."""
    faulty = emulated.build(LEAN, *FAULTS.get(fault, []))
    case, caught = make_case(batch=2, frames=2, tokens=120, heads=3, entries=4), []
    for order in ("forward", "reverse", "late1"):  # warp 1 makes the rotations
        monkeypatch.setenv("SIMT_ORDER", order)
        try:
            check(faulty, case, key_tile=112)
        except (AssertionError, RuntimeError) as error:
            caught.append(str(error))
            break
    assert bool(caught) == (fault is not None)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes", [{"tokens": 1560, "frames": 3, "heads": 12, "entries": 12}, {"tokens": 880, "batch": 3, "head_dim": 64}]
)
def test_agrees_with_the_other_kernel(dtype, sizes):
    """On Hopper: the kernel for sm_80 and newer computes the same."""
    device = torch.device("cuda", torch.cuda.current_device())
    case = Case(*(tensor.to(device) for tensor in make_case(dtype, **sizes)))
    extension = kernels_on(device)
    assert extension is not None
    if plan(extension, case).kernel != "sm90":
        pytest.skip(f"{torch.cuda.get_device_name()} is not a Hopper GPU")
    sm90, sm90_lse = ops.attend(*case, return_lse=True)
    out, lse = torch.full_like(sm90, torch.nan), torch.full_like(sm90_lse, torch.nan)
    launch(plan(extension, case, "sm80"), out, lse, case, case.q.shape[3] ** -0.5)
    assert (sm90.double() - out.double()).norm() < 2 * torch.finfo(dtype).eps * out.double().norm()
    torch.testing.assert_close(sm90_lse, lse, atol=1e-4, rtol=1e-5)
