"""What nobody plans for: threads, other processes, gradients in the middle, patches that come too early or too late."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from typing import Any

import pytest
import torch

from longlive_rag import patch
from support.causal_doubles import NativeAttentionReached, Pipeline
from support.tiny_videos import CONFIG, TOKENS, generate


def test_threads_take_turns(pipeline: Pipeline) -> None:
    """As in a server: each thread has its own cache, and so its own memory; all share the model."""
    expected = []
    for seed in range(3):
        with patch(pipeline, CONFIG):
            expected.append(generate(pipeline, 12, seed=seed))
    videos: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        with torch.no_grad():
            videos[seed] = generate(pipeline, 12, seed=seed)

    with patch(pipeline, CONFIG):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [torch.equal(videos[seed], expected[seed]) for seed in range(3)] == [True] * 3


def test_another_process_is_refused_the_model(pipeline: Pipeline) -> None:
    """It would get a copy."""
    process = multiprocessing.get_context("spawn").Process(target=generate, args=(pipeline, 1))
    with patch(pipeline, CONFIG), pytest.raises(TypeError, match="patched model cannot be copied, pickled"):
        process.start()


def test_inference_mode_with_another_size_in_between(pipeline: Pipeline) -> None:
    with patch(pipeline, CONFIG):
        small, large = generate(pipeline, 9), generate(pipeline, 9, size=(4, 4))
    cache = pipeline.cache(1, 5 * 4)
    with patch(pipeline, CONFIG) as patched:
        with torch.inference_mode():
            first = generate(pipeline, 9, cache=cache)
            second = generate(pipeline, 9, cache=cache, size=(4, 4))
        third = generate(pipeline, 9, cache=cache)
        assert len(patched.earlier_videos) == 2
    assert torch.equal(first, small) and torch.equal(second, large) and torch.equal(third, small)


class TestGradients:
    """They go to the model's own attention, which reads its own cache."""

    @pytest.fixture
    def trained(self, pipeline: Pipeline) -> Pipeline:
        pipeline.generator.requires_grad_(True)
        return pipeline

    def test_in_the_middle_of_a_video(self, trained: Pipeline) -> None:
        """The blocks before are in memory, and the cache is empty."""
        cache = trained.cache(1, 5 * TOKENS)
        with patch(trained, CONFIG):
            generate(trained, 3, cache=cache)
            with torch.enable_grad(), pytest.raises(RuntimeError, match=r"gradients.*went to memory.*no_grad"):
                generate(trained, 1, first=3, cache=cache)
            with torch.enable_grad(), pytest.raises(NativeAttentionReached):
                generate(trained, 1, cache=cache)

    def test_with_a_cache_that_was_freed(self, trained: Pipeline) -> None:
        cache = trained.cache(1, 5 * TOKENS)
        with patch(trained, CONFIG, release_cache=True):
            generate(trained, 3, cache=cache)
            with torch.enable_grad(), pytest.raises(RuntimeError, match=r"gradients.*cache does not hold them"):
                generate(trained, 1, cache=cache)


@pytest.mark.parametrize("first", [0, 3])
def test_a_patch_in_the_middle_of_a_video_is_noticed(
    pipeline: Pipeline, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    with patch(pipeline, CONFIG), caplog.at_level(logging.WARNING):
        generate(pipeline, 3, first=first)
    told = [record.getMessage() for record in caplog.records]
    assert told == ([] if first == 0 else ["memory begins at latent frame 3, and has nothing of what came before it"])


def test_two_pipelines_around_one_model(pipeline: Pipeline) -> None:
    other: Any = Pipeline.__new__(Pipeline)
    other.generator = pipeline.generator
    with patch(pipeline, CONFIG):
        expected = generate(pipeline, 9)
        assert torch.equal(generate(other, 9), expected)
        with pytest.raises(ValueError, match="patched already"):
            patch(other, CONFIG)
