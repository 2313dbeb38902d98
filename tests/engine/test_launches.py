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
from longlive_rag.models import CausalWanModel

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
    assert sorted(map(len, ended))[-len(ended) // 4] <= 5, ended[-1]
    assert len(begun[-1]) <= most and len(ended[-1]) <= 5, (begun[-1], ended[-1])


RMS_NORM = ["pow", "mean", "add_", "rsqrt", "mul", "mul"]
"""How a CPU computes `rms_norm`, which newer versions of torch do in one kernel on a GPU (`_fused_rms_norm`)."""
WAITS = {"_local_scalar_dense", "is_nonzero", "item", "masked_select", "nonzero"}
"""Operations whose result, or its size, the host waits for."""


def on_a_gpu(names: list[str]) -> list[str]:
    joined = " ".join(names).replace(" ".join(RMS_NORM), "rms_norm")
    return joined.split()


@torch.no_grad()
def test_a_pass_has_few_launches_and_waits_for_none() -> None:
    """Without compilation. Of a layer: 3 norms of 1 launch, 1 of the prompt's queries, 4 of modulation and gates, 6
    products and a GELU, 2 attentions, insert, and a sum."""
    torch.manual_seed(0)
    counted = {}
    for layers in (1, 2):
        model = CausalWanModel(
            dim=32, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=layers, in_dim=4,
            out_dim=4,
        ).eval()  # fmt: skip
        model.fuse()
        latents, timestep = torch.randn(1, 3, 4, 4, 4), torch.full((1, 3), 500.0)
        memory = RetrievalMemory.for_model(model, latents.shape, RetrievalConfig(), embedding=AveragePool())
        prompt = model.prepare_prompt(torch.randn(1, 4, 8))
        memory.begin_block(0, 3)
        names = launches(lambda: model(latents, timestep, prompt, memory))  # noqa: B023  (called at once)
        assert not WAITS & {*names}
        counted[layers] = on_a_gpu(names)
    assert len(counted[2]) - len(counted[1]) <= 19, counted[2]
    assert 2 * len(counted[1]) - len(counted[2]) <= 25, counted[1]
