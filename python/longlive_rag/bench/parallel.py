"""parallel: one layer of a block on several ranks, with its exchange and its attention, beside the share of one rank.

On GPUs each rank has its own, with NCCL. On a CPU the ranks are processes with gloo that share its cores: what they
take says that the shares have the right shape, and nothing about scaling.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from longlive_rag import RetrievalConfig
from longlive_rag.bench.common import REPLAYS, Case, Machine, Row
from longlive_rag.bench.layer import HEAD_DIM, filled_memory
from longlive_rag.budget import format_bytes
from longlive_rag.models import CausalWanModel
from longlive_rag.parallel.attention import ShardedAttention
from longlive_rag.parallel.costs import Pass
from longlive_rag.parallel.shards import Shards

_SECONDS = 300
"""Until a case is given up: a rank that fails leaves the others waiting."""


class Size(NamedTuple):
    """Of a backbone, and of its latent frames in tokens."""

    heads: int
    ffn_dim: int
    rows: int
    columns: int


CASES = {"Wan 1.3B, 480x832": Size(12, 8960, 30, 52), "Wan 14B, 480x832": Size(40, 13824, 30, 52)}
CPU_CASES = {"12 heads, 2 x 5 tokens": Size(12, 64, 2, 5)}


class Times(NamedTuple):
    """Of one layer on the first rank, in seconds."""

    layer: float
    exchange: float
    attention: float
    sent: int
    """Bytes that it sends in one layer."""


def cases(machine: Machine) -> dict[str, Case]:
    most = torch.cuda.device_count() if machine.cuda else 4
    return {
        f"{name}, {ranks} ranks": partial(measure, machine, name, size, ranks)
        for name, size in (CASES if machine.cuda else CPU_CASES).items()
        for ranks in range(2, most + 1)
        if size.heads % ranks == 0
    }


def measure(machine: Machine, name: str, size: Size, ranks: int) -> Row:
    alone, shared = _times(machine.cuda, size, 1), _times(machine.cuda, size, ranks)
    peers: dict[str, float | None] = {
        "one rank": alone.layer,
        "exchange": shared.exchange,
        "attention": shared.attention,
        "its attention": alone.attention,
    }
    tokens, itemsize = size.rows * size.columns, 2 if machine.cuda else 4
    formula = Pass(1, RetrievalConfig().block_frames, tokens, size.heads, HEAD_DIM, itemsize, ranks).layer_bytes
    sent = f"{format_bytes(shared.sent)} sent, {format_bytes(formula)} by formula"
    case = f"{name}, {ranks} ranks, {'NCCL' if machine.cuda else 'gloo'}, {sent}"
    return Row("parallel", case, shared.layer, alone.layer / ranks, "share of one rank", peers)


def _times(cuda: bool, size: Size, ranks: int) -> Times:
    """
    Raises:
        RuntimeError: a rank failed, or none has finished in time.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receive, send = context.Pipe(duplex=False)
        work = [
            context.Process(target=_be_rank, args=(rank, ranks, cuda, size, folder, send), daemon=True)
            for rank in range(ranks)
        ]
        for process in work:
            process.start()
        try:
            end = time.monotonic() + _SECONDS
            while not receive.poll(0.1):
                failed = [rank for rank, process in enumerate(work) if process.exitcode]
                if failed or time.monotonic() > end:
                    why = f"rank {failed[0]} failed" if failed else f"none has finished within {_SECONDS} s"
                    raise RuntimeError(f"parallel: of {ranks} ranks {why}")
            times: Times = receive.recv()
            return times
        finally:
            for process in work:
                process.kill()
                process.join()


@torch.no_grad()
def _be_rank(
    rank: int, ranks: int, cuda: bool, size: Size, folder: str, send: multiprocessing.connection.Connection
) -> None:
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / f"store-{ranks}"), ranks)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks)
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(0)
    config, dtype = RetrievalConfig(), torch.bfloat16 if cuda else torch.float32
    model = CausalWanModel(size.heads * HEAD_DIM, size.ffn_dim, num_heads=size.heads, num_layers=1).to(device, dtype)
    shards = Shards(group, size.heads)
    frames, tokens = config.block_frames, size.rows * size.columns
    memory = filled_memory(config, Machine(device), dtype, shards.heads, (size.rows, size.columns))
    attention = ShardedAttention(memory, shards, tokens)
    own = shards.token_counts(tokens)[rank]
    q, k, v = torch.randn(3, 1, frames, own, size.heads, HEAD_DIM, device=device, dtype=dtype)
    mine = torch.randn(3, 1, frames, tokens, shards.heads, HEAD_DIM, device=device, dtype=dtype)
    latents = torch.randn(1, frames, 16, 2 * size.rows, 2 * size.columns, device=device, dtype=dtype)
    timestep = torch.full((1, frames), 500.0, device=device)
    prompt = model.prepare_prompt(torch.randn(1, 512, model.text_dim, device=device, dtype=dtype))
    weight = torch.ones(size.heads * HEAD_DIM, device=device, dtype=dtype)

    def exchange() -> None:
        out, _, _ = shards.to_heads(q, k, v, weight, weight, 1e-6, tokens)
        shards.to_tokens(out.flatten(1, 2), frames)

    before = shards.traffic.bytes
    exchange()
    sent = shards.traffic.bytes - before
    times = [
        _median(work, device)
        for work in (
            lambda: model(latents, timestep, prompt, attention),
            exchange,
            lambda: memory.attend(0, *mine.unbind(0)),
        )
    ]
    if rank == 0:
        send.send(Times(times[0], times[1], times[2], sent))
    time.sleep(_SECONDS)  # ended by the process that waits: others may still be on their way


def _median(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, which all ranks begin together."""
    samples = []
    for _ in range(REPLAYS if device.type == "cuda" else 5):
        work()
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - begun)
    return statistics.median(samples)
