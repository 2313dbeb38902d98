"""A compiled backbone takes the memory along without a graph break, and is not compiled again for every block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.torch_version import TorchVersion as Version

from longlive_rag import RetrievalConfig, rollout
from longlive_rag.models import CausalWanModel

COMPILATIONS = 1 if Version(torch.__version__) >= Version("2.9") else 2
"""Older versions guard every field of the block's plan, and compile once more with its first frame as a symbol; not for
each of the blocks."""


@pytest.mark.parametrize(("batch", "block_frames"), [(2, 1), (1, 2)])
def test_a_compiled_model_gives_the_same_video_from_one_compilation(batch: int, block_frames: int) -> None:
    torch.manual_seed(0)
    model = CausalWanModel(
        dim=32, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=2, in_dim=4, out_dim=4
    ).eval()
    config = RetrievalConfig(
        context_frames=6, sink_frames=1, memory_frames=2, recency_guard=0, block_frames=block_frames
    )
    noise, prompt = torch.randn(batch, 14, 4, 4, 4), torch.randn(1, 4, 8)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    expected, actual = rollout(model, noise, prompt, config), rollout(compiled, noise, prompt, config)
    assert [entry.frames for entry in actual.retrieved] == [entry.frames for entry in expected.retrieved]
    torch.testing.assert_close(actual.latents, expected.latents, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == COMPILATIONS
