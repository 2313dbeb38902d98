from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longlive_rag import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Float32 sums of up to 4096 products of unit vectors.
TOLERANCE = 2e-6


def stored(device: torch.device, dtype: torch.dtype, batch: int, count: int, width: int) -> tuple[Tensor, Tensor]:
    """Random keys of random lengths, and their inverse norms, as the index keeps them."""
    keys = (torch.randn(batch, count, width) * (0.5 + torch.rand(batch, count, 1))).to(device, dtype)
    return keys, 1 / keys.float().norm(dim=-1)


def cosine(query: Tensor, keys: Tensor) -> Tensor:
    return torch.cosine_similarity(query.double().cpu()[:, None], keys.double().cpu(), dim=-1)


def check(query: Tensor, keys: Tensor, inverse_norms: Tensor, first: object, last: object, k: int) -> None:
    indices, similarity = ops.retrieve(query, keys, inverse_norms, first, last, k)  # type: ignore[arg-type]
    batch, count, _ = keys.shape
    assert indices.shape == similarity.shape == (batch, k)
    assert indices.dtype == torch.int32 and similarity.dtype == torch.float32
    exact = cosine(query, keys)
    for b in range(batch):
        low, high = (int(x[b] if isinstance(x, Tensor) and x.ndim else x) for x in (first, last))  # type: ignore
        candidates = range(max(low, 0), min(high, count))
        found = min(k, len(candidates))
        chosen = indices[b].tolist()
        assert chosen[found:] == [-1] * (k - found) and (similarity[b, found:] == -torch.inf).all()
        assert len(set(chosen[:found])) == found and all(index in candidates for index in chosen[:found])
        values = similarity[b, :found].double().cpu()
        assert (values.diff() <= 0).all()
        best = exact[b, candidates.start : candidates.stop].sort(descending=True).values[:found]
        torch.testing.assert_close(values, best, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(exact[b, chosen[:found]], best, rtol=0, atol=2 * TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "count", "width", "k"),
    [(1, 100, 16, 6), (2, 33, 8, 1), (1, 300, 1024, 6), (1, 40, 4096, 33), (3, 200, 72, 64)],
)
def test_matches_float64(device: torch.device, dtype: torch.dtype, batch: int, count: int, width: int, k: int) -> None:
    torch.manual_seed(0)
    keys, inverse_norms = stored(device, dtype, batch, count, width)
    check(torch.randn(batch, width).to(device, dtype), keys, inverse_norms, 0, count, k)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    count=st.integers(0, 150),
    eighths=st.integers(1, 12),
    k=st.integers(1, 64),
    bounds=st.tuples(st.integers(-5, 160), st.integers(-5, 160)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_range(
    device: torch.device,
    batch: int,
    count: int,
    eighths: int,
    k: int,
    bounds: tuple[int, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    keys, inverse_norms = stored(device, dtype, batch, count, 8 * eighths)
    check(torch.randn(batch, 8 * eighths).to(device, dtype), keys, inverse_norms, *bounds, k)


def test_range_on_the_device(device: torch.device) -> None:
    torch.manual_seed(0)
    keys, inverse_norms = stored(device, torch.float32, 3, 50, 16)
    query = torch.randn(3, 16, device=device)
    first = torch.tensor([0, 10, 45], dtype=torch.int32, device=device)
    last = torch.tensor(48, dtype=torch.int32, device=device)
    check(query, keys, inverse_norms, first, last, 5)


def test_ties_go_to_the_lower_index(device: torch.device) -> None:
    torch.manual_seed(0)
    # Small integers and a power of two for the length of the best: sums are exact, so in any order the same. A matrix
    # product of PyTorch's need not treat all of its rows alike.
    keys = torch.randint(-8, 9, (1, 300, 64)).float().to(device)
    same = [7, 31, 32, 33, 150, 200, 299]
    keys[0, same] = torch.randint(0, 2, (64,)).mul(2).sub(1).float().to(device)
    inverse_norms = 1 / keys.norm(dim=-1)
    indices, similarity = ops.retrieve(keys[:, 200], keys, inverse_norms, 0, 300, 6)
    assert indices[0].tolist() == [7, 31, 32, 33, 150, 200]
    assert similarity[0].unique().numel() == 1


def test_zeros_of_either_sign_are_equal(device: torch.device) -> None:
    keys = torch.zeros(1, 4, 8, device=device)
    keys[0, :, 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    query = torch.zeros(1, 8, device=device)
    query[0, 1] = 1.0
    indices, _ = ops.retrieve(query, keys, torch.ones(1, 4, device=device), 0, 4, 4)
    assert indices[0].tolist() == [0, 1, 2, 3]


def test_nan_is_never_selected(device: torch.device) -> None:
    torch.manual_seed(0)
    keys, inverse_norms = stored(device, torch.bfloat16, 1, 20, 32)
    keys[0, 3] = torch.nan
    inverse_norms[0, 5] = torch.nan
    indices, similarity = ops.retrieve(keys[:, 4], keys, inverse_norms, 0, 20, 20)
    assert set(indices[0].tolist()) == {-1, *range(20)} - {3, 5}
    assert not similarity.isnan().any() and indices[0, 18:].tolist() == [-1, -1]


def test_repeats_bit_for_bit(device: torch.device) -> None:
    """Also after searches of other sizes, which leave whatever they need between launches as they found it."""
    torch.manual_seed(0)
    keys, inverse_norms = stored(device, torch.bfloat16, 2, 500, 64)
    query = torch.randn(2, 64).to(device, torch.bfloat16)
    once = ops.retrieve(query, keys, inverse_norms, 3, 480, 40)
    for count, k in ((40, 3), (500, 64), (0, 1)):
        ops.retrieve(query, keys[:, :count], inverse_norms[:, :count], 0, count, k)
    again = ops.retrieve(query, keys, inverse_norms, 3, 480, 40)
    assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])


def test_a_sample_does_not_depend_on_its_batch(
    device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    torch.manual_seed(0)
    keys, inverse_norms = stored(device, torch.float32, 5, 90, 24)
    query = torch.randn(5, 24, device=device)
    indices, similarity = ops.retrieve(query, keys, inverse_norms, 0, 90, 6)
    for b in range(5):
        one = slice(b, b + 1)
        alone = ops.retrieve(query[one], keys[one], inverse_norms[one], 0, 90, 6)
        assert torch.equal(alone[0], indices[one])  # neighbours are 1e-3 apart
        assert_same(alone[1], similarity[one])


def test_views_need_no_copy(device: torch.device) -> None:
    """The filled part of a larger store, and keys in the middle of wider rows, at any address."""
    torch.manual_seed(0)
    store, _ = stored(device, torch.float32, 2, 60, 41)
    for part in (store[:, :37, :16], store[:, :37, 1:17], store[:, ::3, 8:24]):
        norms = 1 / part.norm(dim=-1)
        check(torch.randn(2, 16, device=device), part, norms, 0, part.shape[1], 4)


def test_keys_with_gaps_in_their_rows(device: torch.device) -> None:
    torch.manual_seed(0)
    store, _ = stored(device, torch.float32, 2, 40, 32)
    keys = store[..., ::2]
    check(torch.randn(2, 16, device=device), keys, 1 / keys.norm(dim=-1), 0, 40, 4)


@pytest.mark.cuda
def test_a_million_keys(device: torch.device) -> None:
    torch.manual_seed(0)
    keys = torch.randn(1, 2_200_000, 1024, dtype=torch.bfloat16, device=device)  # more than 2^31 elements
    inverse_norms = 1 / keys.norm(dim=-1, dtype=torch.float32)
    planted = [5, 1_000_000, 2_199_999]
    for i, index in enumerate(planted):
        keys[0, index] = keys[0, 77] * (1 + i)
        inverse_norms[0, index] = 1 / keys[0, index].float().norm()
    indices, similarity = ops.retrieve(keys[:, 77], keys, inverse_norms, 0, keys.shape[1], 4)
    assert set(indices[0].tolist()) == {77, *planted}
    torch.testing.assert_close(similarity, torch.ones(1, 4, device=device), rtol=0, atol=TOLERANCE)
