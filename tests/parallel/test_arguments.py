"""What several ranks are refused, with words that say what to change."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longlive_rag import RetrievalConfig, rollout
from longlive_rag.parallel.agreement import Agreement
from longlive_rag.parallel.shards import Shards
from parallel.test_one_video import CONFIG, STEPS, model, noise, prompt
from support.ranks import run_ranks


def message(work: Any) -> str:
    try:
        work()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def on_rank(rank: int) -> dict[str, str]:
    group: Any = dist.group.WORLD
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tokens", "videos"))
    one: Any = dist.new_group([0])
    own_config = RetrievalConfig(context_frames=6, memory_frames=2 + rank, block_frames=2)

    def make(config: RetrievalConfig = CONFIG, group: Any = group, seed: int = 0) -> Any:
        latents = noise(4) if not seed else torch.randn(1, 4, 4, 4, 10, generator=torch.Generator().manual_seed(seed))
        return rollout(model(), latents, prompt(), config, denoising_steps=STEPS, group=group)

    agreement = Agreement(Shards(group, 12))
    agreement.note(4, torch.zeros(1, 2, 4, 4, 10), forgotten=3 * rank)
    return {
        "heads": message(lambda: Shards(group, 9)),
        "tokens": message(lambda: Shards(group, 12).token_counts(1)),
        "no group": message(lambda: make(group=[0, 1])),
        "mesh of two dimensions": message(lambda: make(group=mesh)),
        "a mesh's dimension": message(lambda: make(group=mesh["tokens"])),
        "another's group": message(lambda: Shards(one, 12)) if rank == 1 else "",
        "config": message(lambda: make(own_config)),
        "noise": message(lambda: make(seed=1 + rank)),
        "forgotten": message(agreement.check),
    }


def test_refusals_say_what_came_and_what_is_needed() -> None:
    first, second = run_ranks(2, on_rank)
    for said in (first, second):
        assert "ranks that divides the 9 attention heads (1, 3, 9), got 2" in said["heads"]
        assert "at most as many ranks as a latent frame has tokens, 1, got 2" in said["tokens"]
        assert "TypeError: group must be a ProcessGroup or a DeviceMesh" in said["no group"]
        assert "device mesh of one dimension" in said["mesh of two dimensions"]
        assert said["a mesh's dimension"] == "nothing was raised"
        assert "config must be the same on all ranks" in said["config"] and "memory_frames=3" in said["config"]
        assert "the latents of the block at frame 0 on rank 1 differ from those on rank 0" in said["noise"]
        assert "number of frames forgotten of the block at frame 4 on rank 1" in said["forgotten"]
    assert "with this rank among its own, got int" in second["another's group"]
