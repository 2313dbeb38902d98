"""diffusers' AnyFlow FAR transformer and pipeline, tiny and random, with and without retrieval memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longlive_rag import RetrievalConfig
from longlive_rag.backbones import apply_retrieval_memory, remove_retrieval_memory

diffusers = pytest.importorskip("diffusers", minversion="0.42")
TOKENS = 128
"""Of a latent frame. Where a chunk is no multiple of 128, diffusers pads the keys with zeros that count as tokens."""
CONFIG = RetrievalConfig(context_frames=5, sink_frames=1, memory_frames=2, recency_guard=0, block_frames=2)


def transformer(full_chunk_limit: int) -> Any:
    torch.manual_seed(0)
    return diffusers.AnyFlowFARTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=2, full_chunk_limit=full_chunk_limit,
    ).eval()  # fmt: skip


@torch.no_grad()
def generate(model: Any, partition: list[int], seed: int = 0, batch: int = 1) -> Tensor:
    """Two steps for each chunk, then the pass that fills the caches, as the pipeline does."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, sum(partition), 4, 16, 32, generator=generator).expand(batch, -1, -1, -1, -1)
    prompt = torch.randn(batch, 4, 8, generator=generator)
    limit = model.config.full_chunk_limit
    cache = {
        layer: {
            "full_cache": torch.zeros(2, batch, 2, limit * max(partition) * TOKENS, 16),
            "compressed_cache": torch.zeros(2, batch, 2, len(partition) * max(partition) * TOKENS // 4, 16),
        }
        for layer in range(2)
    }
    output = torch.zeros(noise.shape)
    for chunk, frames in enumerate(partition):
        start = sum(partition[:chunk])
        latents = noise[:, start : start + frames]
        call = {"encoder_hidden_states": prompt, "kv_cache": cache, "return_dict": False}
        for level in (1000.0, 500.0):
            time = torch.full((batch, frames), level)
            flag = {"num_cached_chunks": chunk, "is_cache_step": False}
            flow, _ = model(
                hidden_states=latents, chunk_partition=partition[: chunk + 1], timestep=time, r_timestep=time,
                kv_cache_flag=flag, **call,
            )  # fmt: skip
            latents = latents - 0.5 * flow
        output[:, start : start + frames] = latents
        clean = torch.zeros(batch, start + frames)
        model(
            hidden_states=output[:, : start + frames], chunk_partition=partition[: chunk + 1], timestep=clean,
            r_timestep=clean, kv_cache_flag={"num_cached_chunks": chunk, "is_cache_step": True}, **call,
        )  # fmt: skip
    return output


def test_without_memory_a_full_window_is_the_model_s_own() -> None:
    """As long as nothing is compressed: what memory replaces is the compressed past."""
    model, partition = transformer(full_chunk_limit=4), [1, 2, 2, 1]
    expected = generate(model, partition)
    native = RetrievalConfig(context_frames=6, sink_frames=0, memory_frames=0, block_frames=2, positions="absolute")
    apply_retrieval_memory(model, native)
    torch.testing.assert_close(generate(model, partition), expected, atol=1e-5, rtol=1e-5)
    remove_retrieval_memory(model)
    assert torch.equal(generate(model, partition), expected)


def test_memory_comes_back() -> None:
    model, partition = transformer(full_chunk_limit=3), [1, 2, 2, 2, 2, 2, 2]
    before = generate(model, partition)
    hook = apply_retrieval_memory(model, CONFIG)
    video = generate(model, partition)
    starts = [entry.block_start for entry in hook.retrieved]
    assert starts == [7, 9, 11]
    assert all(frame < entry.block_start - 4 for entry in hook.retrieved for frame in entry.frames[0])
    assert torch.isfinite(video).all() and not torch.allclose(video[:, -2:], before[:, -2:])
    # Another call of the pipeline is another video.
    assert not torch.equal(generate(model, partition, seed=1), video)
    assert torch.equal(generate(model, partition), video)
    remove_retrieval_memory(model)
    assert torch.equal(generate(model, partition), before)


def test_guidance_doubles_the_batch() -> None:
    model, partition = transformer(full_chunk_limit=3), [1, 2, 2, 2, 2, 2]
    hook = apply_retrieval_memory(model, CONFIG)
    generate(model, partition, batch=2)
    assert [[len(frames) for frames in entry.frames] for entry in hook.retrieved] == [[2, 2]] * 2


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"AnyFlowFARTransformer3DModel.*looked for.*found Linear"):
        apply_retrieval_memory(nn.Linear(2, 2), CONFIG)
    model = transformer(full_chunk_limit=3)
    apply_retrieval_memory(model, CONFIG)
    with pytest.raises(ValueError, match="already"):
        apply_retrieval_memory(model, CONFIG)
    with pytest.raises(ValueError, match="config.query"):
        apply_retrieval_memory(transformer(3), RetrievalConfig(query="draft"))
