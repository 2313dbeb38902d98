"""One video on 2, 3 and 4 ranks is the video of one process: the same frames come back, and the latents are equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.torch_version import TorchVersion as Version

from longlive_rag import RetrievalConfig, rollout, stream
from longlive_rag.budget import Budget
from longlive_rag.generation.rollout import RolloutResult
from longlive_rag.generation.sampling import Sampling
from longlive_rag.models import CausalWanModel
from longlive_rag.parallel.costs import Pass
from longlive_rag.parallel.shards import Shards
from longlive_rag.selection import RandomSelection
from longlive_rag.small_world import backbone
from longlive_rag.small_world.measure import initial_noise
from support.ranks import run_ranks

CONFIG = RetrievalConfig(context_frames=6, sink_frames=1, memory_frames=2, recency_guard=1, block_frames=2)
STEPS = (1000, 500)
COMPILATIONS = 1 if Version(torch.__version__) >= Version("2.9") else 2
"""As in tests/engine/test_compile.py."""
PAGE = 2 * 2 * 10 * 192 * 4
"""Bytes of a latent frame: 2 layers, keys and values, 10 tokens of 192 numbers in float32."""


@cache
def model(layers: int = 2) -> CausalWanModel:
    """With 12 heads, which 2, 3 and 4 divide."""
    torch.manual_seed(0)
    return CausalWanModel(
        dim=192, ffn_dim=64, freq_dim=16, text_dim=8, text_len=4, num_heads=12, num_layers=layers, in_dim=4, out_dim=4
    ).eval()


def noise(frames: int = 16, batch: int = 1) -> Tensor:
    """Of frames with 2 x 5 tokens, which neither 3 nor 4 divides."""
    return torch.randn(batch, frames, 4, 4, 10, generator=torch.Generator().manual_seed(1))


def prompt(seed: int = 2) -> Tensor:
    return torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed))


def tiny(options: dict[str, Any], frames: int = 16, batch: int = 1, config: RetrievalConfig = CONFIG) -> Any:
    options = {"denoising_steps": STEPS, **options}
    return rollout(model(), noise(frames, batch), options.pop("prompts", prompt()), config, **options)


def small_world(options: dict[str, Any]) -> Any:
    bundled = backbone.load_backbone()
    policy = RetrievalConfig(context_frames=6, sink_frames=1, memory_frames=2, recency_guard=1, block_frames=2)
    prompts = [(frame, bundled.prompts[frame][None].detach()) for frame in range(0, 14, 4)]
    return rollout(
        bundled,
        initial_noise(0, 1, 14),
        prompts,
        policy,
        embedding=backbone.load_encoder(),
        denoising_steps=STEPS,
        **options,
    )


def uneven_blocks(options: dict[str, Any]) -> RolloutResult:
    """Of three latent frames and of two in turn."""
    blocks = list(
        stream(model(), noise(15).split([3, 2] * 3, dim=1), prompt(), CONFIG, sampling=Sampling(STEPS), **options)
    )
    return RolloutResult(
        torch.cat([block.latents for block in blocks], dim=1),
        torch.cat([block.embeddings for block in blocks], dim=1),
        [block.retrieval for block in blocks if block.retrieval is not None],
    )


def budget(device: float, **values: Any) -> Callable[[int], Budget]:
    """Of each rank, for as many latent frames' pages on the device."""
    return lambda ranks: Budget(device=int(device * PAGE) // ranks, **values)


# What each case adds to the call of `rollout`; a function is given the number of ranks.
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "memory": (tiny, {}),
    "draft query, two videos": (tiny, {"batch": 2, "config": replace(CONFIG, query="draft")}),
    "random choice, absolute positions": (
        tiny,
        {"selection": RandomSelection(3), "config": replace(CONFIG, positions="absolute")},
    ),
    "prompts that change, frames given": (
        tiny,
        {"prompts": [(0, prompt()), (8, prompt(3))], "given": noise(4).tanh()},
    ),
    "device budget": (tiny, {"budget": budget(8, host=10**9)}),
    "frames forgotten": (tiny, {"budget": budget(8, host=0)}),
    "frames rebuilt": (tiny, {"budget": budget(8, host=0, rebuild=True)}),
    "pages of 8 bits below": (tiny, {"budget": budget(8, host=10**9, bits=8)}),
    "uneven blocks": (uneven_blocks, {}),
    "bundled backbone": (small_world, {}),
}


def run_case(name: str, ranks: int, group: object = None) -> tuple[Tensor, Tensor, list[list[list[int]]]]:
    make, given = CASES[name]
    options = {key: value(ranks) if key == "budget" else value for key, value in given.items()}
    own = {key: options.pop(key) for key in ("batch", "config") if key in options}
    result = make({**options, "group": group}, **own)
    return result.latents, result.embeddings, [entry.frames for entry in result.retrieved]


def runs(name: str, ranks: int) -> bool:
    """The bundled backbone has 3 heads; with 4 ranks, what 2 and 3 have shown is not made again."""
    if ranks == 4:
        return name in ("memory", "draft query, two videos", "frames rebuilt")
    return ranks in (1, 3) or name != "bundled backbone"


def compiled(group: object = None) -> tuple[Tensor, int]:
    """The video of a compiled model, of a single layer to compile quickly, and how often it was compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model_once: Any = torch.compile(model(layers=1), backend=counter, fullgraph=True)
    result = rollout(model_once, noise(14), prompt(), CONFIG, denoising_steps=STEPS, group=group)  # type: ignore[arg-type]
    return result.latents, counter.frame_count


def on_rank(rank: int, ranks: int) -> dict[str, Any]:
    group = dist.group.WORLD
    results: dict[str, Any] = {name: run_case(name, ranks, group) for name in CASES if runs(name, ranks)}
    results["usage"] = held(ranks, group)
    results["traffic"] = traffic(group)
    if ranks == 2:
        results["compiled"] = compiled(group)
    return results


def traffic(group: Any) -> tuple[int, int, int]:
    """Bytes sent and exchanges begun in one attention of two videos' blocks of 2 frames, and the bytes by formula."""
    shards = Shards(group, heads=12)
    own = shards.token_counts(10)[shards.rank]
    q, k, v = torch.randn(3, 2, 2, own, 12, 16)
    q, k, v = shards.to_heads(q, k, v, None, None, 1e-6, tokens=10)
    shards.to_tokens(q.reshape(2, 20, shards.heads, 16), frames=2)
    formula = Pass(2, 2, 10, 12, 16, 4, shards.ranks, shards.rank).layer_bytes
    return shards.traffic.bytes, shards.traffic.exchanges, formula


def held(ranks: int, group: object = None) -> list[tuple[int, int]]:
    """Frames and bytes per tier in the end, on a device with room for 8 frames."""
    blocks = stream(
        model(),
        noise().split(2, dim=1),
        prompt(),
        CONFIG,
        sampling=Sampling(STEPS),
        budget=Budget(device=8 * PAGE // ranks, host=16 * PAGE // ranks),
        group=group,  # type: ignore[arg-type]
    )
    usage = list(blocks)[-1].usage
    return [(tier.frames, tier.bytes) for tier in (usage.device, usage.host)]


@cache
def expected(name: str) -> tuple[Tensor, Tensor, list[list[list[int]]]]:
    return run_case(name, 1)


@pytest.fixture(scope="module", params=[2, 3, 4])
def said(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank says: processes take seconds to start, so they run all cases."""
    return run_ranks(request.param, on_rank, request.param)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_the_video_of_one_process(said: list[dict[str, Any]], name: str) -> None:
    if not runs(name, len(said)):
        return
    latents, embeddings, frames = expected(name)
    for result in said:
        assert result[name][2] == frames
        assert frames and any(any(row) for row in frames), "nothing was retrieved"
        if "8 bits" in name:
            # Quantised in groups that lie otherwise if a page has fewer heads.
            torch.testing.assert_close(result[name][0], latents, rtol=0, atol=1e-2)
        else:
            # The same sums of float32; libraries may order them by the number of rows.
            torch.testing.assert_close(result[name][0], latents, rtol=0, atol=1e-6)
            torch.testing.assert_close(result[name][1], embeddings, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_ranks_never_disagree(said: list[dict[str, Any]], name: str) -> None:
    """To the last bit: what one rank had otherwise would go on into all that follows."""
    for result in said[1:]:
        if runs(name, len(said)):
            assert torch.equal(result[name][0], said[0][name][0])
            assert result[name][2] == said[0][name][2]


def test_a_rank_holds_its_share_of_the_keys_and_values(said: list[dict[str, Any]]) -> None:
    alone, ranks = held(1), len(said)
    assert alone[0][1] == 8 * PAGE and alone[1][0] > 0
    for result in said:
        for (frames, size), (all_frames, whole) in zip(result["usage"], alone, strict=True):
            assert frames == all_frames and size * ranks == whole


def test_the_bytes_sent_are_those_of_the_formula(said: list[dict[str, Any]]) -> None:
    ranks, whole = len(said), 2 * 2 * 10 * 12 * 16 * 4
    for result in said:
        counted, exchanges, formula = result["traffic"]
        assert counted == formula and exchanges == 3
    # With even shares each rank sends as much.
    assert sum(result["traffic"][0] for result in said) == 4 * whole * (ranks - 1) // ranks


def test_a_compiled_model_gives_the_same_video_from_one_compilation(said: list[dict[str, Any]]) -> None:
    if len(said) != 2:
        return
    latents, compilations = said[0]["compiled"]
    assert compilations == COMPILATIONS
    torch.testing.assert_close(
        latents,
        rollout(model(layers=1), noise(14), prompt(), CONFIG, denoising_steps=STEPS).latents,
        rtol=1e-4,
        atol=1e-4,
    )
