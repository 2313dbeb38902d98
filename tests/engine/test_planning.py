"""A plan says beforehand what a run then uses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from longlive_rag import Budget, RetrievalConfig, RetrievalMemory, cli
from longlive_rag.budget import Bits
from longlive_rag.embedding import AveragePool
from longlive_rag.planning import FAMILIES, Outlook, Video, plan_tiers
from longlive_rag.selection import RandomSelection
from longlive_rag.tiers.pages import frame_bytes

LAYERS, HEADS, HEAD_DIM, TOKENS = 2, 2, 8, 4
CONFIG = RetrievalConfig(context_frames=6, sink_frames=1, memory_frames=2, recency_guard=0, block_frames=2)
FRAMES, BATCH = 120, 2


def record_bytes(bits: Bits) -> int:
    return frame_bytes(layers=LAYERS, heads=HEADS, tokens=TOKENS, head_dim=HEAD_DIM, dtype=torch.float32, bits=bits)


def memory(budget: Budget, seed: int) -> RetrievalMemory:
    return RetrievalMemory(
        CONFIG,
        batch=BATCH,
        layers=LAYERS,
        heads=HEADS,
        head_dim=HEAD_DIM,
        grid=(2, 2),
        device="cpu",
        dtype=torch.float32,
        embedding=AveragePool(),
        selection=RandomSelection(seed),
        budget=budget,
    )


def run(engine: RetrievalMemory, frames: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, frames, 2):
        engine.begin_block(start, 2)
        for layer in range(LAYERS):
            engine.attend(layer, *torch.randn(3, BATCH, 2, TOKENS, HEADS, HEAD_DIM, generator=generator))
        engine.commit(torch.randn(BATCH, 2, 6, 4, 4, generator=generator))


PAGE = record_bytes(16)

# Frames on the device, in host memory and on disk.
ROOMS = [(240, 0, 0), (30, 500, 0), (12, 500, 0), (30, 60, 0), (30, 60, 500), (30, 0, 500), (30, 20, 40), (12, 0, 0)]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("room", ROOMS)
def test_a_plan_is_what_a_run_uses(room: tuple[int, int, int], bits: Bits) -> None:
    device, host, disk = room
    record = record_bytes(bits)
    budget = Budget(device=device * PAGE, host=host * record, disk=disk * record, bits=bits)
    with memory(budget, seed=0) as engine:
        run(engine, FRAMES)
        used = engine.usage()
    plan = plan_tiers(
        FRAMES,
        CONFIG,
        budget,
        page_bytes=PAGE,
        record_bytes=record,
        latent_bytes=0,
        batch=BATCH,
        pinned=False,
    )
    # A twentieth of all frames; what a block writes and retrieves may be counted here or one tier below.
    tolerance = max(0.05 * FRAMES * BATCH, BATCH * (CONFIG.block_frames + CONFIG.memory_frames))
    for name, frames in (
        ("device", used.device.frames),
        ("host", used.host.frames),
        ("disk", used.disk.frames),
        ("latents", used.forgotten),
    ):
        assert abs(plan.tiers[name].frames - frames) <= tolerance, name
    assert sum(share.frames for share in plan.tiers.values()) == FRAMES * BATCH
    assert plan.tiers["host"].bytes == used.host.bytes
    assert plan.tiers["disk"].bytes == used.disk.bytes


def test_a_budget_of_exactly_what_a_block_sees_is_enough_whatever_must_be_forgotten() -> None:
    for seed in range(8):
        draw = random.Random(seed)
        host, disk = draw.choice([0, 3, 10]), draw.choice([0, 5, 30])
        budget = Budget(device=BATCH * CONFIG.context_frames * PAGE, host=host * PAGE, disk=disk * PAGE)
        with memory(budget, seed) as engine:
            run(engine, 60)


def test_what_moves_is_a_block_down_and_its_memory_up() -> None:
    video = Video.of("1.3B", 60, RetrievalConfig())
    assert (video.latent_frames, video.page_bytes) == (243, 287_539_200)
    outlook = Outlook(video, 24 * 10**9, Budget(device=0, host=10**12), link=25 * 10**9, rate=16.0)
    plan = outlook.plan()
    assert plan.moved_bytes_per_block == (3 + 6) * video.page_bytes
    assert outlook.transfer_seconds(plan) == pytest.approx(6 * video.page_bytes / 25e9)
    assert outlook.block_seconds == pytest.approx(0.75)
    eight = Outlook(video, 24 * 10**9, Budget(device=0, host=10**12, bits=8), link=25 * 10**9, rate=16.0).plan()
    assert 0.5 < eight.moved_bytes_per_block / plan.moved_bytes_per_block < 0.55
    short = Outlook(
        Video.of("1.3B", 10, RetrievalConfig()), 24 * 10**9, Budget(device=0, host=10**12), 25 * 10**9, 16.0
    )
    assert short.plan().moved_bytes_per_block == 0, "all of it fits on the GPU"


@pytest.mark.parametrize("model", FAMILIES)
def test_the_command_plans_every_size(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    words = ["plan", "--model", model, "--seconds", "120", "--gpu", "141GB", "--host", "64GB", "--disk", "500GB"]
    assert cli.main([*words, "--json", "--plot", str(picture)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {"frame_bytes", "latent_frames", "tiers", "moved_bytes_per_block"} <= plan.keys()
    assert sum(tier["frames"] for tier in plan["tiers"].values()) == plan["latent_frames"]
    assert plan["tiers"]["device"]["bytes"] + plan["weight_bytes"] < 141e9
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(words) == 0
    assert f"{plan['tiers']['device']['frames']}" in capsys.readouterr().out


def test_without_a_model_or_a_gpu_the_command_compares(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--seconds", "30"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1.3B", "| 5B", "| 14B"))]
    assert len(rows) == 9
    assert "too small" in rows[6], "the weights of 14B alone take more than 24 GB"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model 14B --gpu 24GB", "14B needs a GPU with more memory than 24.00 GB: 28.83 GB are weights"),
        ("--model 1.3B --gpu lots", "a size must look like 12GB"),
        ("--gpu 24GB --json", "--json shows one plan: give --model and --gpu too"),
        ("--model 1.3B --gpu 24GB --height 100", "height must be a positive multiple of 16 pixels, got 100"),
        ("--model 5B --gpu 24GB --height 400", "height and width must be multiples of 32, got 400 x 1280"),
        ("--model 1.3B --gpu 24GB --rate 0", "--rate must be positive, got 0.0"),
        ("--model 1.3B --gpu 24GB --link 0", "--link must be positive"),
    ],
)
def test_wrong_use_is_told_in_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
