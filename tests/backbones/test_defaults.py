"""What `patch` takes over from a model and its pipeline when the user says nothing, or "native"."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longlive_rag import RetrievalConfig, patch
from longlive_rag.backbones.find import find_transformer
from longlive_rag.budget import Budget
from longlive_rag.tiers.pages import frame_bytes
from support.causal_doubles import ATTENTIONS, Attention, LongLiveAttention, Pipeline, Transformer, Wrapper
from support.tiny_videos import CONFIG, SIZES, TOKENS, generate

FRAME_BYTES = frame_bytes(layers=2, heads=2, tokens=TOKENS, head_dim=16, dtype=torch.float32)


def block_relativistic_rope() -> None:
    """What LongLive's infinity mode calls in the place of `causal_rope_apply`."""


class InfinityAttention(LongLiveAttention):
    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        sink_recache_after_switch=False,
    ):  # fmt: skip
        block_relativistic_rope()
        return self.uncached(x, kv_cache)


def attentions_of(transformer: Transformer) -> list[Any]:
    return [module for module in transformer.modules() if isinstance(module, Attention)]


def pipeline_of(family: str, *, window: int | None = 12, sink: int = 1, block: int = 3, **stated: Any) -> Pipeline:
    """A pipeline that says of itself what the published ones say."""
    pipeline = Pipeline(family, **SIZES)
    vars(pipeline).update(num_frame_per_block=block, frame_seq_length=1560, **stated)
    for attention in attentions_of(pipeline.transformer):
        attention.sink_size = sink
        if family == "Rolling Forcing":
            attention.frame_length, attention.block_length, attention.max_attention_size = 1560, 4680, 32760
        elif window is not None:
            attention.local_attn_size, attention.max_attention_size = window, 32760 if window < 0 else window * 1560
    return pipeline


def numbers(config: RetrievalConfig) -> tuple[int, int, int, int, int, str]:
    return (
        config.context_frames, config.sink_frames, config.memory_frames, config.recency_guard, config.block_frames,
        config.positions,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "stated", "memory", "native"),
    [
        ("Self-Forcing", {"window": 12}, (12, 1, 6, 5, 3, "relative"), (12, 1, 0, 5, 3, "absolute")),
        ("Self-Forcing", {"window": -1, "sink": 0}, (21, 0, 6, 5, 3, "relative"), (21, 0, 0, 5, 3, "absolute")),
        ("Self-Forcing", {"window": 9, "block": 1}, (9, 1, 5, 5, 1, "relative"), (9, 1, 0, 5, 1, "absolute")),
        ("CausVid", {"window": None, "sink": 0}, (21, 0, 6, 5, 3, "relative"), (21, 0, 0, 5, 3, "absolute")),
        ("LongLive", {"sink": 3}, (12, 3, 4, 5, 3, "relative"), (12, 3, 0, 5, 3, "absolute")),
        ("MemFlow", {"sink": 3}, (12, 3, 4, 5, 3, "relative"), (12, 3, 0, 5, 3, "absolute")),
        ("Infinity-RoPE", {"window": 6}, (6, 1, 1, 5, 3, "relative"), (6, 1, 0, 5, 3, "relative")),
        (
            "Rolling Forcing",
            {"denoising_step_list": torch.arange(5)},
            (21, 3, 1, 5, 3, "relative"),
            (21, 3, 0, 5, 3, "relative"),
        ),
        (
            "krea realtime",
            {"window": -1, "sink": 0, "local_attn_size": 9},
            (9, 1, 3, 5, 3, "relative"),
            (9, 1, 0, 5, 3, "relative"),
        ),
        (
            "LongLive 2",
            {"window": -1, "local_attn_size": 32, "sink_size": 8, "block": 8, "use_relative_rope": False},
            (32, 8, 6, 5, 8, "absolute"),
            (32, 8, 0, 5, 8, "absolute"),
        ),
        (
            "LongLive 2",
            {"window": 32, "sink": 8, "block": 8, "use_relative_rope": True},
            (32, 8, 6, 5, 8, "relative"),
            (32, 8, 0, 5, 8, "relative"),
        ),
        (
            "LongLive-RAG",
            {"args": SimpleNamespace(model_kwargs=SimpleNamespace(memory_size=4, recent_exclude=3))},
            (12, 1, 4, 3, 3, "relative"),
            (12, 1, 0, 5, 3, "relative"),
        ),
    ],
)
def test_what_the_repositories_say_of_themselves(family: str, stated: dict[str, Any], memory: Any, native: Any) -> None:
    pipeline = pipeline_of(family, **stated)
    assert numbers(RetrievalConfig.from_backbone(pipeline)) == memory
    with patch(pipeline) as patched:
        assert numbers(patched.config) == memory
    with patch(pipeline, "native") as patched:
        assert numbers(patched.config) == native


def test_the_infinity_mode_of_longlive_is_relative() -> None:
    transformer = Transformer(InfinityAttention, **SIZES)
    for attention in attentions_of(transformer):
        attention.local_attn_size, attention.sink_size = 12, 3
    with patch(Wrapper(transformer), "native") as patched:
        assert patched.family == "LongLive" and patched.config.positions == "relative"


@pytest.mark.parametrize("family", sorted(set(ATTENTIONS) - {"CausVid"}))
def test_a_model_that_says_nothing_gets_the_paper_s(family: str) -> None:
    pipeline = Pipeline(family, **SIZES)
    assert RetrievalConfig.from_backbone(pipeline) == RetrievalConfig()
    with pytest.raises(ValueError, match="config must be a RetrievalConfig .* does not say what its own window is"):
        patch(pipeline, "native")


def test_a_window_without_room_for_memory() -> None:
    pipeline = pipeline_of("Self-Forcing", window=3, sink=0)
    with pytest.raises(ValueError, match="own window of 3 latent frames.*leaves no room for memory"):
        patch(pipeline)
    with patch(pipeline, "native") as patched:
        assert numbers(patched.config) == (3, 0, 0, 5, 3, "absolute")


def test_what_is_in_force_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "longlive_rag"), patch(pipeline_of("Self-Forcing")):
        assert "Self-Forcing model patched with RetrievalConfig(context_frames=12, sink_frames=1, memory" in caplog.text


def test_the_device_holds_little_at_first(pipeline: Pipeline) -> None:
    with patch(pipeline, CONFIG) as patched:
        generate(pipeline, 1)
        memory = patched._attachment.followers.all[0].memory
        assert memory.usage().device.bytes == (CONFIG.context_frames + CONFIG.block_frames) * FRAME_BYTES


class TestPromptSwitchWithABudget:
    """The switch makes the newest 5 frames again in one pass, which also sees the sink and 2 of memory: 8."""

    def video(self, pipeline: Pipeline) -> torch.Tensor:
        cache, parts = pipeline.cache(1, 5 * TOKENS), []
        parts.append(generate(pipeline, 12, cache=cache))
        again = parts[0][:, 7:12]
        call = {"kv_cache": cache, "current_start": 7 * TOKENS}
        pipeline.generator(again, torch.ones(1, 4, 8), torch.zeros(1, 5), **call)
        parts.append(generate(pipeline, 4, first=12, cache=cache))
        return torch.cat(parts, dim=1)

    @pytest.fixture
    def interactive(self) -> Pipeline:
        torch.manual_seed(0)
        pipeline = pipeline_of("LongLive", window=5, block=1, _recache_after_switch=lambda *_: None)
        return pipeline

    def test_enough_gives_the_same_video(self, interactive: Pipeline) -> None:
        with patch(interactive, CONFIG) as patched:
            expected, retrieved = self.video(interactive), [entry.frames for entry in patched.retrieved]
        with patch(interactive, CONFIG, budget=Budget(device=8 * FRAME_BYTES)) as patched:
            assert torch.equal(self.video(interactive), expected)
            assert [entry.frames for entry in patched.retrieved] == retrieved

    def test_too_little_is_refused_before_the_video_begins(self, interactive: Pipeline) -> None:
        refused = pytest.raises(ValueError, match=r"budget.device must be at least .*8 latent frames.* of LongLive")
        with patch(interactive, CONFIG, budget=Budget(device=8 * FRAME_BYTES - 1)), refused:
            generate(interactive, 1)

    def test_a_model_alone_may_never_switch(self, interactive: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
        with patch(interactive.generator, CONFIG, budget=Budget(device=7 * FRAME_BYTES)):
            generate(interactive, 12)
            assert "8 latent frames) for a prompt switch" in caplog.text


@pytest.mark.parametrize(("stated", "begins_anew"), [(True, False), (False, True), (None, False)])
def test_memflow_asks_its_pipeline_what_a_switch_does_with_the_sink(
    stated: bool | None, begins_anew: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline("MemFlow", **SIZES)
    if stated is not None:
        vars(pipeline)["global_sink"] = stated
    with patch(pipeline, CONFIG) as patched:
        cache = pipeline.cache(1, 5 * TOKENS)
        video = generate(pipeline, 8, cache=cache)
        call = {"kv_cache": cache, "current_start": 3 * TOKENS, "is_recache": True}
        pipeline.generator(video[:, 3:], torch.ones(1, 4, 8), torch.zeros(1, 5), **call)
        (follower,) = patched._attachment.followers.all
        assert (follower.memory.bank.frames() == list(range(5))) is begins_anew
        assert ("global_sink" in caplog.text) is (stated is None)


def test_a_backbone_is_found_as_patch_finds_it() -> None:
    with pytest.raises(TypeError, match="model must be a causal video transformer"):
        RetrievalConfig.from_backbone(3)
    assert find_transformer(pipeline_of("krea realtime")).family.name == "krea realtime"
