"""A transformer whose weights are split over ranks makes the same video, and no rank ever holds all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion as Version

from longlive_rag import rollout
from longlive_rag.models.checkpoints import load_causal_wan
from parallel.test_one_video import CONFIG, STEPS, model, noise, prompt
from parallel.test_plan import LivingTensors
from support.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.6"), reason="FSDP2 of torch 2.5 works on GPUs only"
)
LORA_RANK = 2


def save(folder: Path) -> int:
    """The tests' model with a LoRA beside it; the bytes of its weights in float32."""
    state = {name: tensor.contiguous() for name, tensor in model().state_dict().items()}
    save_file({name: tensor.to(torch.float64) for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_heads": 12, "text_len": 4}))
    draws = torch.Generator().manual_seed(4)
    adapted = {
        f"blocks.0.self_attn.q.lora_{name}.weight": 0.1 * torch.randn(*shape, generator=draws)
        for name, shape in (("A", (LORA_RANK, 192)), ("B", (192, LORA_RANK)))
    }
    torch.save(adapted, folder / "lora.pt")
    return sum(tensor.nbytes for tensor in state.values())


def load(folder: Path, group: Any = None) -> Any:
    return load_causal_wan(folder, lora=folder / "lora.pt", dtype=torch.float32, group=group)


def video(loaded: Any, group: Any = None) -> tuple[Tensor, list[list[list[int]]]]:
    schedule = [(0, prompt()), (8, prompt(3))]
    result = rollout(loaded, noise(), schedule, CONFIG, denoising_steps=STEPS, group=group)
    return result.latents, [entry.frames for entry in result.retrieved]


def on_rank(rank: int, folder: Path) -> dict[str, Any]:
    group: Any = dist.group.WORLD
    with LivingTensors() as living:
        loaded = load(folder, group)
    held = sum(
        parameter.to_local().untyped_storage().nbytes()
        for parameter in loaded.parameters()
        if isinstance(parameter, DTensor)
    )
    whole = [name for name, parameter in loaded.named_parameters() if not isinstance(parameter, DTensor)]
    latents, frames = video(loaded, group)
    # Blocks are split again after their turn.
    gathered = [name for name, parameter in loaded.blocks.named_parameters() if not isinstance(parameter, DTensor)]
    return {
        "held": held, "most": living.most, "whole": whole, "gathered": gathered, "latents": latents, "frames": frames
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_holds_its_share_of_the_weights(ranks: int, tmp_path: Path) -> None:
    whole = save(tmp_path)
    latents, frames = video(load(tmp_path))
    largest = 192 * 6 * 192
    for used in run_ranks(ranks, on_rank, tmp_path):
        assert used["whole"] == used["gathered"] == []
        # Three ranks do not divide all tensors evenly, and a modulation, [1, 6, dim], lies on the first as a whole.
        assert used["held"] == pytest.approx(whole / ranks, rel=0.05)
        # While it loads, FSDP keeps a second copy of the share; one tensor is on its way, in float64 and in float32.
        assert used["most"] < 2 * used["held"] + (4 + 8) * largest
        assert used["frames"] == frames and any(any(row) for row in frames)
        # The same sums of float32; libraries may order them by the number of rows.
        torch.testing.assert_close(used["latents"], latents, rtol=0, atol=1e-6)
