"""What a user of `patch` relies on: it finds the model, keeps its layers, follows its calls, and can be taken back."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longlive_rag import RetrievalConfig, patch, rollout
from longlive_rag.models import CausalWanModel
from support.causal_doubles import ATTENTIONS, Attention, NativeAttentionReached, Pipeline, Transformer, Wrapper

SIZES = {
    "dim": 32, "ffn_dim": 32, "freq_dim": 16, "text_dim": 8, "text_len": 4, "num_heads": 2, "num_layers": 2
}  # fmt: skip
CONFIG = RetrievalConfig(context_frames=5, sink_frames=1, memory_frames=2, recency_guard=0, block_frames=1)
TOKENS = 2


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def pipeline() -> Pipeline:
    torch.manual_seed(0)
    return Pipeline("Self-Forcing", **SIZES)


def noise(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(1, frames, 16, 2, 4, generator=torch.Generator().manual_seed(seed))


def generate(pipeline: Any, frames: int, *, first: int = 0, seed: int = 0, cache: Any = None, block: int = 1) -> Tensor:
    """A video in one denoising step per block, as a pipeline would drive its model."""
    cache = pipeline.cache(1, 5 * TOKENS) if cache is None else cache
    prompt = torch.ones(1, 4, 8)
    output = []
    for start in range(first, first + frames, block):
        latents = noise(frames, seed)[:, start - first : start - first + block]
        for level in (1000.0, 0.0):
            timestep = torch.full((1, block), level)
            flow = pipeline.generator(latents, prompt, timestep, kv_cache=cache, current_start=start * TOKENS)
            latents = latents - level / 1000 * flow
        output.append(latents)
    return torch.cat(output, dim=1)


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
    attention = pipeline.transformer.blocks[0].self_attn
    own = attention.forward
    attention.forward = own
    with patch(pipeline, CONFIG):
        assert attention.forward is not own
    assert vars(attention)["forward"] is own


def test_released_caches_come_back_empty_on_unpatch(pipeline: Pipeline) -> None:
    cache = pipeline.cache(1, 5 * TOKENS)
    shape = cache[0]["k"].shape
    expected_bytes = sum(layer[name].nbytes for layer in cache for name in ("k", "v"))
    with patch(pipeline, CONFIG) as patched:
        kept = generate(pipeline, 8)
        assert patched.released_bytes == 0
    with patch(pipeline, CONFIG, release_cache=True) as patched:
        assert torch.equal(generate(pipeline, 8, cache=cache), kept)
        assert patched.released_bytes == expected_bytes
        assert all(layer["k"].numel() == layer["v"].numel() == 0 for layer in cache)
    assert all(layer[name].shape == shape for layer in cache for name in ("k", "v"))


def test_a_second_video_begins_at_frame_zero(pipeline: Pipeline) -> None:
    cache = pipeline.cache(1, 5 * TOKENS)
    with patch(pipeline, CONFIG) as patched:
        first = generate(pipeline, 9, cache=cache)
        second = generate(pipeline, 9, seed=1, cache=cache)
        assert [entry.block_start for entry in patched.retrieved] == [6, 7, 8]
        assert torch.equal(generate(pipeline, 9, cache=cache), first)
    with patch(pipeline, CONFIG):
        assert torch.equal(generate(pipeline, 9, seed=1), second)


def test_a_video_in_a_new_cache_takes_over_the_memory_of_a_dead_one(pipeline: Pipeline) -> None:
    with patch(pipeline, CONFIG) as patched:
        first = generate(pipeline, 9)
        pages = patched._sequences[0].sequence.memory.bank.k_pages[0]
        gc.collect()
        assert torch.equal(generate(pipeline, 9), first)
        assert len(patched._sequences) == 1
        assert patched._sequences[0].sequence.memory.bank.k_pages[0] is pages


def test_two_caches_are_two_videos(pipeline: Pipeline) -> None:
    """As with classifier-free guidance, whose passes alternate."""
    caches = [pipeline.cache(1, 5 * TOKENS) for _ in range(2)]
    prompt = torch.ones(1, 4, 8)
    with patch(pipeline, CONFIG):
        alone = [generate(pipeline, 9, seed=seed) for seed in range(2)]
    with patch(pipeline, CONFIG):
        output: list[list[Tensor]] = [[], []]
        for start in range(9):
            latents = [noise(9, seed)[:, start : start + 1] for seed in range(2)]
            for level in (1000.0, 0.0):
                for video, cache in enumerate(caches):
                    flow = pipeline.generator(
                        latents[video], prompt, torch.full((1, 1), level), kv_cache=cache, current_start=start * TOKENS
                    )
                    latents[video] = latents[video] - level / 1000 * flow
            for video in range(2):
                output[video].append(latents[video])
    for video in range(2):
        assert torch.equal(torch.cat(output[video], dim=1), alone[video])


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
        def forward(self, noisy_image_or_video: Tensor, **call: Any) -> Tensor:
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
        pipeline.generator.model = torch.compile(pipeline.transformer, backend="eager")
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
    with patch(pipeline, CONFIG, device_frames=5, capacity=4) as patched:
        assert torch.equal(generate(pipeline, 16), expected)
        assert [entry.frames for entry in patched.retrieved] == retrieved


class TestRefusals:
    def test_an_unknown_module_is_told_what_was_looked_for_and_found(self) -> None:
        class Other(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

            def forward(self, x: Tensor, mask: Tensor) -> Tensor:
                return x

        with pytest.raises(TypeError) as error:
            patch(nn.ModuleList([Other()]), CONFIG)
        for told in (
            "looked for",
            "norm_q",
            "num_heads",
            "kv_cache",
            "current_start",
            "found",
            "Other",
            "q, k, v",
            "forward(x, mask)",
        ):
            assert told in str(error.value)

    @pytest.mark.parametrize("model", [None, 3, nn.Linear(2, 2)])
    def test_no_model_at_all(self, model: object) -> None:
        with pytest.raises(TypeError, match=r"looked for .* found "):
            patch(model, CONFIG)

    def test_an_attention_of_no_known_family(self) -> None:
        class Newer(Attention):
            def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, novelty=None):
                return x

        with pytest.raises(TypeError, match=r"novelty.*looked for.*cache_start.*MemFlow: is_recache"):
            patch(Transformer(Newer, **SIZES), CONFIG)

    def test_two_transformers(self, pipeline: Pipeline) -> None:
        both = nn.ModuleDict({"student": pipeline.transformer, "teacher": Transformer(Attention, **SIZES)})
        with pytest.raises(ValueError, match=r"2 causal transformers \('student', 'teacher'\)"):
            patch(both, CONFIG)

    def test_patched_twice(self, pipeline: Pipeline) -> None:
        with patch(pipeline, CONFIG), pytest.raises(ValueError, match="patched already"):
            patch(pipeline.transformer, CONFIG)

    def test_other_frequencies(self, pipeline: Pipeline) -> None:
        pipeline.transformer.freqs = pipeline.transformer.freqs**2
        with pytest.raises(ValueError, match="model.freqs"):
            patch(pipeline, CONFIG)

    def test_blocks_longer_than_the_local_window(self, pipeline: Pipeline) -> None:
        with patch(pipeline, CONFIG), pytest.raises(ValueError, match="local window of 2 .* blocks of 3"):
            generate(pipeline, 6, block=3)

    def test_a_pipeline_set_up_for_another_size(self, pipeline: Pipeline) -> None:
        cache, prompt = pipeline.cache(1, 5 * TOKENS), torch.ones(1, 4, 8)
        with patch(pipeline, CONFIG), pytest.raises(ValueError, match="current_start must be a multiple of 2"):
            pipeline.generator(noise(1), prompt, torch.zeros(1, 1), kv_cache=cache, current_start=3)

    def test_a_transformer_that_takes_no_latents(self, pipeline: Pipeline) -> None:
        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList([Attention(32, 2)])

            def forward(self, x: Tensor, kv_cache: Any, current_start: int) -> Tensor:
                return self.blocks[0](x, None, torch.tensor([[1, 1, 2]]), None, None, kv_cache[0], current_start)

        model = Tokens()
        with patch(model, CONFIG), pytest.raises(ValueError, match=r"must hold latents of 1 frames.*no five-dim"):
            model(torch.zeros(1, 2, 32), kv_cache=pipeline.cache(1, 10), current_start=0)

    def test_config_of_another_kind(self, pipeline: Pipeline) -> None:
        with pytest.raises(TypeError, match="config must be a RetrievalConfig, got dict"):
            patch(pipeline, {"memory_frames": 6})

    def test_a_draft_query_of_rolling_forcing(self) -> None:
        with pytest.raises(ValueError, match="config.query must be 'latest' for Rolling Forcing"):
            patch(Pipeline("Rolling Forcing", **SIZES), RetrievalConfig(query="draft"))


def test_a_failed_patch_leaves_the_model_alone(pipeline: Pipeline) -> None:
    pipeline.transformer.freqs = pipeline.transformer.freqs**2
    with pytest.raises(ValueError):
        patch(pipeline, CONFIG)
    assert "forward" not in vars(pipeline.transformer)


def test_longlive2_refuses_a_cache_that_is_emptied_within_a_block() -> None:
    pipeline = Pipeline("LongLive 2", **SIZES)
    cache, prompt = pipeline.cache(1, 5 * TOKENS), torch.ones(1, 4, 8)
    with patch(pipeline, CONFIG):
        generate(pipeline, 2, cache=cache)
        call = {"kv_cache": cache, "current_start": 2 * TOKENS}
        pipeline.generator(noise(1), prompt, torch.full((1, 1), 1000.0), **call)
        for layer in cache:
            layer["global_end_index"].fill_(2 * TOKENS)
        with pytest.raises(ValueError, match="shot_clean_recache"):
            pipeline.generator(noise(1), prompt, torch.zeros(1, 1), **call)


def test_krea_refuses_a_cache_that_misses_frames() -> None:
    """Of a block of three, a cache of three holds the first frame of the video and the newest two."""
    pipeline = Pipeline("krea realtime", **SIZES)
    cache, prompt = pipeline.cache(1, 8 * TOKENS), torch.ones(1, 4, 8)
    config = RetrievalConfig(context_frames=6, sink_frames=1, memory_frames=2, block_frames=3)
    with patch(pipeline, config):
        pipeline.generator(noise(3), prompt, torch.full((1, 3), 500.0), kv_cache=cache, current_start=0)
        call = {"kv_cache": cache, "current_start": 3 * TOKENS}
        pipeline.transformer.block_mask = torch.ones(3 * TOKENS, 3 * TOKENS, dtype=torch.bool)
        pipeline.generator(noise(3), prompt, torch.zeros(1, 3), **call)
        pipeline.transformer.block_mask = None
        pipeline.generator(noise(3), prompt, torch.full((1, 3), 500.0), **call)
        pipeline.transformer.block_mask = torch.ones(3 * TOKENS, 3 * TOKENS, dtype=torch.bool)
        with pytest.raises(ValueError, match="kv_cache_num_frames must be at least 4"):
            pipeline.generator(noise(3), prompt, torch.zeros(1, 3), **call)


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
