"""layer: one attention layer of a block, from projected q, k and v to its output, against the naive way to do it."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_rag import RetrievalConfig, RetrievalMemory, rotary
from longlive_rag.bench.common import Case, Machine, Row
from longlive_rag.embedding import AveragePool

# heads, rows and columns of tokens; head_dim 128
CASES = {"Wan 1.3B, 480x832": (12, 30, 52), "Wan 14B, 480x832": (40, 30, 52)}
CPU_CASES = {"2 heads, 4 x 6 tokens": (2, 4, 6)}
HEAD_DIM = 128
START = 30
"""First frame of the measured block: far enough in for the context and its memory to be full."""


def cases(machine: Machine) -> dict[str, Case]:
    return {
        name: partial(measure, machine, name, *sizes) for name, sizes in (CASES if machine.cuda else CPU_CASES).items()
    }


def measure(machine: Machine, case: str, heads: int, height: int, width: int) -> Row:
    dtype = torch.bfloat16 if machine.cuda else torch.float32
    config = RetrievalConfig()
    memory = filled_memory(config, machine, dtype, heads, (height, width))
    window = filled_memory(RetrievalConfig(memory_frames=0), machine, dtype, heads, (height, width))
    naive = NaiveLayer(config, machine, dtype, heads, (height, width))
    frames, tokens = config.block_frames, height * width
    sets = machine.sets(3 * frames * tokens * heads * HEAD_DIM * dtype.itemsize)
    fused = [torch.randn(1, frames, tokens, 3, heads, HEAD_DIM, device=machine.device).to(dtype) for _ in range(sets)]
    weight = torch.ones(heads * HEAD_DIM, device=machine.device, dtype=dtype)

    def attend(engine: RetrievalMemory, index: int) -> object:
        q, k, v = fused[index].unbind(3)
        return engine.attend(0, q, k, v, q_weight=weight, k_weight=weight)

    def attend_naively(index: int) -> object:
        q, k, v = fused[index].unbind(3)
        return naive.attend(q, k, v, weight)

    ours, without_memory = machine.seconds([partial(attend, memory), partial(attend, window)], sets=sets)
    (theirs,) = machine.seconds([attend_naively], sets=min(sets, 4), graph=False)
    work = 4 * frames * tokens * config.context_frames * tokens * heads * HEAD_DIM
    peers: dict[str, float | None] = {"without memory, same context": without_memory, "naive": theirs}
    return Row("layer", case, ours, work / machine.matmul_rate, "matmul rate", peers)


@torch.no_grad()
def filled_memory(
    config: RetrievalConfig, machine: Machine, dtype: torch.dtype, heads: int, grid: tuple[int, int]
) -> RetrievalMemory:
    """A memory of one layer that holds `START` frames and has begun the next block."""
    memory = RetrievalMemory(
        config,
        batch=1,
        layers=1,
        heads=heads,
        head_dim=HEAD_DIM,
        grid=grid,
        device=machine.device,
        dtype=dtype,
        embedding=AveragePool(),
    )
    frames = config.block_frames
    for start in range(0, START + 1, frames):
        memory.begin_block(start, frames)
        if start < START:
            q, k, v = torch.randn(3, 1, frames, grid[0] * grid[1], heads, HEAD_DIM, device=machine.device).to(dtype)
            memory.attend(0, q, k, v)
            memory.commit(torch.randn(1, frames, 16, 2 * grid[0], 2 * grid[1], device=machine.device))
    return memory


class NaiveLayer:
    """The same layer as published code does it: cache cloned and rolled in every call, retrieved frames brought from
    pageable host memory, all keys rotated in float64, everything concatenated.

    Source: the published LongLive-RAG code's steps, as docs/architecture.md counts them.
    """

    def __init__(
        self, config: RetrievalConfig, machine: Machine, dtype: torch.dtype, heads: int, grid: tuple[int, int]
    ) -> None:
        self.config, self.tokens = config, grid[0] * grid[1]
        shape = (1, config.context_frames * self.tokens, heads, HEAD_DIM)
        self.k_cache, self.v_cache = torch.randn(2, *shape, device=machine.device).to(dtype)
        self.evicted = torch.randn(config.memory_frames, 2, 1, self.tokens, heads, HEAD_DIM).to(dtype)
        self.time = rotary.temporal_frequencies(HEAD_DIM, machine.device)
        self.space = rotary.spatial_rotation(*grid, HEAD_DIM, machine.device).double()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        config, device, tokens = self.config, q.device, self.tokens
        q, k = (F.rms_norm(x.flatten(-2), weight.shape, weight, 1e-6).view_as(x).flatten(1, 2) for x in (q, k))
        v = v.flatten(1, 2)
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        sink, block = config.sink_frames * tokens, q.shape[1]
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache[:, sink:-block] = cache[:, sink + block :].clone()
            cache[:, -block:] = new
        memory = [(page[0].to(device), page[1].to(device)) for page in self.evicted]
        local = (config.context_frames - config.sink_frames - config.memory_frames) * tokens
        keys = torch.cat([k_cache[:, :sink], *(page[0] for page in memory), k_cache[:, -local:]], dim=1)
        values = torch.cat([v_cache[:, :sink], *(page[1] for page in memory), v_cache[:, -local:]], dim=1)
        positions = torch.arange(config.context_frames, device=device)
        keys = self._rotate(keys, positions)
        queries = self._rotate(q, positions[-config.block_frames :])
        out = F.scaled_dot_product_attention(queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        self.k_cache, self.v_cache = k_cache, v_cache
        return out.transpose(1, 2)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, frames * T, H, D] by time and space, as complex numbers in float64."""
        angle = positions.double()[:, None] * self.time
        time = torch.polar(torch.ones_like(angle), angle)[:, None].expand(-1, self.tokens, -1)
        space = torch.view_as_complex(self.space)[None].expand(len(positions), -1, -1)
        turn = torch.cat([time, space], dim=-1).flatten(0, 1)[:, None]
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
