"""attend: attention over gathered pages, against attention kernels that find keys gathered and rotated beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlive_rag import ops, rotary
from longlive_rag.bench.common import Call, Machine, Row

# heads, head_dim, tokens of a frame, frames of the block, frames of the context
CASES = {
    "Wan 1.3B, 480x832": (12, 128, 1560, 3, 12),
    "Wan 14B, 480x832": (40, 128, 1560, 3, 12),
    "Wan 1.3B, 720x1280": (12, 128, 3600, 3, 12),
    "Wan 1.3B, 480x832, context 21": (12, 128, 1560, 3, 21),
    "head_dim 64, 1024 tokens": (12, 64, 1024, 3, 12),
}
CPU_CASES = {"2 heads, 96 tokens": (2, 128, 96, 3, 12)}
PEERS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


def rows(machine: Machine) -> Iterator[Row]:
    for case, (heads, head_dim, tokens, frames, context) in (CASES if machine.cuda else CPU_CASES).items():
        dtype = torch.bfloat16 if machine.cuda else torch.float32
        like: dict[str, Any] = {"device": machine.device, "dtype": dtype}
        ints: dict[str, Any] = {"device": machine.device, "dtype": torch.int32}
        sets = machine.sets(2 * context * heads * tokens * head_dim * dtype.itemsize)
        q = torch.randn(1, frames * tokens, heads, head_dim, **like)
        pools = [torch.randn(2, context + 4, heads, tokens, head_dim, **like) for _ in range(sets)]
        slots = torch.randperm(context + 4)[:context].to(**ints)[None]
        positions = torch.arange(context, **ints)[None]
        query_position = torch.arange(context - frames, context, **ints)[None]
        frequencies = rotary.temporal_frequencies(head_dim, machine.device)

        def ours(
            index: int,
            q: Tensor = q,
            pools: list[Tensor] = pools,
            tables: tuple[Tensor, ...] = (slots, positions, query_position, frequencies),
        ) -> object:
            return ops.attend(q, *pools[index], *tables)

        # The peers' queries and keys are laid out as they like them: [B, H, L, D], contiguous.
        query = q.transpose(1, 2).contiguous()
        gathered = [pool[:, slots[0].long()].transpose(1, 2).flatten(2, 3)[:, None].contiguous() for pool in pools]
        peers: dict[str, Call] = {}
        for name, backend in PEERS.items() if machine.cuda else [("SDPA", SDPBackend.MATH)]:

            def peer(
                index: int,
                backend: SDPBackend = backend,
                query: Tensor = query,
                gathered: list[Tensor] = gathered,
            ) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(query, *gathered[index])

            if _runs(peer):
                peers[name] = peer
        work = 4 * frames * tokens * context * tokens * heads * head_dim
        mine, *theirs = machine.seconds([ours, *peers.values()], sets=sets)
        times: dict[str, float | None] = dict.fromkeys(PEERS if machine.cuda else [])
        times.update(zip(peers, theirs, strict=True))
        limit = work / machine.matmul_rate
        yield Row("attend", f"{case}: {work / mine / 1e12:.3g} TFLOP/s", mine, limit, "matmul rate", times)


def _runs(peer: Call) -> bool:
    """Whether this torch has the backend for this GPU."""
    try:
        peer(0)
    except RuntimeError:
        return False
    return True
