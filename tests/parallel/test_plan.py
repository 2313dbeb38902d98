"""A plan for several ranks says beforehand what each of them then holds, needs and sends."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longlive_rag import Budget, cli, planning
from longlive_rag.generation import rollout as rollout_module
from longlive_rag.generation.rollout import stream
from longlive_rag.generation.sampling import Sampling
from longlive_rag.generation.settings import VideoSettings
from longlive_rag.models import CausalWanModel
from longlive_rag.parallel.attention import ShardedAttention
from longlive_rag.parallel.costs import Pass
from longlive_rag.parallel.shards import Shards
from longlive_rag.planning import Video, plan_tiers
from parallel.test_one_video import CONFIG, STEPS, noise, prompt
from support.ranks import run_ranks

SIZE = (32, 80)
"""Of a picture, whose latent frames have 2 x 5 tokens."""


def wide_model(channels: int = 4) -> CausalWanModel:
    """With a feed-forward that needs more room than attention does, as the published sizes have."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 192, "freq_dim": 16, "text_dim": 8, "text_len": 4, "num_heads": 12, "num_layers": 2}
    return CausalWanModel(ffn_dim=1024, in_dim=channels, out_dim=channels, **sizes).eval()


class LivingTensors(TorchDispatchMode):
    """The most bytes that tensors made while it is active hold at once, those of `apart` not counted."""

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in apart}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in _plain_tensors((args, kwargs))}
        for tensor in _plain_tensors(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen | given and storage.nbytes():
                self._seen.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return result

    def _gone(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.now -= size


def _plain_tensors(tree: Any) -> list[Tensor]:
    """Those with storage of their own: a DTensor's local tensor is made apart."""
    return [leaf for leaf in tree_leaves(tree) if type(leaf) in (Tensor, nn.Parameter) and not leaf.is_meta]


class NoAttention:
    """Leaves the queries as they are."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return q.flatten(1, 2)


def activations(group: Any) -> int:
    """The most that one pass over a block of 2 frames holds at once, the exchange's buffers not counted."""
    model, shards = wide_model(), Shards(group, 12)
    attention = ShardedAttention(NoAttention(), shards, tokens=10)
    latents, context = noise(2), model.prepare_prompt(prompt())
    with torch.no_grad():
        model(latents, torch.zeros(1, 2), context, attention)  # makes the buffers
        with LivingTensors(apart=shards._buffers.values()) as living:
            model(latents, torch.zeros(1, 2), context, attention)
    return living.most


def on_rank(rank: int, ranks: int) -> dict[str, Any]:
    group: Any = dist.group.WORLD
    made: list[Shards] = []

    def remember(*arguments: Any) -> Shards:
        made.append(Shards(*arguments))
        return made[-1]

    page = 2 * 2 * 10 * 192 * 4 // ranks
    budget = Budget(device=8 * page, host=6 * page, disk=30 * page)
    with mock.patch.object(rollout_module, "Shards", remember):
        *_, last = stream(
            wide_model(),
            noise(40).split(2, dim=1),
            prompt(),
            CONFIG,
            sampling=Sampling(STEPS),
            budget=budget,
            group=group,
        )
    tiers = [(tier.frames, tier.bytes) for tier in (last.usage.device, last.usage.host, last.usage.disk)]
    (shards,) = made
    kept = sum(buffer.nbytes for buffer in shards._buffers.values())
    return {"tiers": tiers, "sent": shards.traffic.bytes, "buffers": kept, "activations": activations(group)}


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_plan_is_what_each_rank_uses(ranks: int) -> None:
    said = run_ranks(ranks, on_rank, ranks)
    settings = VideoSettings(height=SIZE[0], width=SIZE[1], policy=CONFIG, sampling=Sampling(STEPS))
    with (
        mock.patch.object(planning, "_transformer", lambda size: wide_model()),
        mock.patch.object(planning, "_DTYPE", torch.float32),
    ):
        video = Video("1.3B", settings, ranks)
        page = video.page_bytes
        budget = Budget(device=8 * page, host=6 * page, disk=30 * page)
        plan = plan_tiers(
            40, CONFIG, budget, page_bytes=page, record_bytes=video.record_bytes(budget), latent_bytes=0, pinned=False
        )
        sent = 20 * video.sent_bytes_per_block
    for rank, used in enumerate(said):
        # What a block writes and retrieves may be counted here or one tier below.
        for (frames, size), share in zip(used["tiers"], plan.tiers.values(), strict=False):
            assert abs(frames - share.frames) <= CONFIG.block_frames + CONFIG.memory_frames
            assert size == share.bytes
        a_pass = Pass(1, 2, 10, 12, 16, 4, ranks, rank)
        assert used["sent"] == 20 * 3 * a_pass.sent_bytes(layers=2, channels=16)
        assert used["buffers"] == a_pass.buffer_bytes(channels=16)
        assert used["activations"] == pytest.approx(a_pass.activation_bytes(1024), rel=0.01)
    assert said[0]["sent"] == sent, "the plan's is the first rank's"


def test_the_command_plans_for_several_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "1.3B", "--gpu", "24GB"]
    plans = []
    for ranks in ("1", "4"):
        assert cli.main([*words, "--json", "--sequence-parallel", ranks]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    alone, shared = plans
    assert shared["frame_bytes"] * 4 == alone["frame_bytes"]
    assert shared["moved_bytes_per_block"] * 4 == alone["moved_bytes_per_block"]
    assert shared["tiers"]["device"]["frames"] > 4 * alone["tiers"]["device"]["frames"], "the exchange needs less"
    # Of each layer 4 * F * T * H * D * 2 bytes * 3 / 16, five times; the result's share is some megabytes.
    assert shared["sent_bytes_per_block"] == pytest.approx(5 * 30 * 4 * 3 * 1560 * 1536 * 2 * 3 / 16, rel=0.01)
    assert alone["sent_bytes_per_block"] == 0
    large = ["plan", "--model", "14B", "--gpu", "24GB", "--sequence-parallel", "4", "--json"]
    assert cli.main(large) == 2
    assert "14B needs a GPU with more memory than 24.00 GB" in capsys.readouterr().err
    assert cli.main([*large, "--shard-weights"]) == 0, "a quarter of the weights fits"
    shards = json.loads(capsys.readouterr().out)
    assert 0.25 * 28.8e9 < shards["weight_bytes"] < 0.4 * 28.8e9
    assert shards["sent_weight_bytes_per_block"] == pytest.approx(5 * 3 / 4 * 28.8e9, rel=0.03), "all but the rest"
    assert cli.main([*words, "--shard-weights"]) == 2
    assert "shard_weights needs several GPUs" in capsys.readouterr().err
    assert cli.main([*words, "--sequence-parallel", "4"]) == 0
    assert "a GPU sends the others 1.62 GB: on paper 65 ms over PCIe" in capsys.readouterr().out
    assert cli.main([*words, "--sequence-parallel", "5"]) == 2
    assert "1.3B takes a number of ranks that divides the 12 attention heads" in capsys.readouterr().err
