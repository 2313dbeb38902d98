"""Would the tests notice? Each kernel is compiled again with one deliberate fault in it, and has to fail.

Without a GPU these kernels are proven by the emulator alone, so it has to be shown that a missing barrier, a wrong
shuffle or an off-by-one at the tail cannot pass there unseen.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longlive_rag import ops, rotary
from support import emulated

ORDERS = ["forward", "reverse"]


def run_insert() -> list[Tensor]:
    torch.manual_seed(0)
    k, v, q = torch.randn(3, 1, 2, 5, 12, 64).half()
    weight, rotation = torch.rand(12 * 64), torch.rand(5, 20, 2)
    results = []
    for offset in (0, 1):  # whole 16-byte words, and views that begin inside of one
        weight, rotation = (
            torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view_as(x) for x in (weight, rotation)
        )
        pages = torch.zeros(2, 3, 12, 5, 64).half()
        slots = torch.tensor([[2, 0]], dtype=torch.int32)
        out = ops.insert(k, v, weight, rotation, pages[0], pages[1], slots, q=q, q_weight=weight)
        assert out is not None
        results += [out, pages]
    return results


def run_retrieve() -> list[Tensor]:
    torch.manual_seed(0)
    keys = torch.randn(1, 203, 40)
    keys[:, 150] = 9 * keys[:, 30]  # beyond the range, and the best
    results: list[Tensor] = []
    for k in (9, 50):
        results += ops.retrieve(keys[:, 30], keys, 1 / keys.norm(dim=-1), 1, 150, k)
    return results


def run_attend() -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(1, 2 * 75, 1, 64).half()
    pages = torch.randn(2, 4, 1, 75, 64).half()
    slots, positions, query_position = (
        torch.tensor([row], dtype=torch.int32) for row in ([3, -1, 0, 1], [2, 9, 0, 5], [6, 7])
    )
    frequencies = rotary.temporal_frequencies(64)
    return list(ops.attend(q, pages[0], pages[1], slots, positions, query_position, frequencies, return_lse=True))


def run_attend_cut() -> list[Tensor]:
    """Fourteen steps, cut into three parts; the last begins with the tail of a page."""
    torch.manual_seed(0)
    q = torch.randn(1, 75, 1, 64).half()
    pages = torch.randn(2, 7, 1, 75, 64).half()
    slots, positions, query_position = (
        torch.tensor([row], dtype=torch.int32) for row in ([3, -1, 0, 1, 6, 4, 2, 5], [2, 9, 0, 5, 1, 3, 8, 4], [6])
    )
    frequencies = rotary.temporal_frequencies(64)
    return list(ops.attend(q, pages[0], pages[1], slots, positions, query_position, frequencies, return_lse=True))


def run_pack() -> list[Tensor]:
    torch.manual_seed(0)
    results = []
    for bits in (8, 4):
        k, v = torch.randn(2, 2, 2, 3, 49, 64).bfloat16()
        for pool in (k, v):
            pool[1, 0, 2, 40, 7] = torch.nan
        packed = torch.full((ops.packed_bytes(2, 3, 49, 64, bits),), 0xFF, dtype=torch.uint8)
        ops.pack(list(k), list(v), 0, bits, out=packed)
        back = torch.zeros(2, 2, 2, 3, 49, 64).bfloat16()
        ops.unpack(packed, list(back[0]), list(back[1]), 0, bits)
        results += [packed, back.nan_to_num(nan=1e3)]
    return results


SM80 = "cuda/attend_sm80.cuh"
PARTS = "cuda/attend_sm80_parts.cuh"
FAULTS = {
    "insert: no barrier in the sum over the block": (run_insert, "core/reduce.cuh", "__syncthreads();", ""),
    "insert: first rotated pair forgotten": (run_insert, "cuda/insert.cuh", "pair >= 0", "pair > 0"),
    "insert: 16-byte loads of angles wherever they lie": (
        run_insert,
        "cuda/insert.cuh",
        "wide_angles = a.pairs % 2 == 0 && is_aligned(a.rotation)",
        "wide_angles = a.pairs % 2 == 0",
    ),
    "insert: 16-byte loads of weights wherever they lie": (
        run_insert,
        "cuda/insert.cuh",
        "wide_weight = is_aligned(tensor.weight)",
        "wide_weight = true",
    ),
    "retrieve: wrong shuffle": (
        run_retrieve,
        "core/topk.cuh",
        "__shfl_up_sync(kFullMask, entry[r], 1)",
        "__shfl_up_sync(kFullMask, entry[r], 2)",
    ),
    "retrieve: no barrier before lists of other warps are read": (
        run_retrieve,
        "cuda/retrieve.cuh",
        "best.store(shared.lists[warp - half]); __syncthreads();",
        "best.store(shared.lists[warp - half]);",
    ),
    "retrieve: one key beyond the range": (
        run_retrieve,
        "cuda/retrieve.cuh",
        "a.last[sample * a.last_stride], a.count)",
        "a.last[sample * a.last_stride] + 1, a.count)",
    ),
    "retrieve: counters not cleared": (
        run_retrieve,
        "cuda/retrieve.cu",
        "clear(workspace, counter_bytes(a.batch), stream);",
        "",
    ),
    "pack: wrong shuffle": (run_pack, "cuda/pack.cuh", "distance = t.lanes / 2;", "distance = t.lanes / 4;"),
    "pack: one token beyond the frame": (
        run_pack,
        "cuda/pack.cuh",
        "f.tokens - token) : 0",
        "f.tokens - token + 1) : 0",
    ),
    "pack: scales rounded to the nearest": (run_pack, "cuda/pack.cuh", "+ 0xffff) >> 16", "+ 0x7fff) >> 16"),
    "pack: NaN passed over": (run_pack, "cuda/pack.cuh", "if (largest >= 0x7f800000u)", "if (largest == 0x7f800000u)"),
    "pack: bytes behind a layer left as they were": (
        run_pack,
        "cuda/pack.cuh",
        "used + threadIdx.x] = 0;",
        "used] = 0;",
    ),
    "unpack: sign of the codes lost": (run_pack, "cuda/pack.cuh", "static_cast<int32_t>(on_top)", "on_top"),
    "unpack: one scale for eight tokens": (run_pack, "cuda/pack.cuh", "t.scales[first + i]", "t.scales[first]"),
    "attend: no barrier before K is read": (run_attend, SM80, "__syncthreads();  // K is there", "// K is there"),
    "attend: no barrier before V is read": (run_attend, SM80, "__syncthreads();  // V is there", "// V is there"),
    "attend: V not waited for": (
        run_attend,
        SM80,
        "ptx::cp_async_wait<0>(); __syncthreads();  // V is there",
        "__syncthreads();  // V is there",
    ),
    "attend: query rows not waited for": (
        run_attend,
        SM80,
        "__syncwarp();  // the warp's query rows",
        "// the warp's query rows",
    ),
    "attend: wrong shuffle": (
        run_attend,
        "core/reduce.cuh",
        "return fmaxf(value, __shfl_xor_sync(kFullMask, value, 2))",
        "return fmaxf(value, __shfl_xor_sync(kFullMask, value, 4))",
    ),
    "attend: one token beyond the frame": (run_attend, SM80, ">= columns_left", "> columns_left"),
    "attend: query not turned where a part begins": (
        run_attend_cut,
        SM80,
        "tile.token == 0 || steps == shared.work.steps",
        "tile.token == 0",
    ),
    "attend: no barrier before the count of parts is read": (
        run_attend_cut,
        PARTS,
        "__syncthreads();  // the count is there",
        "// the count is there",
    ),
    "attend: counters not cleared": (
        run_attend_cut,
        "cuda/attend.cu",
        "clear(p.arrived, plan.arrived_bytes, stream);",
        ";",
    ),
    "attend: merged by all but the last": (run_attend_cut, PARTS, "work.arrived + 1 <", "work.arrived + 1 >="),
    "attend: two parts in one place": (
        run_attend_cut,
        PARTS,
        "partials[(part * kAttendPartial",
        "partials[(part / 2 * kAttendPartial",
    ),
    "attend: first part not merged": (run_attend_cut, PARTS, "int part = 0; part <", "int part = 1; part <"),
    "attend: parts weighed alike": (
        run_attend_cut,
        PARTS,
        "add[half] = softmax[m][half].weight(maximum, p.scale);",
        "add[half] = 1.0f;",
    ),
}


def agrees(run: Callable[[], list[Tensor]], *edits: emulated.Edit) -> bool:
    """Whether the emulated kernel gives what the reference gives."""
    expected = run()
    with emulated.backend(emulated.build(*edits)) as calls:
        got = run()
    assert calls, "the kernel was not used"
    return all(torch.allclose(g.float(), e.float(), rtol=0, atol=4e-3) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("run", [run_insert, run_retrieve, run_attend, run_attend_cut, run_pack])
def test_right_without_a_fault(run: Callable[[], list[Tensor]], order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMT_ORDER", order)
    assert agrees(run)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, *edit = FAULTS[fault]
    caught = []
    for order in ORDERS:
        monkeypatch.setenv("SIMT_ORDER", order)
        try:
            caught.append(not agrees(run, tuple(edit)))  # type: ignore[arg-type]
        except RuntimeError:  # the emulator found a deadlock, a divergent warp or a store out of bounds
            caught.append(True)
    assert any(caught)
