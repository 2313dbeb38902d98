from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longlive_rag import ops, rotary
from support.attend_cases import Case, exact, make_case

HALF = [torch.float16, torch.bfloat16]
Same = Callable[[Tensor, Tensor], None]


def naive(case: Case) -> Tensor:
    """What a PyTorch program does at the same precision: gather, rotate keys, concatenate, SDPA."""
    q, k_pages, v_pages, slots, positions, query_position, frequencies = (tensor.cpu() for tensor in case)
    out = torch.empty_like(q)
    tokens = k_pages.shape[2]

    def turned(x: Tensor, position: Tensor) -> Tensor:  # [n, H, T, D] by [n]
        angle = position.double()[:, None] * frequencies
        turn = torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None, None]
        split = [2 * frequencies.shape[0], x.shape[-1] - 2 * frequencies.shape[0]]
        first, rest = x.split(split, dim=-1)
        return torch.cat([rotary.rotate_pairs(first.float(), turn).to(x.dtype), rest], dim=-1)

    for b in range(q.shape[0]):
        used = slots[b] >= 0
        pages = slots[b][used].long()
        keys = turned(k_pages[pages], positions[b][used]).transpose(0, 1).flatten(1, 2)
        values = v_pages[pages].transpose(0, 1).flatten(1, 2)
        queries = turned(q[b].unflatten(0, (-1, tokens)).transpose(1, 2), query_position[b])
        queries = queries.transpose(0, 1).flatten(1, 2)
        out[b] = torch.nn.functional.scaled_dot_product_attention(queries, keys, values).transpose(0, 1)
    return out


def check(case: Case) -> None:
    got, (expected, _) = ops.attend(*case), exact(case)
    assert got.shape == case.q.shape and got.dtype == case.q.dtype and got.is_contiguous()
    error, peer = ((x.double().cpu() - expected).norm() / expected.norm() for x in (got, naive(case)))
    assert error <= 2 * peer, f"relative error {error:.2e}, PyTorch at the same precision {peer:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_matches_float64(device: torch.device, dtype: torch.dtype) -> None:
    check(make_case(device, dtype, batch=2, frames=3, tokens=72, heads=2, head_dim=64, entries=3))


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 130])
def test_frames_of_any_length(device: torch.device, tokens: int) -> None:
    check(make_case(device, torch.bfloat16, frames=2, tokens=tokens, head_dim=128, entries=2))


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [880, 1024, 1560, 3600])
@pytest.mark.parametrize("dtype", HALF)
def test_video_sizes(device: torch.device, tokens: int, dtype: torch.dtype) -> None:
    check(make_case(device, dtype, batch=2, frames=3, tokens=tokens, heads=3, head_dim=128, entries=12))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 3),
    tokens=st.integers(1, 140),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([64, 128]),
    entries=st.integers(1, 3),
    pairs=st.integers(0, 32),
    dtype=st.sampled_from(HALF),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    device: torch.device,
    batch: int,
    frames: int,
    tokens: int,
    heads: int,
    head_dim: int,
    entries: int,
    pairs: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    check(
        make_case(
            device,
            dtype,
            batch=batch,
            frames=frames,
            tokens=tokens,
            heads=heads,
            head_dim=head_dim,
            entries=entries,
            pairs=pairs,
            seed=seed,
        )
    )


def test_log_sum_exp(device: torch.device) -> None:
    case = make_case(device, torch.bfloat16, batch=2, frames=2, tokens=66, heads=2)
    out, lse = ops.attend(*case, return_lse=True)
    assert lse.dtype == torch.float32 and torch.equal(out, ops.attend(*case))
    torch.testing.assert_close(lse.double().cpu(), exact(case)[1], rtol=0, atol=4e-3)


def test_scale(device: torch.device) -> None:
    case = make_case(device, torch.float16)
    got = ops.attend(*case, scale=0.7)
    torch.testing.assert_close(got.double().cpu(), exact(case, 0.7)[0], rtol=0, atol=4e-3)


def test_slots_may_be_anywhere(device: torch.device, assert_same: Same) -> None:
    """The same pages elsewhere in the pool, and more unused entries: the same bits."""
    case = make_case(device, torch.bfloat16, batch=2, tokens=100, entries=3)
    moved = case.with_pages_moved().with_unused_entries(1, 5)
    assert_same(ops.attend(*moved), ops.attend(*case))


def test_pools_at_any_address(device: torch.device) -> None:
    """A contiguous view that begins in the middle of a 16-byte word gives what its copy gives."""
    case = make_case(device, torch.bfloat16)

    def moved(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    away = case._replace(q=moved(case.q), k_pages=moved(case.k_pages), v_pages=moved(case.v_pages))
    assert torch.equal(ops.attend(*away), ops.attend(*case))


def test_repeats_bit_for_bit(device: torch.device) -> None:
    case = make_case(device, torch.bfloat16, frames=2, tokens=100, entries=3)
    assert torch.equal(ops.attend(*case), ops.attend(*case))


def test_a_sample_does_not_depend_on_its_batch(device: torch.device, assert_same: Same) -> None:
    case = make_case(device, torch.float16, batch=3, tokens=100, heads=2)
    together = ops.attend(*case)
    for b in range(3):
        assert_same(ops.attend(*case.sample(b)), together[b : b + 1])


def test_without_pages(device: torch.device) -> None:
    case = make_case(device, torch.bfloat16, batch=2)
    case.slots[0] = -1
    out, lse = ops.attend(*case, return_lse=True)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert torch.equal(out[1:], ops.attend(*case)[1:]) and out[1].isfinite().all() and lse[1].isfinite().all()
    empty = case._replace(slots=case.slots[:, :0], positions=case.positions[:, :0])
    assert (ops.attend(*empty) == 0).all()


@pytest.mark.parametrize("tokens", [24, 80])
def test_without_a_pool(device: torch.device, tokens: int) -> None:
    """No pages are no entries, whatever the table says."""
    case = make_case(device, torch.bfloat16, tokens=tokens)
    case = case._replace(k_pages=case.k_pages[:0], v_pages=case.v_pages[:0])
    out, lse = ops.attend(*case, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("tokens", [24, 80])
@pytest.mark.parametrize("empty", [{"batch": 0}, {"frames": 0}, {"heads": 0}])
def test_without_queries(device: torch.device, empty: dict[str, int], tokens: int) -> None:
    case = make_case(device, torch.bfloat16, tokens=tokens, **empty)
    out, lse = ops.attend(*case, return_lse=True)
    assert out.shape == case.q.shape and out.numel() == 0 and lse.shape == case.q.shape[:3]


def test_large_scores(device: torch.device) -> None:
    """Scores in the thousands, where a softmax that did not take the maximum off would overflow."""
    case = make_case(device, torch.bfloat16, tokens=70, entries=2)
    case = case._replace(q=case.q * 300)
    got, (expected, _) = ops.attend(*case), exact(case)
    assert (got.double().cpu() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("tokens", [3, 72])
@pytest.mark.parametrize("spare", [0, 2])
def test_a_nan_stays_one(device: torch.device, tokens: int, spare: int) -> None:
    """In a query row: its output and log-sum-exp are NaN, not those of an empty row; others do not change."""
    case = make_case(device, torch.bfloat16, frames=2, tokens=tokens, heads=2, spare=spare)
    whole, whole_lse = ops.attend(*case, return_lse=True)
    case.q[0, 5, 1, 3] = torch.nan
    out, lse = ops.attend(*case, return_lse=True)
    assert out[0, 5, 1].isnan().all() and lse[0, 5, 1].isnan()
    whole[0, 5, 1], whole_lse[0, 5, 1] = torch.nan, torch.nan
    torch.testing.assert_close(out, whole, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=0, equal_nan=True)


def test_the_cost_does_not_grow_with_the_memory() -> None:
    """What a call takes from the allocator, a copy of the pool included, on the path without kernels of ours."""
    taken = []
    for slots in (64, 4096):
        case = make_case(torch.device("cpu"), torch.float32, batch=2, tokens=4, heads=3, head_dim=16, entries=3)
        pools = [pages.new_zeros(slots, *pages.shape[1:]) for pages in (case.k_pages, case.v_pages)]
        case = case._replace(k_pages=pools[0], v_pages=pools[1], slots=case.slots.clamp(max=63))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
            ops.attend(*case)
        taken.append(sum(max(0, event.self_cpu_memory_usage) for event in profiled.key_averages()))
    assert 0 < taken[1] <= 1.1 * taken[0]


def test_positions_an_hour_in(device: torch.device) -> None:
    """Only the difference of positions counts, also where float32 angles would have lost a milliradian."""
    case = make_case(device, torch.float16, tokens=80, entries=2, pairs=8)
    later = case._replace(positions=case.positions + 14400, query_position=case.query_position + 14400)
    assert torch.equal(ops.attend(*later), ops.attend(*case))
    far = case._replace(query_position=case.query_position + 14400)
    check(far)


def test_pages_beyond_32_bit_offsets(device: torch.device) -> None:
    heads, tokens, head_dim = 2, 64, 128
    pool = 2**31 // (heads * tokens * head_dim) + 2
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 10 * 2**30:
        pytest.skip("needs 10 GB of free GPU memory")
    try:
        pages = [torch.empty(pool, heads, tokens, head_dim, dtype=torch.bfloat16, device=device) for _ in "kv"]
    except RuntimeError as error:
        pytest.skip(f"needs 9 GB of address space: {error}")
    k_pages, v_pages = pages
    k_pages[-1], v_pages[-1] = 0, torch.arange(heads, device=device)[:, None, None]
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    out = ops.attend(
        torch.zeros(1, tokens, heads, head_dim, dtype=torch.bfloat16, device=device),
        k_pages,
        v_pages,
        torch.full((1, 1), pool - 1, **ints),
        torch.zeros(1, 1, **ints),
        torch.zeros(1, 1, **ints),
        torch.zeros(0, dtype=torch.float64, device=device),
    )
    assert torch.equal(out[0, :, :, 0].cpu(), torch.arange(heads).bfloat16().expand(tokens, -1))
