"""diffusers' AnyFlow FAR transformer and pipeline, tiny and random, with and without retrieval memory."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longlive_rag import RetrievalConfig, patch
from longlive_rag.backbones.families import anyflow
from longlive_rag.index import LatentIndex
from longlive_rag.selection import Request

diffusers = pytest.importorskip("diffusers", minversion="0.42")
TOKENS = 128
"""Of a latent frame. Where a chunk is no multiple of 128, diffusers pads the keys with zeros that count as tokens."""
CONFIG = RetrievalConfig(
    context_frames=8, sink_frames=0, memory_frames=2, recency_guard=0, block_frames=2, positions="absolute"
)
"""Two frames of memory beside three chunks of two frames in full."""


def transformer(full_chunk_limit: int, layers: int = 2) -> Any:
    torch.manual_seed(0)
    return diffusers.AnyFlowFARTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=layers, full_chunk_limit=full_chunk_limit,
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
        for layer in range(len(model.blocks))
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


def test_native_is_the_model_s_own_to_the_last_bit() -> None:
    """The compressed past among it."""
    model, partition = transformer(full_chunk_limit=3), [1, 2, 2, 2, 2, 1]
    expected = generate(model, partition)
    with patch(model, "native") as patched:
        assert torch.equal(generate(model, partition), expected)
        assert patched.family == "AnyFlow FAR" and patched.used and patched.retrieved == []
        assert patched.config.memory_frames == 0 and patched.config.context_frames == 9  # 3 chunks of at most 3
    assert torch.equal(generate(model, partition), expected)


def test_until_something_is_retrieved_the_model_s_own_to_the_last_bit() -> None:
    model, partition = transformer(full_chunk_limit=3), [1, 2, 2, 2, 2, 2]
    expected = generate(model, partition)
    with patch(model, CONFIG) as patched:
        video = generate(model, partition)
        first = patched.retrieved[0].block_start
        assert first == 5 and torch.equal(video[:, :first], expected[:, :first])
        assert not torch.equal(video[:, first:], expected[:, first:])


class Nothing:
    """A selection that brings nothing back."""

    def select(self, request: Request, index: LatentIndex) -> tuple[Tensor, Tensor]:
        shape = (request.query.shape[0], request.k)
        return torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape)


def test_parts_add_up_to_the_model_s_own_attention() -> None:
    """With an empty memory: what the model sees by itself is computed here, and by diffusers."""
    model, partition = transformer(full_chunk_limit=3), [1, 2, 2, 2, 2, 2]
    expected = generate(model, partition)
    with patch(model, CONFIG, selection=Nothing()):
        # The same operations in the same order, but for the logarithms of the sums that are asked for as well.
        torch.testing.assert_close(generate(model, partition), expected, atol=1e-6, rtol=1e-5)


def test_what_memory_brings_back_takes_part_in_the_same_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks in full, and all before them from memory, are all chunks in full, once the compressed ones are left
    out. Of one layer, whose keys depend on its own input alone."""
    partition = [2, 2, 2, 2]
    expected = generate(transformer(full_chunk_limit=5, layers=1), partition)
    of_chunk = anyflow._own_attention

    def without_compressed(q: Tensor, k: Tensor, v: Tensor, rotary: Any, cache: Any, flag: Any) -> Any:
        compressed = flag["num_cached_compressed_tokens"]
        rotary = {"query": rotary["query"], "key": rotary["key"][:, :, compressed:]}
        return of_chunk(q, k, v, rotary, cache, {**flag, "num_cached_compressed_tokens": 0})

    monkeypatch.setattr(anyflow, "_own_attention", without_compressed)
    config = replace(CONFIG, memory_frames=4)
    model = transformer(full_chunk_limit=2, layers=1)
    with patch(model, config) as patched:
        video = generate(model, partition)
        assert [sorted(entry.frames[0]) for entry in patched.retrieved] == [[0, 1], [0, 1, 2, 3]]
    # Sums of a thousand products in float32, in another order.
    torch.testing.assert_close(video, expected, atol=1e-5, rtol=1e-5)


def test_memory_comes_back() -> None:
    model, partition = transformer(full_chunk_limit=3), [1, 2, 2, 2, 2, 2, 2]
    before = generate(model, partition)
    patched = patch(model, CONFIG)
    video = generate(model, partition)
    starts = [entry.block_start for entry in patched.retrieved]
    assert starts == [5, 7, 9, 11]
    assert all(frame < entry.block_start - 4 for entry in patched.retrieved for frame in entry.frames[0])
    assert torch.isfinite(video).all() and not torch.allclose(video[:, -2:], before[:, -2:])
    # Another call of the pipeline is another video.
    assert not torch.equal(generate(model, partition, seed=1), video)
    assert torch.equal(generate(model, partition), video)
    assert [len(earlier) for earlier in patched.earlier_videos] == [4, 4]
    patched.reset()
    assert patched.retrieved == [] and torch.equal(generate(model, partition), video)
    patched.unpatch()
    assert torch.equal(generate(model, partition), before)


def test_guidance_doubles_the_batch() -> None:
    model, partition = transformer(full_chunk_limit=3), [1, 2, 2, 2, 2, 2]
    with patch(model, CONFIG) as patched:
        generate(model, partition, batch=2)
        assert [[len(frames) for frames in entry.frames] for entry in patched.retrieved] == [[1, 1]] + [[2, 2]] * 2


def test_a_pipeline_and_a_compiled_transformer_are_looked_through() -> None:
    model, partition = transformer(full_chunk_limit=3), [1, 2, 2, 2, 2]
    with patch(SimpleNamespace(transformer=model), CONFIG) as patched:
        generate(model, partition)
        assert [entry.block_start for entry in patched.retrieved] == [5, 7]
    compiled = torch.compile(model, backend="eager")
    with patch(compiled, CONFIG) as patched:
        # Only two chunks, since every other length of the past is compiled again.
        torch.testing.assert_close(generate(compiled, [1, 2]), generate(model, [1, 2]), atol=1e-5, rtol=1e-5)
        assert patched.used


class Answer:
    """Attention that only passes on what it is given."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None,
        rotary_emb: Any = None, kv_cache: Any = None, kv_cache_flag: Any = None,
    ) -> Tensor:  # fmt: skip
        return hidden_states


def test_calls_with_gradients_or_without_a_cache_are_the_model_s_own() -> None:
    model = transformer(full_chunk_limit=3)
    call = {
        "hidden_states": torch.ones(1, 2, 4, 16, 32), "chunk_partition": [2], "timestep": torch.ones(1, 2),
        "r_timestep": torch.ones(1, 2), "encoder_hidden_states": torch.ones(1, 4, 8), "return_dict": False,
    }  # fmt: skip
    with torch.no_grad():
        expected = model(**call)[0]
        with patch(model, CONFIG) as patched:
            assert torch.equal(model(**call)[0], expected)
            for block in model.blocks:
                block.attn1.set_processor(Answer())  # flex attention has no gradient on a CPU
            with torch.enable_grad():
                empty = {name: torch.zeros(2, 1, 2, 6 * TOKENS, 16) for name in ("full_cache", "compressed_cache")}
                cache = {layer: dict(empty) for layer in range(2)}
                flag = {"num_cached_chunks": 0, "is_cache_step": False}
                assert model(**call, kv_cache=cache, kv_cache_flag=flag)[0].requires_grad
            assert not patched.used


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"no causal video transformer.*looked for.*to_q.*found Linear"):
        patch(nn.Linear(2, 2), CONFIG)
    model = transformer(full_chunk_limit=3)
    with patch(model, CONFIG):
        with pytest.raises(ValueError, match="already"):
            patch(model, CONFIG)
        with pytest.raises(TypeError, match="patched model cannot be copied"):
            copy.deepcopy(model)
    with pytest.raises(ValueError, match="config.query"):
        patch(transformer(3), RetrievalConfig(query="draft"))


def test_a_bidirectional_transformer_of_diffusers() -> None:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=1,
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"^model must be causal, but WanTransformer3DModel is bidirectional"):
        patch(model, CONFIG)


def test_helios_has_no_keys_to_keep() -> None:
    """Its history passes through every layer again in every pass, as latents."""
    model = diffusers.HeliosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_dim=(4, 6, 6),
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"HeliosTransformer3DModel is bidirectional: its attention takes no key-value"):
        patch(model, CONFIG)
