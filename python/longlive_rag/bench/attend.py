"""attend: attention over gathered pages, against attention kernels that find keys gathered and rotated beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlive_rag import ops, rotary
from longlive_rag.bench.common import Call, Case, Machine, Row
from longlive_rag.ops._attend_arguments import Arguments

PEERS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
CPU_PEERS = {"SDPA": SDPBackend.MATH}
SPARE_PAGES = 4


@dataclass(frozen=True)
class Sizes:
    """A call of `ops.attend`.

    Attributes:
        heads, head_dim: of the model.
        tokens: of a latent frame.
        frames: of the block.
        entries: pages in the context.
        batch: videos.
        goal_rate: multiplications and additions per second to reach on Hopper.
        goal_ratio: the best peer's time to ours, to reach on Hopper.
    """

    heads: int
    head_dim: int
    tokens: int
    frames: int
    entries: int
    batch: int = 1
    goal_rate: float | None = None
    goal_ratio: float = 1.0

    def __str__(self) -> str:
        query = f"{self.batch} x {self.frames} x {self.tokens}"
        return f"{query}, {self.entries} pages, {self.heads} heads of {self.head_dim}"

    @property
    def work(self) -> int:
        """Multiplications and additions."""
        return 4 * self.batch * self.frames * self.entries * self.tokens**2 * self.heads * self.head_dim


WAN_1_3B = Sizes(12, 128, 1560, 3, 12, goal_rate=640e12, goal_ratio=1.1)
WAN_14B = Sizes(40, 128, 1560, 3, 12, goal_rate=660e12, goal_ratio=1.05)
CASES = {
    "Wan 1.3B, 480x832": WAN_1_3B,
    "Wan 14B, 480x832": WAN_14B,
    "Wan 1.3B, 720x1280": Sizes(12, 128, 3600, 3, 12),
    "Wan 1.3B, 480x832, context 21": Sizes(12, 128, 1560, 3, 21),
    "head_dim 64, 1024 tokens": Sizes(12, 64, 1024, 3, 12),
}
CPU_CASES = {"2 heads, 96 tokens": Sizes(2, 128, 96, 3, 12)}


def cases(machine: Machine) -> dict[str, Case]:
    return {
        name: partial(measure, machine, name, sizes) for name, sizes in (CASES if machine.cuda else CPU_CASES).items()
    }


def measure(machine: Machine, case: str, sizes: Sizes) -> Row:
    """`ops.attend` beside the peers that run here."""
    data = data_sets(machine, sizes)
    gathered = [_gather(arguments) for arguments in data]
    peers = {
        name: call
        for name, backend in (PEERS if machine.cuda else CPU_PEERS).items()
        if _runs(call := partial(_attend_gathered, backend, gathered))
    }

    def ours(index: int) -> object:
        return ops.attend(*data[index])

    mine, *theirs = machine.seconds([ours, *peers.values()], sets=len(data))
    times: dict[str, float | None] = dict.fromkeys(PEERS if machine.cuda else CPU_PEERS)
    times.update(zip(peers, theirs, strict=True))
    return Row(
        "attend",
        f"{case}: {sizes.work / mine / 1e12:.3g} TFLOP/s",
        mine,
        sizes.work / machine.matmul_rate,
        "matmul rate",
        times,
        _goal(sizes, theirs) if machine.hopper else None,
    )


def data_sets(machine: Machine, sizes: Sizes) -> list[Arguments]:
    """Random arguments, together larger than the L2 cache; bfloat16 on a GPU, float32 elsewhere."""
    dtype = torch.bfloat16 if machine.cuda else torch.float32
    page_bytes = 2 * sizes.heads * sizes.tokens * sizes.head_dim * dtype.itemsize
    sets = machine.sets(sizes.batch * sizes.entries * page_bytes)
    return [random_arguments(sizes, dtype, machine.device) for _ in range(sets)]


def random_arguments(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Arguments:
    """Random queries, and pages in random slots of pools that have some more."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    used = sizes.batch * sizes.entries
    pool = (used + SPARE_PAGES, sizes.heads, sizes.tokens, sizes.head_dim)
    slots = torch.randperm(used + SPARE_PAGES, device=device)[:used].view(sizes.batch, sizes.entries)
    positions = torch.arange(sizes.entries, device=device, dtype=torch.int32).repeat(sizes.batch, 1)
    return Arguments(
        torch.randn(sizes.batch, sizes.frames * sizes.tokens, sizes.heads, sizes.head_dim, **like),
        torch.randn(pool, **like),
        torch.randn(pool, **like),
        slots.int(),
        positions,
        positions[:, :1] + torch.arange(sizes.frames, device=device, dtype=torch.int32) + sizes.entries - sizes.frames,
        rotary.temporal_frequencies(sizes.head_dim, device),
    )


def _gather(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The peers' q, k and v, laid out as they like them: [B, H, L, D], contiguous.

    The keys stay as they are stored, since turning them would not change the peers' time.
    """
    slots = arguments.slots.long()
    k, v = (pool[slots].transpose(1, 2).flatten(2, 3) for pool in (arguments.k_pages, arguments.v_pages))
    return arguments.q.transpose(1, 2).contiguous(), k.contiguous(), v.contiguous()


def _attend_gathered(backend: SDPBackend, gathered: list[tuple[Tensor, Tensor, Tensor]], index: int) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*gathered[index])


def _runs(peer: Call) -> bool:
    """Whether this torch has the backend for this GPU."""
    try:
        peer(0)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def _goal(sizes: Sizes, peers: list[float]) -> float | None:
    """The time that reaches both the rate and the ratio; None without either."""
    times = [min(peers) / sizes.goal_ratio] if peers else []
    if sizes.goal_rate is not None:
        times.append(sizes.work / sizes.goal_rate)
    return min(times, default=None)
