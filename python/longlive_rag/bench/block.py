"""block: all denoising steps and the clean pass of a Wan transformer with random weights, with and without memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from longlive_rag import RetrievalConfig, RetrievalMemory
from longlive_rag.bench.common import Call, Case, Machine, Row
from longlive_rag.embedding import AveragePool
from longlive_rag.models import CausalWanModel

# size of the model, rows and columns of the latent; the 14B model's pages of 33 frames alone are 42 GB
CASES = {"Wan 1.3B, 480x832": ({"size": "1.3B"}, (60, 104)), "Wan 14B, 480x832": ({"size": "14B"}, (60, 104))}
CPU_MODEL = {
    "dim": 128, "ffn_dim": 256, "freq_dim": 64, "text_dim": 32, "text_len": 8, "num_heads": 2, "num_layers": 2,
}  # fmt: skip
CPU_CASES = {"2 layers, 4 x 6 tokens": (CPU_MODEL, (8, 12))}
PASSES = 5
"""Four denoising steps and the clean pass."""
START = 30


def cases(machine: Machine) -> dict[str, Case]:
    return {
        name: partial(measure, machine, name, *sizes) for name, sizes in (CASES if machine.cuda else CPU_CASES).items()
    }


@torch.no_grad()
def measure(machine: Machine, case: str, arguments: dict[str, Any], latent: tuple[int, int]) -> Row:
    """One memory after the other, since a GPU may not hold two beside the model."""
    dtype = torch.bfloat16 if machine.cuda else torch.float32
    with torch.device(machine.device):
        torch.set_default_dtype(dtype)
        try:
            model = CausalWanModel.from_size(**arguments) if "size" in arguments else CausalWanModel(**arguments)
        finally:
            torch.set_default_dtype(torch.float32)
    model.fuse()  # as a checkpoint is, once it is loaded
    prompt = model.prepare_prompt(torch.randn(1, model.text_len, model.text_dim, device=machine.device).to(dtype))

    def seconds(config: RetrievalConfig, *, graph: bool = True) -> float:
        memory = _filled(config, model, machine, dtype, latent)
        try:
            return machine.seconds([_passes(model, prompt, memory, latent, machine, dtype)], sets=1, graph=graph)[0]
        finally:
            memory.close()

    ours = seconds(RetrievalConfig())
    peers: dict[str, float | None] = {"without memory, same context": seconds(RetrievalConfig(memory_frames=0))}
    if machine.cuda:
        peers["no CUDA graph"] = seconds(RetrievalConfig(), graph=False)
    return Row("block", case, ours, peers=peers)


def _passes(
    model: CausalWanModel,
    prompt: list[tuple[Tensor, Tensor]],
    memory: RetrievalMemory,
    latent: tuple[int, int],
    machine: Machine,
    dtype: torch.dtype,
) -> Call:
    frames = memory.config.block_frames
    latents = torch.randn(1, frames, 16, *latent, device=machine.device).to(dtype)
    timesteps = [torch.full((1, frames), 1000.0 - 200 * step, device=machine.device) for step in range(PASSES)]

    def run(_: int) -> None:
        for timestep in timesteps:
            model(latents, timestep, prompt, memory)

    return run


def _filled(
    config: RetrievalConfig, model: CausalWanModel, machine: Machine, dtype: torch.dtype, latent: tuple[int, int]
) -> RetrievalMemory:
    """A memory that holds `START` frames and has begun the next block; what its pages hold does not change the time."""
    frames = config.block_frames
    memory = RetrievalMemory(
        config,
        batch=1,
        layers=model.num_layers,
        heads=model.num_heads,
        head_dim=model.head_dim,
        grid=model.token_grid(*latent),
        device=machine.device,
        dtype=dtype,
        embedding=AveragePool(),
    )
    for start in range(0, START, frames):
        memory.begin_block(start, frames)
        memory.commit(torch.randn(1, frames, 16, *latent, device=machine.device))
    memory.begin_block(START, frames)
    for pool in (*memory.bank.k_pages, *memory.bank.v_pages):
        pool.normal_()
    return memory
