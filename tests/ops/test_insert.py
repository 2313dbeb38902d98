from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longlive_rag import ops

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def exact(x: Tensor, weight: Tensor | None, rotation: Tensor, eps: float = EPS) -> Tensor:
    """RMS norm over H * D and the rotation of the last pairs as complex numbers, in float64: [B, F, T, H, D]."""
    x = x.double().cpu()
    if weight is not None:
        x = x / (x.square().mean(dim=(-2, -1), keepdim=True) + eps).sqrt() * weight.double().cpu().view(x.shape[-2:])
    turn = torch.view_as_complex(rotation.double().cpu())[:, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    still = pairs.shape[-1] - turn.shape[-1]
    pairs = torch.cat([pairs[..., :still], pairs[..., still:] * turn], dim=-1)
    return torch.view_as_real(pairs).flatten(-2)


def rotation_table(tokens: int, pairs: int) -> Tensor:
    angle = torch.rand(tokens, pairs, dtype=torch.float64) * 100
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """One rounding to the result's dtype on top of float32 arithmetic, whose error goes with the pair's length."""
    got, kind = got.double().cpu(), torch.finfo(got.dtype)
    pair = expected.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)
    bound = kind.eps / 2 * expected.abs() + kind.smallest_normal * kind.eps + 1e-6 * pair
    excess = ((got - expected).abs() / bound).max()
    assert excess <= 1, f"off by {excess:.2f} times what rounding explains"


def check(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    pairs: int,
    float_weight: bool = True,
    seed: int = 0,
) -> None:
    """Insert a fused projection's slices into permuted slots and compare everything there is to see."""
    torch.manual_seed(seed)
    batch, frames, tokens, heads, head_dim = shape
    fused = torch.randn(batch, frames, tokens, 3, heads, head_dim).to(device, dtype)
    q, k, v = fused.unbind(3)
    weights = torch.rand(2, heads * head_dim).add(0.5).to(device, torch.float32 if float_weight else dtype)
    rotation = rotation_table(tokens, pairs)
    pool = batch * frames + 2
    k_pages, v_pages = (poisoned(pool, heads, tokens, head_dim, dtype=dtype, device=device) for _ in "kv")
    slots = torch.randperm(pool, dtype=torch.int32)[: batch * frames].view(batch, frames)
    slots[-1, -1] = -1
    out = ops.insert(
        k, v, weights[0], rotation.to(device), k_pages, v_pages, slots.to(device), EPS, q=q, q_weight=weights[1]
    )

    assert out is not None and out.shape == (batch, frames * tokens, heads, head_dim) and out.is_contiguous()
    assert_close(out, exact(q, weights[1], rotation).flatten(1, 2))
    expected_k = exact(k, weights[0], rotation)
    written = set()
    for b in range(batch):
        for f in range(frames):
            slot = int(slots[b, f])
            if slot >= 0:
                written.add(slot)
                assert_close(k_pages[slot], expected_k[b, f].transpose(0, 1))
                assert torch.equal(v_pages[slot], v[b, f].transpose(0, 1)), "values are copied bit for bit"
    for slot in set(range(pool)) - written:
        assert k_pages[slot].isnan().all() and v_pages[slot].isnan().all(), f"page {slot} was not to be written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "pairs"),
    [
        ((1, 3, 15, 2, 128), 42),  # Wan's 21 + 21 spatial pairs
        ((2, 2, 5, 3, 64), 20),
        ((1, 1, 3, 12, 128), 42),  # a row of Wan 1.3B
        ((1, 1, 2, 40, 128), 42),  # and of Wan 14B: more than one vector a thread in float32
        ((1, 1, 1, 128, 128), 42),  # the widest row
        ((1, 2, 7, 1, 8), 4),  # all pairs rotated
        ((1, 1, 3, 5, 24), 0),  # none
    ],
)
def test_matches_float64(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], pairs: int) -> None:
    check(device, dtype, shape, pairs)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 6)),
    eighth=st.integers(1, 20),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    float_weight=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    device: torch.device, shape: tuple[int, ...], eighth: int, data: st.DataObject, dtype: torch.dtype,
    float_weight: bool, seed: int,
) -> None:  # fmt: skip
    pairs = data.draw(st.integers(0, 4 * eighth), label="pairs")
    check(device, dtype, (*shape, 8 * eighth), pairs, float_weight, seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [1, 8])
def test_rows_at_any_address(device: torch.device, offset: int) -> None:
    """A view that begins in the middle of a 16-byte word, or in the middle of a row, gives what its copy gives."""
    torch.manual_seed(0)
    k = torch.randn(1, 1, 4, 1 * 64 + offset).to(device, torch.bfloat16)[..., offset:].unflatten(-1, (1, 64))
    rotation, slots = rotation_table(4, 20).to(device), torch.zeros(1, 1, dtype=torch.int32, device=device)
    pages = [poisoned(1, 1, 4, 64, dtype=k.dtype, device=device) for _ in range(4)]
    ops.insert(k, k, None, rotation, pages[0], pages[1], slots)
    copy = k.clone(memory_format=torch.contiguous_format)
    ops.insert(copy, copy, None, rotation, pages[2], pages[3], slots)
    assert torch.equal(pages[0], pages[2]) and torch.equal(pages[1], pages[3])


def test_pools_at_any_address(device: torch.device) -> None:
    torch.manual_seed(0)
    k = torch.randn(1, 1, 4, 1, 64).to(device, torch.bfloat16)
    rotation, slots = rotation_table(4, 20).to(device), torch.zeros(1, 1, dtype=torch.int32, device=device)
    pages = poisoned(2, 1, 1, 4, 64, dtype=k.dtype, device=device)
    ops.insert(k, k, None, rotation, pages[0], pages[1], slots)
    moved = poisoned(2 * 4 * 64 + 1, dtype=k.dtype, device=device)[1:].view_as(pages)
    ops.insert(k, k, None, rotation, moved[0], moved[1], slots)
    assert torch.equal(moved, pages)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [19, 20])
def test_weight_and_rotation_at_any_address(device: torch.device, dtype: torch.dtype, pairs: int) -> None:
    """Views that begin in the middle of a 16-byte word give what their copies give."""
    torch.manual_seed(2)
    k = torch.randn(1, 1, 3, 2, 64).to(device, dtype)
    slots = torch.zeros(1, 1, dtype=torch.int32, device=device)
    weight, rotation = torch.rand(128).to(device, dtype), rotation_table(3, pairs).to(device)
    pages = [poisoned(1, 2, 3, 64, dtype=dtype, device=device) for _ in range(4)]
    ops.insert(k, k, weight, rotation, pages[0], pages[1], slots)
    weight, rotation = (torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in (weight, rotation))
    ops.insert(k, k, weight, rotation, pages[2], pages[3], slots)
    assert torch.equal(pages[0], pages[2])


@pytest.mark.parametrize("shape", [(0, 1, 4, 2, 64), (1, 0, 4, 2, 64), (1, 1, 4, 0, 64)])
def test_nothing_to_insert(device: torch.device, shape: tuple[int, ...]) -> None:
    batch, frames, tokens, heads, head_dim = shape
    k = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    pages = poisoned(2, 1, heads, tokens, head_dim, dtype=k.dtype, device=device)
    slots = torch.zeros(batch, frames, dtype=torch.int32, device=device)
    out = ops.insert(k, k, None, torch.zeros(tokens, 0, 2, device=device), pages[0], pages[1], slots, q=k)
    assert out is not None and out.shape == (batch, frames * tokens, heads, head_dim) and pages.isnan().all()


def test_heads_of_no_dimension(device: torch.device) -> None:
    """The operation itself, whose caller checks strides that such a tensor has not."""
    k = torch.zeros(1, 1, 4, 2, 0, dtype=torch.bfloat16, device=device)
    pages = torch.zeros(2, 1, 2, 4, 0, dtype=k.dtype, device=device)
    slots = torch.zeros(1, 1, dtype=torch.int32, device=device)
    rotation = torch.zeros(4, 0, 2, device=device)
    out = torch.ops.longlive_rag.insert(k, k, None, rotation, pages[0], pages[1], slots, EPS, k, None)
    assert out.shape == (1, 4, 2, 0)


def test_a_frame_does_not_depend_on_its_batch(
    device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    torch.manual_seed(1)
    k = torch.randn(3, 2, 6, 4, 64).to(device, torch.bfloat16)
    weight, rotation = torch.rand(256, device=device), rotation_table(6, 20).to(device)
    slots = torch.arange(6, dtype=torch.int32, device=device).view(3, 2)
    together, alone = ([poisoned(6, 4, 6, 64, dtype=k.dtype, device=device) for _ in "kv"] for _ in range(2))
    ops.insert(k, k, weight, rotation, together[0], together[1], slots)
    for b in range(3):
        for f in range(2):
            frame = k[b : b + 1, f : f + 1]
            ops.insert(frame, frame, weight, rotation, alone[0], alone[1], slots[b : b + 1, f : f + 1])
    assert_same(together[0], alone[0])
    assert torch.equal(together[1], alone[1])


def test_pages_beyond_32_bit_offsets(device: torch.device) -> None:
    """A bank of more than 2^31 elements; only the pages written take up memory on a CPU."""
    heads, tokens, head_dim = 64, 128, 128
    pool = 2**31 // (heads * tokens * head_dim) + 2
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 10 * 2**30:
        pytest.skip("needs 10 GB of free GPU memory")
    try:
        pages = [torch.empty(pool, heads, tokens, head_dim, dtype=torch.bfloat16, device=device) for _ in "kv"]
    except RuntimeError as error:
        pytest.skip(f"needs 9 GB of address space: {error}")
    k_pages, v_pages = pages
    k = torch.randn(1, 1, tokens, heads, head_dim).to(device, torch.bfloat16)
    slots = torch.full((1, 1), pool - 1, dtype=torch.int32, device=device)
    ops.insert(k, k, None, torch.empty(tokens, 0, 2, device=device), k_pages, v_pages, slots)
    assert torch.equal(k_pages[-1], k[0, 0].transpose(0, 1)) and torch.equal(v_pages[-1], k[0, 0].transpose(0, 1))
