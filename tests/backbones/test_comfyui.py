"""ComfyUI's autoregressive Wan: its own videos without memory, and the nodes that give it memory."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from longlive_rag import RetrievalConfig, patch
from longlive_rag.generation.sampling import warp_steps
from support.comfyui_doubles import PACK, CausalWan, ComfyUIModel, ModelPatcher, import_pack, sample

TESTS = Path(__file__).parents[1]
SIZES = {
    "dim": 96, "ffn_dim": 64, "freq_dim": 16, "text_dim": 16, "text_len": 8, "num_heads": 2, "num_layers": 2,
}  # fmt: skip
CONFIG = RetrievalConfig(context_frames=8, sink_frames=1, memory_frames=2, recency_guard=0)
FRAMES, TOKENS = 24, 4


def parameters() -> Any:
    spec = importlib.util.spec_from_file_location("golden_parameters", TESTS / "golden" / "params.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PARAMETERS = parameters()


def model() -> CausalWan:
    double = CausalWan(**SIZES)
    PARAMETERS.fill(double, 7)
    return double


def video(double: CausalWan, frames: int = FRAMES, batch: int = 1, seed: int = 7) -> Tensor:
    def renoise(index: int, count: int) -> Tensor:
        return PARAMETERS.tensor(seed, f"renoise.{index}", (batch, count, 16, 4, 4))

    noise = PARAMETERS.tensor(seed, "noise", (batch, frames, 16, 4, 4))
    prompt = PARAMETERS.tensor(seed, "prompt_embeds", (batch, 8, 16))
    return sample(double, noise, prompt, warp_steps([1000, 500], 5.0), 3, renoise)


@pytest.mark.parametrize("name", ["comfyui", "comfyui_image"])
def test_without_memory_it_makes_the_recorded_video(name: str) -> None:
    """Recorded with ComfyUI's own guider, sampler, model and cache; see traces/README.md."""
    with safe_open(TESTS / "backbones" / "traces" / f"{name}.safetensors", "pt") as file:
        recorded, metadata = file.get_tensor("latents"), file.metadata()
    case = json.loads(metadata["case"])
    seed, shape = case["seed"], (16, case["height"], case["width"])

    def renoise(index: int, count: int) -> Tensor:
        return PARAMETERS.tensor(seed, f"renoise.{index}", (1, count, *shape))

    double = model()
    noise = PARAMETERS.tensor(seed, "noise", (1, case["frames"], *shape))
    prompt = PARAMETERS.tensor(seed, "prompt_embeds", (1, case["text_len"], case["text_dim"]))
    given = PARAMETERS.tensor(seed, "given", (1, case["given"], *shape)) if case["given"] else None
    with patch(double, "native", release_cache=True) as patched:
        steps = warp_steps(case["denoising_steps"], 5.0)
        latents = sample(double, noise, prompt, steps, case["block_frames"], renoise, given)
        assert patched.family == metadata["family"]
        # The cache for the whole video was never made.
        assert patched.released_bytes == 2 * 2 * case["frames"] * TOKENS * 96 * 4
    # As in test_traces: float32 rounds each block by about 2e-7, a wrong position costs 9e-3.
    difference = (latents - recorded).flatten(2).norm(dim=2) / recorded.flatten(2).norm(dim=2)
    assert float(difference.max()) < 2e-5


@pytest.mark.parametrize("query", ["latest", "draft"])
def test_memory_comes_back_and_time_is_bounded(query: Any) -> None:
    double = model()
    config = RetrievalConfig(context_frames=8, sink_frames=1, memory_frames=2, recency_guard=0, query=query)
    with patch(ModelPatcher(ComfyUIModel(double)), config) as patched:
        first = video(double)
        # 8 frames of context, then one frame beside the sink can come back, then two.
        assert [entry.block_start for entry in patched.retrieved] == [9, 12, 15, 18, 21]
        assert all(0 < frame < entry.block_start - 4 for entry in patched.retrieved for frame in entry.frames[0])
        assert torch.equal(video(double), first), "a new sampling is a new video"
        assert len(patched.earlier_videos) == 1
        assert not torch.equal(video(double, seed=8), first)
    with patch(double, "native"):
        assert not torch.allclose(video(double, frames=21)[:, -3:], first[:, 18:21], atol=1e-3)


def test_it_samples_in_inference_mode_and_then_without() -> None:
    double = model()
    with patch(double, CONFIG, release_cache=True):
        with torch.inference_mode():
            made = video(double)
        assert torch.equal(video(double), made)


def test_what_would_compute_something_else_is_refused() -> None:
    double = model()
    with patch(double, CONFIG):
        caches = double.init_kv_caches(1, FRAMES * TOKENS, torch.device("cpu"), torch.float32)
        state = {"start_frame": 0, "kv_caches": caches, "crossattn_caches": [{}, {}]}
        call = {"context": torch.zeros(2, 8, 16), "transformer_options": {"ar_state": state}}
        with pytest.raises(ValueError, match="cache is for a batch of 1, but a pass has 2.*cfg must be 1"):
            double(torch.zeros(2, 16, 3, 4, 4), torch.zeros(2), **call)
        with torch.enable_grad(), pytest.raises(RuntimeError, match="memory gives no gradients"):
            double(torch.zeros(1, 16, 3, 4, 4, requires_grad=True), torch.zeros(1), **call)
    double.rope_embedder.theta = 5000.0
    with pytest.raises(ValueError, match="rotary embedding .*got theta 5000.0"):
        patch(double, CONFIG)


# The nodes

NODES: Any = import_pack()
LATENT_FRAMES = 24


class Sampled:
    """One execution of a guider: what ComfyUI does with the wrappers that a model carries."""

    def __init__(self, patcher: ModelPatcher, cfg: float = 1.0, options: dict[str, Any] | None = None) -> None:
        self.model_patcher, self.cfg = patcher, cfg
        self.sampler = SimpleNamespace(extra_options={"num_frame_per_block": 3} if options is None else options)

    def __call__(self, seed: int = 7) -> dict[str, Tensor]:
        double = self.model_patcher.model.diffusion_model

        class Executor:
            class_obj = self

            def __call__(self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Any) -> Tensor:
                return video(double, frames=noise.shape[2], seed=seed).transpose(1, 2)

        execute: Any = Executor()
        for (kind, _), wrappers in self.model_patcher.wrappers.items():
            assert kind == "outer_sample"
            for wrapper in wrappers:
                execute = SimpleNamespace(call=wrapper, inner=execute)
        zeros = torch.zeros(1, 16, LATENT_FRAMES, 4, 4)
        if isinstance(execute, SimpleNamespace):
            return {"samples": execute.call(execute.inner, zeros, zeros, self.sampler, None)}
        return {"samples": execute(zeros, zeros, self.sampler, None)}


def remember(patcher: ModelPatcher, **changed: Any) -> ModelPatcher:
    values = {"window": 8, "sink": 1, "memory": 2, "query": "latest", "device_memory": "", "host_memory": ""}
    (made,) = NODES.nodes.RetrievalMemory.execute(patcher, **{**values, **changed}).args
    return made


def test_the_nodes_make_a_video_with_memory_and_its_picture() -> None:
    loaded = ModelPatcher(ComfyUIModel(model()))
    own = loaded.model.diffusion_model
    native = Sampled(remember(loaded, window=24, sink=0, memory=0))()
    patched = remember(loaded)
    samples = Sampled(patched)()
    # The weights are anyone's again, and the model that came in knows nothing of memory.
    assert not loaded.wrappers and not loaded.attachments and "forward" not in vars(own)
    assert not torch.allclose(samples["samples"][:, :, -3:], native["samples"][:, :, -3:], atol=1e-3)
    assert torch.equal(Sampled(patched)()["samples"], samples["samples"])
    output = NODES.nodes.MemoryPicture.execute(patched, samples, 16.0)
    (picture,) = output.args
    assert picture.ndim == 4 and picture.shape[0] == 1 and picture.shape[3] == 3 and picture.dtype == torch.float32
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    assert patched.get_attachment("longlive_rag").retrieved[0].block_start == 15


def test_two_branches_of_a_workflow_do_not_meet() -> None:
    loaded = ModelPatcher(ComfyUIModel(model()))
    wide, narrow = remember(loaded, window=12), remember(loaded)
    expected = Sampled(remember(loaded))()["samples"]
    Sampled(wide)()
    assert torch.equal(Sampled(narrow)()["samples"], expected)
    assert wide.get_attachment("longlive_rag").config.context_frames == 12


def test_wrong_use_is_a_sentence() -> None:
    loaded = ModelPatcher(ComfyUIModel(model()))
    with pytest.raises(ValueError, match="must fit into context_frames"):
        remember(loaded, window=4, memory=6)
    with pytest.raises(ValueError, match="8 parsecs"):
        remember(loaded, device_memory="8 parsecs")
    with pytest.raises(TypeError, match="looked for self-attention"):
        remember(ModelPatcher(ComfyUIModel(torch.nn.Linear(2, 2))))
    patched = remember(loaded)
    with pytest.raises(ValueError, match="needs the sampler Sampler AR Video"):
        Sampled(patched, options={})()
    with pytest.raises(ValueError, match="cfg must be 1 .* got 4.0"):
        Sampled(patched, cfg=4.0)()
    with pytest.raises(ValueError, match="the last video made with this model, none, got 24"):
        NODES.nodes.MemoryPicture.execute(patched, {"samples": torch.zeros(1, 16, 24, 4, 4)}, 16.0)
    with pytest.raises(ValueError, match="model must be the output of Retrieval Memory"):
        NODES.nodes.MemoryPicture.execute(loaded, {"samples": torch.zeros(1, 16, 24, 4, 4)}, 16.0)
    with pytest.raises(ValueError, match="nothing was retrieved"):
        NODES.nodes.MemoryPicture.execute(
            without := remember(loaded, window=24, sink=0, memory=0), Sampled(without)(), 16.0
        )


def test_the_pack_does_no_work_when_it_is_imported() -> None:
    code = (
        "import sys; from unittest.mock import MagicMock\n"
        "api = MagicMock(); api.io.ComfyNode = api.ComfyExtension = object\n"
        "sys.modules['comfy_api'] = sys.modules['comfy_api.latest'] = api\n"
        f"sys.path.insert(0, {str(PACK.parent)!r}); import comfyui\n"
        "print(sorted({'torch', 'longlive_rag', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_workflow_uses_the_nodes_as_they_are() -> None:
    entry = asyncio.run(NODES.comfy_entrypoint())
    nodes = {node.define_schema().node_id: node.define_schema() for node in asyncio.run(entry.get_node_list())}
    workflow = json.loads((PACK / "workflow.json").read_text())
    used = {node["class_type"] for node in workflow.values()}
    assert set(nodes) <= used
    for node in workflow.values():
        if node["class_type"] in nodes:
            taken = [each.args[0] for each in nodes[node["class_type"]].inputs]
            assert list(node["inputs"]) == taken
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[0] in workflow
