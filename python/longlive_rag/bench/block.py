"""A whole block: denoising steps and clean pass of a Wan transformer with random weights, with and without memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longlive_rag import RetrievalConfig, RetrievalMemory
from longlive_rag.bench.common import Call, Machine, Row
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


@torch.no_grad()
def rows(machine: Machine) -> Iterator[Row]:
    dtype = torch.bfloat16 if machine.cuda else torch.float32
    for case, (arguments, latent) in (CASES if machine.cuda else CPU_CASES).items():
        with torch.device(machine.device):
            torch.set_default_dtype(dtype)
            try:
                model = CausalWanModel.from_size(**arguments) if "size" in arguments else CausalWanModel(**arguments)
            finally:
                torch.set_default_dtype(torch.float32)
        prompt = model.prepare_prompt(torch.randn(1, model.text_len, model.text_dim, device=machine.device).to(dtype))
        calls, memories = [], []
        for config in (RetrievalConfig(), RetrievalConfig(memory_frames=0)):
            memory = _filled(config, model, machine, dtype, latent)
            memories.append(memory)
            calls.append(_passes(model, prompt, memory, latent, machine, dtype))
        ours, without_memory = machine.seconds(calls, sets=1)
        peers: dict[str, float | None] = {"without memory, same context": without_memory}
        if machine.cuda:
            (peers["no CUDA graph"],) = machine.seconds(calls[:1], sets=1, graph=False)
        yield Row("block", case, ours, peers=peers)
        for memory in memories:
            memory.close()
        del model, prompt, calls, memories


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
        capacity=START + frames,
    )
    for pool in (*memory.bank.k_pages, *memory.bank.v_pages):
        pool.normal_()
    for start in range(0, START, frames):
        memory.begin_block(start, frames)
        memory.commit(torch.randn(1, frames, 16, *latent, device=machine.device))
    memory.begin_block(START, frames)
    return memory
