"""What a user of `patch` relies on: it finds the model, keeps its layers, follows its calls, and can be taken back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from longlive_rag import Budget, RetrievalConfig, patch, rollout
from longlive_rag.embedding import AveragePool, LatentAutoencoder
from longlive_rag.models import CausalWanModel
from support.causal_doubles import ATTENTIONS, Attention, NativeAttentionReached, Pipeline, Transformer, Wrapper
from support.tiny_videos import CONFIG, SIZES, TOKENS, generate, noise

PAGE = 2 * SIZES["num_layers"] * TOKENS * SIZES["dim"] * 4
"""Bytes of a latent frame's keys and values in float32."""


def test_memory_comes_back_and_changes_the_video(pipeline: Pipeline) -> None:
    with patch(pipeline, CONFIG) as patched:
        with_memory = generate(pipeline, 12)
        assert [entry.block_start for entry in patched.retrieved] == list(range(6, 12))
        assert all(len(entry.frames[0]) == min(2, entry.block_start - 5) for entry in patched.retrieved)
    with patch(pipeline, RetrievalConfig(context_frames=5, memory_frames=0, block_frames=1)):
        without = generate(pipeline, 12)
    # What a young block sees stands in other columns of the table, so float32 sums over it run in another order.
    torch.testing.assert_close(with_memory[:, :2], without[:, :2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(with_memory[:, 8:], without[:, 8:])


def test_absolute_positions_beyond_1024_frames(pipeline: Pipeline) -> None:
    """The models' own tables of rotations end there."""
    absolute = partial(RetrievalConfig, recency_guard=0, block_frames=3, positions="absolute")
    with patch(pipeline, absolute(context_frames=6, sink_frames=1, memory_frames=2)) as patched:
        video = generate(pipeline, 1035, block=3)
        assert torch.isfinite(video).all()
        assert patched.retrieved[-1].block_start == 1032
    # Distances are all that matters: frames 1020 and on, were they the first, make the same video as frames 0 and on.
    with patch(pipeline, absolute(context_frames=6, sink_frames=0, memory_frames=0)):
        late, early = (generate(pipeline, 12, first=first, block=3) for first in (1020, 0))
    torch.testing.assert_close(late, early, atol=1e-5, rtol=1e-5)


def test_unpatch_restores_the_object_exactly(pipeline: Pipeline) -> None:
    modules = dict(pipeline.generator.named_modules())
    before = {name: dict(vars(module)) for name, module in modules.items()}
    patched = patch(pipeline, CONFIG)
    generate(pipeline, 3)
    patched.unpatch()
    assert {name: dict(vars(module)) for name, module in modules.items()} == before
    with pytest.raises(NativeAttentionReached):
        generate(pipeline, 1)


def test_a_forward_that_was_replaced_already_comes_back(pipeline: Pipeline) -> None:
    attention: nn.Module = pipeline.transformer.blocks[0].self_attn
    own = attention.forward
    attention.forward = own
    with patch(pipeline, CONFIG):
        assert attention.forward is not own
    assert vars(attention)["forward"] is own


def test_two_patched_models_do_not_meet() -> None:
    torch.manual_seed(0)
    first, second = Pipeline("Self-Forcing", **SIZES), Pipeline("LongLive", **SIZES)
    expected = []
    for pipeline in (first, second):
        with patch(pipeline, CONFIG):
            expected.append(generate(pipeline, 9))
    with patch(first, CONFIG) as one, patch(second, CONFIG) as two:
        assert torch.equal(generate(first, 9), expected[0])
        assert torch.equal(generate(second, 9), expected[1])
        assert [entry.frames for entry in one.retrieved] != [] != [entry.frames for entry in two.retrieved]


def test_the_input_of_the_last_pass_is_what_is_remembered(pipeline: Pipeline) -> None:
    """Though the pipeline writes over it afterwards."""
    seen: list[Tensor] = []

    class Spy:
        def embed(self, latents: Tensor) -> Tensor:
            seen.append(latents.clone())
            return latents.mean(dim=(-2, -1))

    cache, prompt, latents = pipeline.cache(1, 5 * TOKENS), torch.ones(1, 4, 8), noise(1)
    with patch(pipeline, CONFIG, embedding=Spy()):
        for start in range(2):
            for level in (1000.0, 0.0):
                latents.fill_(level + start)
                pipeline.generator(
                    latents, prompt, torch.full((1, 1), level), kv_cache=cache, current_start=start * TOKENS
                )
            latents.fill_(-1)
    assert len(seen) == 1 and (seen[0] == 0).all()


def test_calls_without_a_cache_or_with_gradients_go_to_the_original(pipeline: Pipeline) -> None:
    latents, prompt, timestep = noise(2), torch.ones(1, 4, 8), torch.zeros(1, 2)
    expected = pipeline.generator(latents, prompt, timestep)
    with patch(pipeline, CONFIG) as patched:
        assert torch.equal(pipeline.generator(latents, prompt, timestep), expected)
        pipeline.generator.requires_grad_(True)
        with torch.enable_grad(), pytest.raises(NativeAttentionReached):
            pipeline.generator(latents, prompt, timestep, kv_cache=pipeline.cache(1, 10), current_start=0)
        assert patched.retrieved == []


def test_a_wrapper_that_is_the_transformer(pipeline: Pipeline) -> None:
    """It takes latents with the frames first, under a name of its own."""

    class FramesFirst(Transformer):
        def forward(self, noisy_image_or_video: Tensor, **call: Any) -> Tensor:  # type: ignore[override]
            x = noisy_image_or_video.transpose(1, 2)
            return super().forward(x, seq_len=0, **call).transpose(1, 2)

    model = FramesFirst(Attention, **SIZES).eval().requires_grad_(False)
    model.load_state_dict(pipeline.transformer.state_dict())
    config = replace(CONFIG, query="draft")
    with patch(pipeline, config):
        expected = generate(pipeline, 9)
    cache, prompt, output = pipeline.cache(1, 5 * TOKENS), torch.ones(1, 4, 8), []
    with patch(model, config):
        for start in range(9):
            latents = noise(9)[:, start : start + 1]
            for level in (1000.0, 0.0):
                call = {"t": torch.full((1, 1), level), "context": prompt, "kv_cache": cache}
                flow = model(noisy_image_or_video=latents, current_start=start * TOKENS, **call)
                latents = latents - level / 1000 * flow
            output.append(latents)
    assert torch.equal(torch.cat(output, dim=1), expected)


def test_wrapped_linears_keep_working(pipeline: Pipeline) -> None:
    """As LoRA and quantisation do, which replace the projections, before or after the patch."""

    class LowRank(nn.Module):
        def __init__(self, base: nn.Linear, scale: float) -> None:
            super().__init__()
            self.base, self.scale = base, scale
            self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.scale * self.up(self.down(x))

    with patch(pipeline, CONFIG):
        plain = generate(pipeline, 8)
        for block in pipeline.transformer.blocks:
            for name in ("q", "k", "v", "o"):
                setattr(block.self_attn, name, LowRank(getattr(block.self_attn, name), 1.0))
        after = generate(pipeline, 8)
    with patch(pipeline, CONFIG):
        before = generate(pipeline, 8)
    assert torch.equal(before, after) and not torch.allclose(before, plain)


@pytest.mark.parametrize("wrapped", ["pipeline", "wrapper", "transformer", "compiled", "data parallel", "peft"])
def test_wrappers_are_looked_through(pipeline: Pipeline, wrapped: str) -> None:
    class Holder(nn.Module):
        def __init__(self, **children: nn.Module) -> None:
            super().__init__()
            for name, child in children.items():
                self.add_module(name, child)

    transformer = pipeline.transformer
    model = {
        "pipeline": pipeline,
        "wrapper": pipeline.generator,
        "transformer": transformer,
        "compiled": torch.compile(transformer, backend="eager"),
        "data parallel": Holder(module=pipeline.generator),
        "peft": Holder(base_model=Holder(model=transformer)),
    }[wrapped]
    with patch(model, CONFIG) as patched:
        generate(pipeline, 8)
        assert [entry.block_start for entry in patched.retrieved] == [6, 7]


def test_a_compiled_transformer_gives_the_same_video(pipeline: Pipeline) -> None:
    with patch(pipeline, CONFIG):
        expected = generate(pipeline, 8)
    with patch(pipeline, CONFIG) as patched:
        cache = pipeline.cache(1, 5 * TOKENS)
        pipeline.generator.model = cast(nn.Module, torch.compile(pipeline.transformer, backend="eager"))
        torch.testing.assert_close(generate(pipeline, 8, cache=cache), expected)
        assert [entry.block_start for entry in patched.retrieved] == [6, 7]


@pytest.mark.parametrize("query", ["latest", "draft"])
def test_a_patched_model_makes_what_our_own_pipeline_makes(pipeline: Pipeline, query: Any) -> None:
    own = CausalWanModel(**SIZES).eval()
    own.load_state_dict(pipeline.transformer.state_dict())
    config = replace(CONFIG, query=query)
    expected = rollout(own, noise(12), torch.ones(1, 4, 8), config, denoising_steps=[1000])
    with patch(pipeline, config) as patched:
        torch.testing.assert_close(generate(pipeline, 12), expected.latents, atol=1e-5, rtol=1e-5)
        assert [entry.frames for entry in patched.retrieved] == [entry.frames for entry in expected.retrieved]


@pytest.mark.parametrize("family", sorted(ATTENTIONS))
def test_every_family_is_told_by_its_arguments(family: str) -> None:
    with patch(Pipeline(family, **SIZES), CONFIG) as patched:
        assert patched.family == family


def test_longlive_contract(pipeline: Pipeline) -> None:
    """The transformer moves its indices by what the attention returns: tokens so far, and what the cache then holds."""
    longlive = Pipeline("LongLive", **SIZES)
    cache = longlive.cache(1, 5 * TOKENS)
    with patch(longlive, CONFIG):
        generate(longlive, 3, cache=cache)
        assert [int(layer["global_end_index"]) for layer in cache] == [3 * TOKENS] * 2
        generate(longlive, 9, cache=cache)
        assert [int(layer["local_end_index"]) for layer in cache] == [5 * TOKENS] * 2


def test_frames_in_host_memory_give_the_same_video(pipeline: Pipeline) -> None:
    with patch(pipeline, CONFIG) as patched:
        expected, retrieved = generate(pipeline, 16), [entry.frames for entry in patched.retrieved]
    with patch(pipeline, CONFIG, budget=Budget(device=5 * PAGE)) as patched:
        assert torch.equal(generate(pipeline, 16), expected)
        assert [entry.frames for entry in patched.retrieved] == retrieved


def test_inference_mode_and_back(pipeline: Pipeline) -> None:
    with patch(pipeline, CONFIG) as patched:
        cache = pipeline.cache(1, 5 * TOKENS)
        with torch.inference_mode():
            first = generate(pipeline, 8, cache=cache)
        patched.reset()
        assert torch.equal(generate(pipeline, 8, cache=cache), first)


def test_wrapper_class_is_irrelevant() -> None:
    """Detection goes by attributes: the same contract under other names is the same family."""
    renamed = type("Anything", (Attention,), {})
    with patch(Wrapper(Transformer(renamed, **SIZES)), CONFIG) as patched:
        assert patched.family == "Self-Forcing"


COPIES: dict[str, Callable[[nn.Module], object]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda module: torch.save(module, io.BytesIO()),
}


@pytest.mark.parametrize("way", sorted(COPIES))
def test_a_patched_model_refuses_to_be_copied(pipeline: Pipeline, way: str) -> None:
    """The copy would compute with the original's weights."""
    with patch(pipeline, CONFIG):
        for module in (pipeline.generator, pipeline.transformer, pipeline.transformer.blocks[0].self_attn):
            with pytest.raises(TypeError, match=r"patched model cannot be copied.*unpatch\(\)"):
                COPIES[way](module)
        torch.save(pipeline.generator.state_dict(), io.BytesIO())
    COPIES[way](pipeline.generator)


def test_a_copy_of_an_unpatched_model_is_independent(pipeline: Pipeline) -> None:
    with patch(pipeline, CONFIG):
        expected = generate(pipeline, 8)
    original, pipeline.generator = pipeline.generator, copy.deepcopy(pipeline.generator)
    for parameter in original.parameters():
        parameter.zero_()
    with patch(pipeline, CONFIG):
        assert torch.equal(generate(pipeline, 8), expected)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", [str, Path])
def test_an_embedding_may_be_a_path(pipeline: Pipeline, tmp_path: Path, suffix: str, kind: Any) -> None:
    torch.manual_seed(1)
    autoencoder = LatentAutoencoder(in_channels=16, height=2, width=4, embedding_dim=8, hidden_dims=(8,))
    path = tmp_path / f"autoencoder{suffix}"
    autoencoder.save(path)
    with patch(pipeline, CONFIG, embedding=autoencoder):
        expected = generate(pipeline, 12)
    with patch(pipeline, CONFIG, embedding=kind(path)):
        assert torch.equal(generate(pipeline, 12), expected)
    with patch(pipeline, CONFIG):
        assert not torch.equal(generate(pipeline, 12), expected)


@pytest.mark.parametrize("embedding", [3, AveragePool, "missing.pt"])
def test_an_embedding_that_is_none(pipeline: Pipeline, embedding: Any) -> None:
    expected, message = (
        (FileNotFoundError, "missing.pt") if embedding == "missing.pt" else (TypeError, "embedding must")
    )
    with pytest.raises(expected, match=message):
        patch(pipeline, CONFIG, embedding=embedding)
    assert "forward" not in vars(pipeline.transformer)
