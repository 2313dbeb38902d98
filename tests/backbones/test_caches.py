"""Which cache belongs to which video, and what is left of a video when the next one has another size."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from longlive_rag import patch
from support.causal_doubles import Pipeline
from support.tiny_videos import CONFIG, TOKENS, generate, noise


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
        (follower,) = patched._attachment.followers.all
        pages = follower.memory.bank.k_pages[0]
        gc.collect()
        assert torch.equal(generate(pipeline, 9), first)
        assert patched._attachment.followers.all == [follower]
        assert follower.memory.bank.k_pages[0] is pages


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


@pytest.mark.parametrize(
    "change", [{"size": (4, 2)}, {"batch": 2}, {"size": (4, 4)}], ids=["portrait", "batch", "more tokens"]
)
def test_a_cache_that_is_used_again_for_videos_of_another_kind(pipeline: Pipeline, change: dict[str, Any]) -> None:
    """Pipelines keep their cache between videos; its tensor says nothing of the grid."""
    with patch(pipeline, CONFIG):
        landscape = generate(pipeline, 9)
    with patch(pipeline, CONFIG):
        other = generate(pipeline, 9, **change)
    cache = pipeline.cache(2, 5 * 4)
    with patch(pipeline, CONFIG) as patched:
        assert torch.equal(generate(pipeline, 9, cache=cache), landscape)
        assert torch.equal(generate(pipeline, 9, cache=cache, **change), other)
        assert torch.equal(generate(pipeline, 9, cache=cache), landscape)
        videos = [*patched.earlier_videos, patched.retrieved]
        assert [[entry.block_start for entry in video] for video in videos] == [[6, 7, 8]] * 3
        assert [len(video[0].frames) for video in videos] == [1, change.get("batch", 1), 1]


def test_a_cache_that_is_used_again_in_another_precision(pipeline: Pipeline) -> None:
    cache = pipeline.cache(1, 5 * TOKENS)
    with patch(pipeline, CONFIG) as patched:
        generate(pipeline, 9, cache=cache)
        pipeline.generator.bfloat16()
        again = generate(pipeline, 9, cache=cache)
        assert again.dtype == torch.bfloat16 and len(patched.earlier_videos) == 1
    with patch(pipeline, CONFIG):
        assert torch.equal(generate(pipeline, 9), again)


@pytest.mark.parametrize("wrong", [{"frame_tokens": 1}, {"frame_tokens": 4}, {"frame_tokens": 2, "size": (4, 4)}])
def test_a_run_with_a_wrong_frame_seq_length_does_not_spoil_the_next(pipeline: Pipeline, wrong: dict[str, Any]) -> None:
    with patch(pipeline, CONFIG):
        expected = generate(pipeline, 9)
    cache = pipeline.cache(1, 5 * TOKENS)
    with patch(pipeline, CONFIG):
        with pytest.raises(ValueError, match=r"frame_seq_length|start must be at most"):
            generate(pipeline, 9, cache=cache, **wrong)
        assert torch.equal(generate(pipeline, 9, cache=cache), expected)


def test_records_survive_a_change_of_size(pipeline: Pipeline) -> None:
    """Here with a new cache for each video; what is recorded is on the CPU, and holds for its own video."""
    sizes = [(2, 4), (4, 2), (4, 4), (2, 4)]
    alone = []
    for size in sizes:
        with patch(pipeline, CONFIG) as patched:
            generate(pipeline, 9, size=size)
            alone.append([entry.frames for entry in patched.retrieved])
    with patch(pipeline, CONFIG) as patched:
        for size in sizes:
            generate(pipeline, 9, size=size)
        videos = [*patched.earlier_videos, patched.retrieved]
        assert [[entry.frames for entry in video] for video in videos] == alone
        assert len(patched._attachment.followers.all) == 1


def test_records_of_caches_that_live_on(pipeline: Pipeline) -> None:
    """A cache for each size: the last video is the one that began last, whichever cache it is in."""
    caches = {size: pipeline.cache(1, 5 * 4) for size in ((2, 4), (4, 4))}
    with patch(pipeline, CONFIG) as patched:
        for video, (size, frames) in enumerate([((2, 4), 7), ((4, 4), 8), ((2, 4), 9), ((2, 4), 10)]):
            generate(pipeline, frames, size=size, cache=caches[size])
            assert [entry.block_start for entry in patched.retrieved] == list(range(6, frames))
            assert [len(earlier) for earlier in patched.earlier_videos] == [1, 2, 3][:video]


def test_guidance_makes_one_record(pipeline: Pipeline) -> None:
    """Its conditional and unconditional caches alternate, and make one video, then another."""
    caches = [pipeline.cache(1, 5 * TOKENS) for _ in range(2)]
    with patch(pipeline, CONFIG) as patched:
        for video in range(2):
            for start in range(9):
                for cache in caches:
                    call = {"kv_cache": cache, "current_start": start * TOKENS}
                    pipeline.generator(noise(1, start), torch.ones(1, 4, 8), torch.zeros(1, 1), **call)
            assert [entry.block_start for entry in patched.retrieved] == [6, 7, 8]
            assert len(patched.earlier_videos) == video


def test_reset_keeps_the_record(pipeline: Pipeline) -> None:
    with patch(pipeline, CONFIG) as patched:
        generate(pipeline, 9)
        patched.reset()
        assert patched.retrieved == [] and [len(video) for video in patched.earlier_videos] == [3]


def test_a_released_cache_is_forgotten_with_the_pipeline_s(pipeline: Pipeline) -> None:
    """Only what is still in use comes back, under whatever name it is held."""
    cache, gone = pipeline.cache(1, 5 * TOKENS), pipeline.cache(1, 5 * TOKENS)
    with torch.inference_mode(), patch(pipeline, CONFIG, release_cache=True) as patched:
        for each in (gone, cache):
            generate(pipeline, 2, cache=each)
        assert patched.released_bytes == 2 * sum(
            layer["k"].nbytes + layer["v"].nbytes for layer in pipeline.cache(1, 10)
        )
        del gone, each
        gc.collect()
        moved = [dict(layer) for layer in cache]
        cache.clear()
    assert all(layer[name].shape == (1, 10, 2, 16) and not layer[name].any() for layer in moved for name in ("k", "v"))
