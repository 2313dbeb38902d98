"""What `patch` refuses, and what it says."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from longlive_rag import RetrievalConfig, patch
from support.causal_doubles import Attention, Pipeline, Transformer
from support.tiny_videos import CONFIG, SIZES, TOKENS, generate, noise


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

    def test_a_bidirectional_model_is_called_that_first(self) -> None:
        class WanModel(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList([Bidirectional(32, 2)])

        class Bidirectional(Attention):
            def forward(self, x, seq_lens, grid_sizes, freqs):  # type: ignore[override]
                return x

        with pytest.raises(TypeError) as error:
            patch(WanModel(), CONFIG)
        sentence, details = str(error.value).split(". In detail: ")
        assert "WanModel is bidirectional" in sentence and len(sentence) < 100
        assert "looked for" in details and "blocks.0 (Bidirectional)" in details

    @pytest.mark.parametrize("model", [None, 3, nn.Linear(2, 2)])
    def test_no_model_at_all(self, model: object) -> None:
        with pytest.raises(TypeError, match=r"^model (must be|holds).*looked for .* found "):
            patch(model, CONFIG)

    def test_an_attention_of_no_known_family(self) -> None:
        class Newer(Attention):
            def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, novelty=None):
                return x

        with pytest.raises(TypeError, match=r"not know.*novelty.*looked for.*cache_start.*MemFlow: is_recache"):
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

    def test_a_window_too_small_for_what_the_pipeline_says(self, pipeline: Pipeline) -> None:
        """It is found before the first pass, which comes after the weights are loaded."""
        for holder in (pipeline, pipeline.transformer):
            holder.num_frame_per_block = 2
            patch(pipeline, CONFIG).unpatch()
            holder.num_frame_per_block = 3
            with pytest.raises(ValueError, match="local window of 2 .* blocks of 3"):
                patch(pipeline, CONFIG)
            del holder.num_frame_per_block

    def test_the_window_of_rolling_forcing_holds_a_block_per_step(self) -> None:
        pipeline = Pipeline("Rolling Forcing", **SIZES)
        pipeline.num_frame_per_block, pipeline.denoising_step_list = 3, torch.tensor([1000, 800, 600, 400, 200])
        with pytest.raises(ValueError, match="local window of 5 .* blocks of 15"):
            patch(pipeline, RetrievalConfig())
        patch(pipeline, RetrievalConfig(context_frames=21, sink_frames=3, memory_frames=3)).unpatch()

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
        with pytest.raises(TypeError, match="config must be a RetrievalConfig, 'native' or None, got dict"):
            patch(pipeline, cast(Any, {"memory_frames": 6}))

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
