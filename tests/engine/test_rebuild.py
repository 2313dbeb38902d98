"""Keys and values that were rebuilt from latents, and whole roll-outs within a budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longlive_rag import Budget, RetrievalConfig, RetrievalMemory, patch, rollout
from longlive_rag.embedding import AveragePool
from longlive_rag.generation.rollout import RolloutResult, stream
from longlive_rag.models import CausalWanModel

CONFIG = RetrievalConfig(context_frames=6, sink_frames=1, memory_frames=2, recency_guard=0, block_frames=2)
PAGE = 2 * 2 * 32 * 4 * 4
"""Bytes of a frame of one video: keys and values, 2 layers, width 32, 4 tokens, float32."""
TIERS = {
    "host": Budget(device=2 * 8 * PAGE),
    "disk": Budget(device=2 * 8 * PAGE, host=4 * PAGE, disk=10**7),
    "disk alone": Budget(device=2 * 6 * PAGE, host=0, disk=10**7),
}


@pytest.fixture(scope="module")
def model() -> CausalWanModel:
    torch.manual_seed(0)
    return CausalWanModel(
        dim=32, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=2, in_dim=4, out_dim=4
    ).eval()


def make(model: CausalWanModel, budget: Budget | None = None) -> RolloutResult:
    generator = torch.Generator().manual_seed(1)
    noise, prompt = torch.randn(2, 40, 4, 4, 4, generator=generator), torch.randn(2, 4, 8, generator=generator)
    return rollout(model, noise, [(0, prompt), (14, prompt.flip(0))], CONFIG, budget=budget)


@pytest.fixture(scope="module")
def expected(model: CausalWanModel) -> RolloutResult:
    return make(model)


@pytest.mark.parametrize("name", TIERS)
def test_a_video_within_a_budget_is_the_same_video(name: str, model: CausalWanModel, expected: RolloutResult) -> None:
    actual = make(model, TIERS[name])
    assert torch.equal(actual.latents, expected.latents)
    assert [entry.frames for entry in actual.retrieved] == [entry.frames for entry in expected.retrieved]


def test_rebuilt_pages_are_exact_in_the_first_layer(model: CausalWanModel) -> None:
    """And in every layer where the block saw nothing but itself and the sink, up to rounding: the batch is another."""
    generator = torch.Generator().manual_seed(2)
    noise, prompt = torch.randn(2, 24, 4, 4, 4, generator=generator), torch.randn(2, 4, 8, generator=generator)
    seen: list[RetrievalMemory] = []
    original = RetrievalMemory.commit

    def commit(engine: RetrievalMemory, latents: Tensor) -> Tensor:
        seen.append(engine)
        return original(engine, latents)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RetrievalMemory, "commit", commit)
        for block in stream(model, noise.split(2, dim=1), [(0, prompt), (8, prompt.flip(0))], CONFIG,
                            budget=Budget(rebuild=True)):  # fmt: skip
            engine, bank = seen[-1], seen[-1].bank
            if block.start not in (2, 20):
                continue
            assert bank.latents is not None
            for video in range(2):
                slots = {frame: bank.slot(video, frame) for frame in (block.start, block.start + 1)}
                resident = {frame: bank.slot(video, frame) for frame in range(block.start + 2)}
                pools = [*zip(bank.k_pages, bank.v_pages, strict=True)]
                before = [[pool[list(slots.values())].clone() for pool in pair] for pair in pools]
                for pair in pools:
                    for pool in pair:
                        pool[list(slots.values())] = torch.nan
                bank.latents.rebuild(video, slots, resident)
                after = [[pool[list(slots.values())].clone() for pool in pair] for pair in pools]
                for one, other in zip(before[0], after[0], strict=True):
                    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
                deeper = max((a - b).abs().max() for a, b in zip(before[1], after[1], strict=True))
                assert 1e-4 < deeper < 1, "the rest of the context is gone"
                for pair, page in zip(pools, before, strict=True):
                    for pool, content in zip(pair, page, strict=True):
                        pool[list(slots.values())] = content
    assert engine.committed == 24


def test_what_fits_nowhere_is_rebuilt(model: CausalWanModel, expected: RolloutResult) -> None:
    blocks = []
    generator = torch.Generator().manual_seed(1)
    noise, prompt = torch.randn(2, 40, 4, 4, 4, generator=generator), torch.randn(2, 4, 8, generator=generator)
    for block in stream(
        model, noise.split(2, dim=1), prompt, CONFIG, budget=Budget(device=2 * 8 * PAGE, host=2 * PAGE, rebuild=True)
    ):
        blocks.append(block)
        assert torch.isfinite(block.latents).all()
    usage = blocks[-1].usage
    assert usage.latents.frames == 2 * 40 - 2 * 8 - usage.host.frames and usage.forgotten == 0
    assert usage.latents.bytes == 2 * 40 * 4 * 4 * 4 * 4 and usage.host.bytes == 2 * PAGE


LONG = {
    "host": Budget(device=8 * PAGE, host=120 * PAGE),
    "disk": Budget(device=8 * PAGE, host=4 * PAGE, disk=10**7),
    "8 bits": Budget(device=8 * PAGE, host=4 * PAGE, disk=10**7, bits=8),
    "latents": Budget(device=8 * PAGE, host=0, rebuild=True),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_video_in_a_fixed_budget_retrieves_the_same_frames(name: str, model: CausalWanModel) -> None:
    """Over the same latents: with pages that are not what they were, a video of its own drifts apart. What ten minutes
    take is in benchmarks/long_video.py."""
    generator = torch.Generator().manual_seed(3)
    places = torch.randn(7, 1, 4, 4, 4, generator=generator)
    latents = torch.cat([places[frame // 6 % 7] for frame in range(120)])[None]
    latents = latents + 0.05 * torch.randn(latents.shape, generator=generator)
    prompt = torch.randn(1, 4, 8, generator=generator)
    plain, tiered = (
        list(stream(model, latents.split(2, dim=1), prompt, CONFIG, given=latents, budget=budget))
        for budget in (Budget(), LONG[name])
    )
    retrieved = [
        {block.start: block.retrieval.frames[0] for block in blocks if block.retrieval} for blocks in (plain, tiered)
    ]
    assert retrieved[1] == retrieved[0]
    old = [frame for start, frames in retrieved[0].items() for frame in frames if frame < start - 20]
    assert len(old) > 50, "which come back from below"
    assert {block.usage.device.bytes for block in tiered} == {8 * PAGE}
    assert len({block.usage.host.bytes for block in tiered[10:]}) == 1, "flat"
    usage = tiered[-1].usage
    assert usage.forgotten == 0 and sum(tier.frames for tier in usage[:4]) == 120
    if name != "latents":
        assert getattr(usage, "host" if name == "host" else "disk").frames > 100
    else:
        assert usage.latents.frames == 112


def test_running_out_of_memory_says_which_knob_to_turn(model: CausalWanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*arguments: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    monkeypatch.setattr(model.blocks[1], "forward", forward)
    wanted = (
        r"Tried to allocate 2.00 GiB. Keys and values take 32.77 KB of the device: lower budget.device .--device-memory"
    )
    with pytest.raises(torch.OutOfMemoryError, match=wanted):
        make(model, Budget(device=2 * 8 * PAGE))


def test_only_our_own_backbone_can_rebuild(model: CausalWanModel) -> None:
    with pytest.raises(ValueError, match="budget.rebuild needs the clean pass of the model"):
        RetrievalMemory.for_model(model, (1, 2, 4, 4, 4), CONFIG, embedding=AveragePool(), budget=Budget(rebuild=True))
    with pytest.raises(ValueError, match="budget.rebuild must be False"):
        patch(model, CONFIG, budget=Budget(rebuild=True))
