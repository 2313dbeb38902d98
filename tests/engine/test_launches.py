"""What a block costs beside its passes: launches on the device, and Python in front of each attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longlive_rag import Budget, RetrievalConfig, RetrievalMemory
from longlive_rag.config import Positions
from longlive_rag.embedding import AveragePool

VIEWS = {
    "alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
"""Operations that launch nothing."""
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "promote_types"}
TWICE = {"index", "retrieve"}
"""Operations that convert or copy an argument first: int32 indices to int64, and queries that are not contiguous."""


class Launches(TorchDispatchMode):
    """Names of the operations that would be a kernel or a copy on a GPU.

    Constants are made on the host there, so that what makes them and does no work on the device does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.name().split("::")[1].split(".")[0]
        if name not in VIEWS | ALLOCATIONS:
            self.names += [name] * (2 if name in TWICE else 1)
        return function(*arguments, **(options or {}))


def launches(call: Callable[[], object]) -> list[str]:
    with Launches() as counted:
        call()
    return counted.names


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("positions", "most"), [("relative", 8), ("absolute", 8)])
def test_a_block_begins_and_ends_with_few_launches(positions: Positions, most: int, batch: int) -> None:
    config = RetrievalConfig(positions=positions)
    memory = RetrievalMemory(
        config, batch=batch, layers=2, heads=2, head_dim=8, grid=(2, 2), device="cpu", dtype=torch.float32,
        embedding=AveragePool(), budget=Budget(),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    begun: list[list[str]] = []
    ended: list[list[str]] = []
    for start in range(0, 90, 3):
        latents = torch.randn(batch, 3, 4, 4, 4, generator=generator)
        begun.append(launches(lambda start=start: memory.begin_block(start, 3)))  # type: ignore[misc]
        ended.append(launches(lambda latents=latents: memory.commit(latents)))  # type: ignore[misc]
    assert memory.retrieved[-1].block_start == 87
    # Pools and tables double now and then.
    assert sorted(map(len, begun))[-len(begun) // 4] <= most, begun[-1]
    assert sorted(map(len, ended))[-len(ended) // 4] <= 7, ended[-1]
    assert len(begun[-1]) <= most and len(ended[-1]) <= 7, (begun[-1], ended[-1])
