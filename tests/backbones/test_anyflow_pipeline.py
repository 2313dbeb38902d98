"""diffusers' own AnyFlow FAR pipeline, tiny and random: patched, and as a block of a modular pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longlive_rag import RetrievalConfig, patch

diffusers = pytest.importorskip("diffusers", minversion="0.42")

from longlive_rag.backbones.anyflow_blocks import AnyFlowFARMemoryBlocks  # noqa: E402

PARTITION = [1, 2, 2, 2, 2]
CONFIG = RetrievalConfig(
    context_frames=8, sink_frames=0, memory_frames=2, recency_guard=0, block_frames=2, positions="absolute"
)
MEMORY = {"memory_frames": 2, "recency_guard": 0}
"""The same, as what differs from `RetrievalConfig.from_backbone`."""


@pytest.fixture(scope="module")
def transformer() -> Any:
    torch.manual_seed(0)
    return diffusers.AnyFlowFARTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=2, chunk_partition=PARTITION,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(transformer: Any) -> Any:
    """Without text encoder and VAE: prompts come as embeddings, and latents are what comes out."""
    scheduler = diffusers.FlowMapEulerDiscreteScheduler()
    pipeline = diffusers.AnyFlowFARPipeline(None, None, transformer, None, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def request(seed: int = 0) -> dict[str, Any]:
    # 5 x 4 pixels of 8 x 8 give 20 tokens a frame: diffusers pads the keys with zeros.
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, 4, 8, generator=generator), "height": 80, "width": 64, "num_frames": 33,
        "num_inference_steps": 2, "generator": generator, "output_type": "latent",
    }  # fmt: skip


@pytest.fixture(scope="module")
def own(pipeline: Any) -> Tensor:
    """What the pipeline makes by itself."""
    return pipeline(**request()).frames


def test_native_is_the_pipeline_s_own_output_to_the_last_bit(pipeline: Any, own: Tensor) -> None:
    with patch(pipeline, "native") as patched:
        assert torch.equal(pipeline(**request()).frames, own) and patched.used
    assert torch.equal(pipeline(**request()).frames, own)


def test_memory_beside_the_pipeline_s_own_window(pipeline: Any, own: Tensor) -> None:
    assert RetrievalConfig.from_backbone(pipeline) == RetrievalConfig(
        context_frames=12, sink_frames=0, memory_frames=6, block_frames=2, positions="absolute"
    )
    with patch(pipeline, CONFIG) as patched:
        video = pipeline(**request()).frames
        assert [entry.block_start for entry in patched.retrieved] == [5, 7]
    assert torch.equal(video[:, :, :5], own[:, :, :5]) and not torch.equal(video[:, :, 5:], own[:, :, 5:])


def modular(pipeline: Any, **config: Any) -> Any:
    made: Any = AnyFlowFARMemoryBlocks().init_pipeline()
    made.update_components(transformer=pipeline.transformer, scheduler=pipeline.scheduler, **config)
    return made


@pytest.mark.parametrize(("memory", "config"), [("native", "native"), (MEMORY, CONFIG)])
def test_the_modular_block_does_what_patch_does(pipeline: Any, memory: Any, config: Any) -> None:
    with patch(pipeline, config) as patched:
        expected = pipeline(**request()).frames
    state = modular(pipeline, retrieval_memory=memory)(**request())
    assert torch.equal(state.get("videos"), expected)
    assert [entry.frames for entry in state.get("retrieved")] == [entry.frames for entry in patched.retrieved]


def load(pipeline: Any, folder: Path) -> None:
    """As `load_components`, whose way to load a transformer needs accelerate."""
    pipeline.load_components(["scheduler"])
    model = diffusers.AnyFlowFARTransformer3DModel
    transformer = model.from_config(model.load_config(str(folder), subfolder="transformer"))
    transformer.load_state_dict(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    pipeline.update_components(transformer=transformer.eval())


def test_a_modular_pipeline_is_saved_and_loaded_with_its_memory(pipeline: Any, tmp_path: Path) -> None:
    made = modular(pipeline, retrieval_memory=MEMORY)
    expected = made(**request(), output="videos")
    made.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    saved = json.loads((tmp_path / "modular_model_index.json").read_text())
    assert saved["retrieval_memory"] == MEMORY and saved["_blocks_class_name"] == "AnyFlowFARMemoryBlocks"
    loaded = AnyFlowFARMemoryBlocks().init_pipeline(str(tmp_path))
    load(loaded, tmp_path)
    assert torch.equal(loaded(**request(), output="videos"), expected)
    # Without naming the block, as a pipeline from the hub is loaded.
    made.blocks.save_pretrained(str(tmp_path))
    found = diffusers.ModularPipeline.from_pretrained(str(tmp_path), trust_remote_code=True)
    load(found, tmp_path)
    assert torch.equal(found(**request(), output="videos"), expected)


def test_bad_memory_settings(pipeline: Any) -> None:
    for memory, message in ((3, "retrieval_memory must be a dict"), ({"memory_frames": -1}, "memory_frames must be")):
        with pytest.raises((TypeError, ValueError), match=message):
            modular(pipeline, retrieval_memory=memory)(**request())
    with pytest.raises(ValueError, match=r"positions='absolute' and sink_frames=0.*got 'relative' and 1"):
        patch(pipeline, RetrievalConfig())
    narrow = RetrievalConfig(
        context_frames=3, sink_frames=0, memory_frames=1, block_frames=1, positions="absolute", recency_guard=0
    )
    with patch(pipeline, narrow), pytest.raises(ValueError, match="local window.*at least 3 latent frames"):
        pipeline(**request())
