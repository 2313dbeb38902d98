from __future__ import annotations

import importlib
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longlive_rag import ops

reference = importlib.import_module("longlive_rag.ops.pack")  # ops.pack is the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = [8, 4]
TILE = {8: 24, 4: 16}
LARGEST = {8: 127, 4: 7}
Pools = tuple[list[Tensor], list[Tensor]]


def pools(
    device: torch.device, dtype: torch.dtype, layers: int, slots: int, heads: int, tokens: int, head_dim: int
) -> Pools:
    """Pages whose channels and tokens differ in size, as those of a transformer do."""
    shape = (layers, slots, heads, tokens, head_dim)
    k, v = torch.randn(2, *shape)
    k = k * torch.rand(heads, 1, head_dim).mul(6).exp() / 20
    v = v * torch.rand(heads, tokens, 1).mul(6).exp() / 20
    return list(k.to(device, dtype).unbind()), list(v.to(device, dtype).unbind())


def poisoned(like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.full_like(pool, torch.nan) for pool in like]


def largest_in_group(page: Tensor, bits: int, by_token: bool) -> Tensor:
    """Largest magnitude among the numbers that share a scale with each one, float64 [H, T, D]."""
    size = page.double().cpu().abs()
    if by_token:
        return size.amax(dim=-1, keepdim=True).expand_as(size)
    return torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in size.split(TILE[bits], dim=1)], dim=1)


def check(
    device: torch.device, dtype: torch.dtype, bits: int, shape: tuple[int, int, int, int, int], seed: int
) -> None:
    """There and back: half a step, nothing else written, and bit for bit what the reference gives on the CPU."""
    torch.manual_seed(seed)
    k, v = pools(device, dtype, *shape)
    layers, slots, heads, tokens, head_dim = shape
    slot = int(torch.randint(slots, ()))
    packed = ops.pack(k, v, slot, bits)  # type: ignore[arg-type]
    assert packed.shape == (ops.packed_bytes(layers, heads, tokens, head_dim, bits),)  # type: ignore[arg-type]
    got = poisoned(k), poisoned(v)
    ops.unpack(packed, *got, slot, bits)  # type: ignore[arg-type]

    for half, (before, after) in enumerate(zip((k, v), got, strict=True)):
        for old, new in zip(before, after, strict=True):
            others = [other for other in range(slots) if other != slot]
            assert new[others].isnan().all(), "only the slot's pages are to be written"
            largest = largest_in_group(old[slot], bits, by_token=bits == 8 and half == 1)
            page, back = old[slot].double().cpu(), new[slot].double().cpu()
            # A scale is rounded up to the 8 bits of bfloat16; the last terms are float32 arithmetic and the result's
            # rounding.
            half_step = largest / LARGEST[bits] * (1 + 2**-7) / 2 * (1 + 1e-4) + 2.0**-126
            excess = ((back - page).abs() - half_step - torch.finfo(dtype).eps / 2 * back.abs()).max()
            assert excess <= 0, f"off by {excess:.3g} more than half a step"

    k_cpu, v_cpu = ([pool.cpu() for pool in part] for part in (k, v))
    expected = torch.full_like(packed, 0xFF, device="cpu")
    reference._pack_reference(expected, k_cpu, v_cpu, slot, bits)
    assert torch.equal(packed.cpu(), expected)
    expected_pages = poisoned(k_cpu), poisoned(v_cpu)
    reference._unpack_reference(expected, *expected_pages, slot, bits)
    for part, expected_part in zip(got, expected_pages, strict=True):
        for pool, expected_pool in zip(part, expected_part, strict=True):
            assert torch.equal(pool[slot].cpu(), expected_pool[slot])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 3, 50, 64),  # tail tiles, and padding
        (1, 2, 2, 48, 128),  # whole tiles, as Wan's
        (3, 1, 1, 1, 16),  # one token
        (1, 2, 5, 23, 32),
        (2, 1, 3, 7, 24),  # a head that the kernel does not take
    ],
)
def test_half_a_step(device: torch.device, dtype: torch.dtype, bits: int, shape: tuple[int, ...]) -> None:
    check(device, dtype, bits, shape, seed=0)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 4),
        st.integers(1, 60),
        st.sampled_from([2, 8, 16, 32, 64, 128]),
    ),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    device: torch.device, shape: tuple[int, int, int, int, int], dtype: torch.dtype, bits: int, seed: int
) -> None:
    check(device, dtype, bits, shape, seed)


@pytest.mark.cuda
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 2, 12, 1560, 128), (2, 2, 40, 3600, 128), (1, 1, 24, 880, 128)])
def test_video_sizes(device: torch.device, dtype: torch.dtype, bits: int, shape: tuple[int, ...]) -> None:
    check(device, dtype, bits, shape, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", BITS)
def test_bytes_lie_as_documented(device: torch.device, bits: int) -> None:
    """Decoded number by number from the description in `ops.pack`."""
    layers, heads, tokens, head_dim = 2, 3, 29, 16
    torch.manual_seed(0)
    k, v = pools(device, torch.float32, layers, 1, heads, tokens, head_dim)
    packed = ops.pack(k, v, 0, bits)  # type: ignore[arg-type]
    got = poisoned(k), poisoned(v)
    ops.unpack(packed, *got, 0, bits)  # type: ignore[arg-type]
    tiles, codes = -(-tokens // TILE[bits]), heads * tokens * head_dim * bits // 8
    for layer in range(layers):
        part = packed[ops.layer_slice(layer, heads, tokens, head_dim, bits)].cpu().numpy().tobytes()  # type: ignore[arg-type]
        assert len(part) % 16 == 0

        def scale(place: int, part: bytes = part) -> float:
            return torch.frombuffer(bytearray(part[place : place + 2]), dtype=torch.bfloat16).item()

        used = 0
        for half in range(2):
            begin = 2 * codes + half * heads * tiles * head_dim * 2
            for head in range(heads):
                for token in range(tokens):
                    for dim in range(head_dim):
                        place = (head * tokens + token) * head_dim + dim
                        byte = part[half * codes + place * bits // 8]
                        code = byte if bits == 8 else byte >> 4 if dim % 2 else byte & 15
                        code -= 2**bits if code >= 2 ** (bits - 1) else 0
                        if half == 1 and bits == 8:
                            index = head * tokens + token
                        else:
                            index = (head * tiles + token // TILE[bits]) * head_dim + dim
                        used = max(used, begin + 2 * index + 2)
                        assert got[half][layer][0, head, token, dim].item() == code * scale(begin + 2 * index)
        assert not any(part[used:])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible(device: torch.device, dtype: torch.dtype, bits: int, value: float) -> None:
    """It takes its group with it, and no other."""
    torch.manual_seed(0)
    k, v = pools(device, dtype, 1, 1, 2, 50, 64)
    clean = [page.clone() for page in (k[0], v[0])]
    for page in (k[0], v[0]):
        page[0, 1, 27, 5] = value
    touched = ops.pack(k, v, 0, bits), ops.pack([clean[0]], [clean[1]], 0, bits)  # type: ignore[arg-type]
    pages = [(poisoned(k), poisoned(v)) for _ in touched]
    for packed, (k_back, v_back) in zip(touched, pages, strict=True):
        ops.unpack(packed, k_back, v_back, 0, bits)  # type: ignore[arg-type]
    for half in range(2):
        group = torch.zeros(1, 2, 50, 64, dtype=torch.bool, device=device)
        if half == 1 and bits == 8:
            group[0, 1, 27] = True
        else:
            first = 27 // TILE[bits] * TILE[bits]
            group[0, 1, first : first + TILE[bits], 5] = True
        hurt, whole = (pages[i][half][0] for i in range(2))
        assert torch.equal(hurt.isnan(), group)
        assert torch.equal(hurt[~group], whole[~group])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_the_range(device: torch.device, dtype: torch.dtype, bits: int) -> None:
    """Zeros stay zeros, the smallest numbers do not blow up, the largest ones stay finite."""
    kind = torch.finfo(dtype)
    for value in (0.0, kind.smallest_normal, kind.smallest_normal * kind.eps, kind.max, kind.max * (1 - 2 * kind.eps)):
        page = torch.full((1, 1, 25, 32), value, dtype=dtype, device=device)
        page[..., ::3] *= -1
        k, v = [torch.full_like(page, torch.nan)], [torch.full_like(page, torch.nan)]
        ops.unpack(ops.pack([page], [page], 0, bits), k, v, 0, bits)  # type: ignore[arg-type]
        for back in (k[0], v[0]):
            assert back.isfinite().all()
            error = (back.double() - page.double()).abs().max().item()
            assert error <= value / LARGEST[bits] * (1 + 2**-7) / 2 + kind.eps * value + 2.0**-126


@pytest.mark.parametrize("bits", BITS)
def test_a_layer_alone(device: torch.device, bits: int) -> None:
    """What layer-by-layer transfer does."""
    torch.manual_seed(0)
    k, v = pools(device, torch.bfloat16, 3, 2, 3, 29, 64)
    packed = ops.pack(k, v, 1, bits)  # type: ignore[arg-type]
    together, alone = ((poisoned(k), poisoned(v)) for _ in range(2))
    ops.unpack(packed, *together, 1, bits)  # type: ignore[arg-type]
    for layer in (2, 0, 1):
        part = packed[ops.layer_slice(layer, 3, 29, 64, bits)]  # type: ignore[arg-type]
        assert torch.equal(part, ops.pack([k[layer]], [v[layer]], 1, bits))  # type: ignore[arg-type]
        ops.unpack(part, [alone[0][layer]], [alone[1][layer]], 1, bits)  # type: ignore[arg-type]
    for half in range(2):
        for layer in range(3):
            assert torch.equal(together[half][layer][1], alone[half][layer][1])


@pytest.mark.parametrize("bits", BITS)
def test_more_layers_than_a_launch_takes(device: torch.device, bits: int) -> None:
    check(device, torch.bfloat16, bits, (67, 1, 1, 5, 16), seed=0)


@pytest.mark.parametrize("bits", BITS)
def test_at_any_address(device: torch.device, bits: int) -> None:
    """Bytes and pools that begin inside of a 16-byte word, which the kernel does not take."""
    torch.manual_seed(0)
    k, v = pools(device, torch.bfloat16, 1, 1, 2, 29, 64)
    expected = ops.pack(k, v, 0, bits)  # type: ignore[arg-type]
    out = torch.full((len(expected) + 1,), 0xFF, dtype=torch.uint8, device=device)[1:]
    assert ops.pack(k, v, 0, bits, out=out) is out and torch.equal(out, expected)  # type: ignore[arg-type]
    moved = torch.full((k[0].numel() + 1,), torch.nan, dtype=k[0].dtype, device=device)[1:].view_as(k[0])
    back, v_back = poisoned(k), poisoned(v)
    ops.unpack(expected, back, v_back, 0, bits)  # type: ignore[arg-type]
    ops.unpack(out, [moved], v_back, 0, bits)  # type: ignore[arg-type]
    assert torch.equal(moved, back[0])


@pytest.mark.parametrize("shape", [(1, 1, 0, 4, 64), (1, 1, 2, 0, 64)])
def test_nothing_to_pack(device: torch.device, shape: tuple[int, ...]) -> None:
    k, v = pools(device, torch.bfloat16, *shape)
    packed = ops.pack(k, v, 0, 8)
    assert packed.shape == (0,)
    ops.unpack(packed, k, v, 0, 8)


def test_float64_pages() -> None:
    """They go through float32."""
    check(torch.device("cpu"), torch.float64, 8, (1, 1, 2, 29, 16), seed=0)


def test_pages_beyond_32_bit_offsets(device: torch.device) -> None:
    """A bank of more than 2^31 elements; only the page in use takes up memory on a CPU."""
    heads, tokens, head_dim = 64, 128, 128
    slots = 2**31 // (heads * tokens * head_dim) + 2
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 10 * 2**30:
        pytest.skip("needs 10 GB of free GPU memory")
    try:
        k, v = (torch.empty(slots, heads, tokens, head_dim, dtype=torch.bfloat16, device=device) for _ in "kv")
    except RuntimeError as error:
        pytest.skip(f"needs 9 GB of address space: {error}")
    for pool in (k, v):
        pool[-1] = torch.randn(tokens, head_dim, device=device)
    before = k[-1].clone()
    packed = ops.pack([k], [v], slots - 1, 8)
    k[-1] = torch.nan
    ops.unpack(packed, [k], [v], slots - 1, 8)
    assert (k[-1] - before).abs().max() <= before.abs().max() / 127


@pytest.mark.cuda
@pytest.mark.parametrize("bits", BITS)
def test_the_host_does_not_wait(device: torch.device, bits: int) -> None:
    k, v = pools(device, torch.bfloat16, 3, 2, 2, 48, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.unpack(ops.pack(k, v, 1, bits), k, v, 0, bits)  # type: ignore[arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bytes_of_a_frame() -> None:
    """The figures that the documentation gives: Wan 1.3B at 480 x 832."""
    assert ops.packed_bytes(30, 12, 1560, 128, 8) == 150_883_200
    assert ops.packed_bytes(30, 12, 1560, 128, 4) == 89_948_160
    assert ops.layer_slice(29, 12, 1560, 128, 8).stop == 150_883_200


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="packed_bytes: bits must be 8 or 4, got 16"):
        ops.packed_bytes(1, 1, 1, 16, 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="packed_bytes: head_dim must be even for 4 bits, .*, got 15"):
        ops.packed_bytes(1, 1, 1, 15, 4)
