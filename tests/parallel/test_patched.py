"""A patched model on 2 and 3 ranks, each attending with its heads, makes the video of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longlive_rag import Budget, RetrievalConfig, patch
from longlive_rag.backbones.patching import Patched
from longlive_rag.generation.sampling import warp_steps
from support.causal_doubles import ATTENTIONS, Pipeline
from support.comfyui_doubles import CausalWan, sample
from support.ranks import run_ranks
from support.tiny_videos import CONFIG, SIZES, TOKENS, generate

HEADS: dict[str, Any] = {**SIZES, "dim": 48, "num_heads": 6}
PAGE = 2 * SIZES["num_layers"] * TOKENS * 48 * 4
"""Bytes of a latent frame's keys and values in float32."""
Made = tuple[Tensor, list[list[list[int]]], list[int]]
"""A video, what its blocks retrieved, and the bytes of the device and below it that hold keys and values."""


def result(patched: Patched, video: Tensor) -> Made:
    usages = [follower.memory.usage() for follower in patched._attachment.followers.all]
    held = [sum(getattr(usage, tier).bytes for usage in usages) for tier in ("device", "host")]
    return video, [entry.frames for entry in patched.retrieved], held


def double(family: str, config: RetrievalConfig = CONFIG, **options: Any) -> Callable[[Any, int], Made]:
    def make(group: Any, ranks: int) -> Made:
        torch.manual_seed(0)
        pipeline = Pipeline(family, **HEADS)
        budget = Budget(device=6 * PAGE // ranks, host=20 * PAGE // ranks) if options.get("budget") else None
        with patch(pipeline, config, budget=budget, group=group) as patched:
            return result(patched, generate(pipeline, 12, batch=options.get("batch", 1)))

    return make


def out_of_inference_mode(group: Any, ranks: int) -> Made:
    """What lives on from a video that was made in it must serve the next one."""
    torch.manual_seed(0)
    pipeline = Pipeline("Self-Forcing", **HEADS)
    with patch(pipeline, CONFIG, group=group) as patched:
        with torch.inference_mode():
            generate(pipeline, 4)
        return result(patched, generate(pipeline, 12))


def comfyui(group: Any, ranks: int) -> Made:
    torch.manual_seed(0)
    model = CausalWan(**HEADS)
    draws = torch.Generator().manual_seed(1)
    noise, prompt = torch.randn(1, 18, 16, 4, 4, generator=draws), torch.randn(1, 4, 8, generator=draws)
    config = RetrievalConfig(context_frames=8, sink_frames=1, memory_frames=2, recency_guard=0)
    with patch(model, config, group=group) as patched:
        steps = warp_steps([1000, 500], 5.0)
        video = sample(
            model, noise, prompt, steps, 3, lambda _, frames: torch.randn(1, frames, 16, 4, 4, generator=draws)
        )
        return result(patched, video)


CASES: dict[str, Callable[..., Made]] = {
    **{family: double(family) for family in ATTENTIONS},
    "draft query, two videos": double("Self-Forcing", replace(CONFIG, query="draft"), batch=2),
    "device budget": double("Self-Forcing", budget=True),
    "in inference mode, then out of it": out_of_inference_mode,
    "ComfyUI": comfyui,
}


def on_rank(rank: int, ranks: int) -> tuple[dict[str, Made], str]:
    group = dist.group.WORLD
    with torch.no_grad():
        made = {name: make(group, ranks) for name, make in CASES.items() if runs(name, ranks)}
        pipeline = Pipeline("Self-Forcing", **HEADS)
        torch.nn.init.normal_(
            pipeline.transformer.patch_embedding.weight, generator=torch.Generator().manual_seed(rank)
        )
        with patch(pipeline, CONFIG, group=group), pytest.raises(RuntimeError) as other_weights:
            generate(pipeline, 4)
    return made, str(other_weights.value)


def runs(name: str, ranks: int) -> bool:
    """With three ranks, families that attend alike are not made again."""
    return ranks == 2 or name in ("Self-Forcing", "Rolling Forcing", "LongLive 2", "device budget")


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_has_the_video_of_one_process(ranks: int) -> None:
    said = run_ranks(ranks, on_rank, ranks)
    for name, make in CASES.items():
        if not runs(name, ranks):
            continue
        with torch.no_grad():
            video, frames, held = make(None, 1)
        assert any(any(row) for row in frames), name
        for made, _ in said:
            assert made[name][1] == frames, name
            # The same sums of float32; libraries may order them by the number of heads.
            torch.testing.assert_close(made[name][0], video, rtol=0, atol=1e-6, msg=name)
            assert torch.equal(made[name][0], said[0][0][name][0]), name
            assert [size * ranks for size in made[name][2]] == held, name
        assert held[1] > 0 or name != "device budget"
    for _, message in said:
        assert "the latents of the block at frame 0 on rank 1" in message and "the same weights" in message


def test_what_the_repository_splits_itself_is_refused() -> None:
    """Attention that is given a part of the tokens, as under a repository's own sequence parallelism."""
    pipeline = Pipeline("LongLive 2", **HEADS)
    transformer: Any = pipeline.transformer
    attend = transformer.attend
    transformer.attend = lambda attention, x, *rest, **extra: attend(attention, x[:, :1], *rest, **extra)
    with (
        torch.no_grad(),
        patch(pipeline, CONFIG),
        pytest.raises(ValueError, match=r"all 2 tokens of a pass, got 1: turn its own sequence .* parallelism off"),
    ):
        generate(pipeline, 1)


def anyflow(rank: int) -> Made:
    """Whose pass that fills its caches writes keys once more."""
    from backbones.test_anyflow import CONFIG, generate, transformer

    model = transformer(full_chunk_limit=3)
    with torch.no_grad(), patch(model, CONFIG, group=dist.group.WORLD) as patched:
        return result(patched, generate(model, [1, 2, 2, 2, 2]))


def test_anyflow_on_two_ranks_has_the_video_of_one_process() -> None:
    pytest.importorskip("diffusers", minversion="0.42")
    ((video, frames, held),) = run_ranks(1, anyflow)
    for shared_video, shared_frames, share in run_ranks(2, anyflow):
        assert shared_frames == frames and any(any(row) for row in frames)
        torch.testing.assert_close(shared_video, video, rtol=0, atol=1e-6)
        assert [2 * size for size in share] == held


def test_what_diffusers_splits_itself_is_refused() -> None:
    pytest.importorskip("diffusers", minversion="0.42")
    from backbones.test_anyflow import CONFIG, transformer

    model = transformer(full_chunk_limit=3)
    model._parallel_config = SimpleNamespace(context_parallel_config=object())
    with pytest.raises(ValueError, match=r"not be split over processes by diffusers \(enable_parallelism\)"):
        patch(model, CONFIG)
