"""The roll-out as its users see it: streaming, seeds, prompts that change, cancelling, wrong input."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longlive_rag import RetrievalConfig, rollout, stream
from longlive_rag.config import PAPER_STEPS
from longlive_rag.generation.sampling import Renoise, Sampling, denoise, warp_steps
from longlive_rag.models import CausalWanModel
from longlive_rag.selection import ReplaySelection

CONFIG = RetrievalConfig(context_frames=6, sink_frames=1, memory_frames=2, recency_guard=1, block_frames=2)


@pytest.fixture(scope="module")
def model() -> CausalWanModel:
    torch.manual_seed(0)
    return CausalWanModel(
        dim=32, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=2, in_dim=4, out_dim=4
    ).eval()


def noise(frames: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, frames, 4, 4, 6, generator=torch.Generator().manual_seed(seed))


PROMPT = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2))
OTHER = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(3))


def test_streaming_yields_what_rollout_collects(model: CausalWanModel) -> None:
    blocks = list(stream(model, noise(16).split(2, dim=1), PROMPT, CONFIG))
    result = rollout(model, noise(16), PROMPT, CONFIG)
    assert [block.start for block in blocks] == list(range(0, 16, 2))
    assert torch.equal(torch.cat([block.latents for block in blocks], dim=1), result.latents)
    assert torch.equal(torch.cat([block.embeddings for block in blocks], dim=1), result.embeddings)
    assert [b.retrieval.frames for b in blocks if b.retrieval] == [entry.frames for entry in result.retrieved]
    assert not result.interrupted


class _Reads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: values read, and copies to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::item"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_block_reads_one_value_of_the_device(model: CausalWanModel) -> None:
    """The deferred check of its noise. Every other read would let the device idle.

    On a CPU the attention and the tables take the shorter way of looking at values; they are left out.
    """
    blocks = stream(model, noise(20).split(2, dim=1), PROMPT, CONFIG)
    with mock.patch("longlive_rag.memory.RetrievalMemory.attend", lambda self, layer, q, k, v, **_: q.flatten(1, 2)):
        next(blocks)
        for _ in range(7):
            with _Reads() as reads:
                next(blocks)
            assert reads.seen == ["aten::_local_scalar_dense"]


def test_a_block_of_bad_noise_is_not_yielded(model: CausalWanModel) -> None:
    draws = list(noise(8).split(2, dim=1))
    draws[2][0, 1, 0, 0, 0] = torch.inf
    seen = []
    with pytest.raises(ValueError, match="noise must be finite"):
        for block in stream(model, draws, PROMPT, CONFIG):
            seen.append(block.start)
    assert seen == [0, 2]


def test_a_sampling_is_what_rollout_takes_apart(model: CausalWanModel) -> None:
    settings: dict[str, Any] = {"denoising_steps": (1000, 400), "timestep_shift": 3.0, "context_noise": 20.0, "seed": 7}
    blocks = stream(model, noise(8).split(2, dim=1), PROMPT, CONFIG, sampling=Sampling(**settings))
    result = rollout(model, noise(8), PROMPT, CONFIG, **settings)
    assert torch.equal(torch.cat([block.latents for block in blocks], dim=1), result.latents)
    assert Sampling().denoising_steps == PAPER_STEPS and Sampling().timesteps == warp_steps(PAPER_STEPS, 5.0)
    for name in settings:
        other = rollout(model, noise(8), PROMPT, CONFIG, **{**settings, name: getattr(Sampling(), name)})
        assert not torch.allclose(other.latents, result.latents), name


def test_a_seed_fixes_the_video_and_each_video_of_a_batch_has_its_own(model: CausalWanModel) -> None:
    once, again = (rollout(model, noise(12), PROMPT, CONFIG, seed=5) for _ in range(2))
    other = rollout(model, noise(12), PROMPT, CONFIG, seed=6)
    assert torch.equal(once.latents, again.latents)
    assert not torch.allclose(once.latents, other.latents)
    batch = rollout(model, noise(12).expand(2, -1, -1, -1, -1).clone(), PROMPT, CONFIG, seed=5)
    torch.testing.assert_close(batch.latents, torch.cat([once.latents, other.latents]), rtol=1e-4, atol=1e-4)


def test_a_prompt_switch_changes_what_follows_and_nothing_before(model: CausalWanModel) -> None:
    plain = rollout(model, noise(12), PROMPT, CONFIG)
    switched = rollout(model, noise(12), [(6, OTHER), (0, PROMPT)], CONFIG)
    assert torch.equal(plain.latents[:, :6], switched.latents[:, :6])
    assert not torch.allclose(plain.latents[:, 6:8], switched.latents[:, 6:8])


def test_given_frames_stand_as_they_are(model: CausalWanModel) -> None:
    first = rollout(model, noise(8), PROMPT, CONFIG)
    replaced = first.latents.clone()
    continued = rollout(model, noise(12, seed=9), PROMPT, CONFIG, given=replaced)
    assert torch.equal(continued.latents[:, :8], replaced)
    other = rollout(model, noise(12, seed=9), PROMPT, CONFIG, given=replaced + 1)
    assert not torch.allclose(other.latents[:, 8:], continued.latents[:, 8:])


@pytest.mark.parametrize("query", ["latest", "draft"])
def test_a_stopped_video_is_gone_on_with_bit_by_bit(model: CausalWanModel, query: Any) -> None:
    config = replace(CONFIG, query=query)

    def renoise(skipped: int) -> Renoise:
        return lambda index, shape: _fresh(None, index + skipped, shape)

    whole = rollout(model, noise(20), PROMPT, config, renoise=renoise(0))
    kept = {block.block_start: (block.frames, block.similarity) for block in whole.retrieved if block.block_start < 14}
    selection = ReplaySelection(kept)
    given, skipped = whole.latents[:, :14], 7 * (len(PAPER_STEPS) - 1)
    for latents in (given, iter(given.split(2, dim=1))):
        later = stream(
            model, noise(20).split(2, dim=1), PROMPT, config,
            sampling=Sampling(renoise=renoise(skipped)), selection=selection, given=latents,
        )  # fmt: skip
        blocks = list(later)
        assert torch.equal(torch.cat([block.latents for block in blocks], dim=1), whole.latents)
        assert torch.equal(torch.cat([block.embeddings for block in blocks], dim=1), whole.embeddings)
        retrieved = [block.retrieval for block in blocks if block.retrieval is not None]
        assert [block.frames for block in retrieved] == [block.frames for block in whole.retrieved]
        assert [block.similarity for block in retrieved] == [block.similarity for block in whole.retrieved]


def test_cancelling_keeps_what_is_done(model: CausalWanModel) -> None:
    complete = rollout(model, noise(12), PROMPT, CONFIG, renoise=partial(_fresh, None))
    result = rollout(model, noise(12), PROMPT, CONFIG, renoise=partial(_fresh, 10))
    assert result.interrupted
    assert 0 < result.latents.shape[1] < 12
    assert torch.equal(result.latents, complete.latents[:, : result.latents.shape[1]])


def _fresh(stop: int | None, index: int, shape: tuple[int, ...]) -> Tensor:
    if index == stop:
        raise KeyboardInterrupt
    return torch.randn(shape, generator=torch.Generator().manual_seed(index))


def test_a_draft_query_retrieves_for_the_block_at_hand(model: CausalWanModel) -> None:
    config = RetrievalConfig(
        context_frames=6, sink_frames=1, memory_frames=2, recency_guard=1, block_frames=2, query="draft"
    )
    latest, draft = rollout(model, noise(20), PROMPT, CONFIG), rollout(model, noise(20), PROMPT, config)
    assert [entry.block_start for entry in draft.retrieved] == [entry.block_start for entry in latest.retrieved]
    assert [entry.similarity for entry in draft.retrieved] != [entry.similarity for entry in latest.retrieved]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noise": noise(11)}, ValueError, "noise must hold whole blocks of 2 latent frames, got 11"),
        ({"noise": noise(4)[..., :5]}, ValueError, r"height and width divisible by the patch \(2, 2\), got 4 x 5"),
        ({"noise": noise(4).long()}, TypeError, "noise must be floating point, got torch.int64"),
        ({"noise": noise(4)[:, :, :3]}, ValueError, r"noise must be \[B, frames, 4, height, width\]"),
        ({"noise": noise(4) * float("nan")}, ValueError, "noise must be finite"),
        ({"noise": "noise"}, TypeError, "noise must be a tensor, got str"),
        ({"prompt_embeds": PROMPT.expand(3, -1, -1)}, ValueError, r"prompt_embeds must be \[1 or 1, text_len"),
        ({"prompt_embeds": torch.randn(1, 5, 8)}, ValueError, r"prompt_embeds must be \[B, at most 4, 8\]"),
        ({"prompt_embeds": PROMPT / 0}, ValueError, "prompt_embeds must be finite"),
        ({"prompt_embeds": [(2, PROMPT)]}, ValueError, "must begin with a prompt for latent frame 0, got 2"),
        ({"prompt_embeds": None}, TypeError, "prompt_embeds must be a tensor or a list of .*, got NoneType"),
        ({"config": {}}, TypeError, "config must be a RetrievalConfig, got dict"),
        ({"embedding": torch.mean}, TypeError, "embedding must have a method embed"),
        ({"denoising_steps": [250, 500]}, ValueError, "denoising_steps must descend strictly"),
        ({"denoising_steps": []}, ValueError, "denoising_steps must descend strictly"),
        ({"timestep_shift": 0}, ValueError, "timestep_shift must be positive, got 0"),
        ({"seed": -1}, ValueError, r"seed must be from 0 to 2\*\*63 - 1, got -1"),
        ({"context_noise": 1001}, ValueError, "context_noise must be a timestep from 0 to 1000"),
        ({"given": noise(3)}, ValueError, "given must hold whole blocks of 2 latent frames, got 3"),
        ({"given": noise(2, batch=2)}, ValueError, r"given must be \[1, n, 4, 4, 6\] like the noise"),
    ],
)
def test_wrong_input_is_named(
    model: CausalWanModel, change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments: dict[str, object] = {"noise": noise(4), "prompt_embeds": PROMPT, "config": CONFIG, **change}
    with pytest.raises(error, match=message):
        rollout(model, **arguments)  # type: ignore[arg-type]


def test_the_sampler_finds_a_known_clean_latent() -> None:
    """With the true flow of one clean latent, every step predicts that latent, whatever the noise."""
    clean = torch.randn(1, 2, 4, 4, 6)
    timesteps = warp_steps([1000, 750, 500, 250], 5.0)

    def true_flow(latents: Tensor, timestep: Tensor) -> Tensor:
        return (latents - clean) / (timestep / 1000)[..., None, None, None]

    for prediction in denoise(true_flow, noise(2), timesteps, lambda b, f, s: torch.randn(b, f, *s)):
        torch.testing.assert_close(prediction, clean, rtol=1e-5, atol=1e-5)


def test_a_function_steers_a_video_while_it_grows(model: CausalWanModel) -> None:
    other = PROMPT + 1
    asked: list[int] = []

    def steer(start: int) -> torch.Tensor:
        asked.append(start)
        return PROMPT if start < 4 else other

    steered = stream(model, noise(8).split(CONFIG.block_frames, dim=1), steer, CONFIG)
    blocks = [next(steered)]
    assert asked == [0], "later prompts are asked for when their blocks begin"
    blocks += steered
    scheduled = list(stream(model, noise(8).split(CONFIG.block_frames, dim=1), [(0, PROMPT), (4, other)], CONFIG))
    for one, same in zip(blocks, scheduled, strict=True):
        assert torch.equal(one.latents, same.latents)
