"""The nodes. Nothing of longlive_rag is imported before one of them is executed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import ComfyExtension, io, ui

if TYPE_CHECKING:
    from longlive_rag import RetrievalConfig
    from longlive_rag.budget import Budget
    from longlive_rag.memory import Retrieval

KEY = "longlive_rag"
"""Of what a model carries for these nodes."""


class RetrievedFrames:
    """What the blocks of the last video made with a model retrieved; the sampler writes it, the picture shows it.

    Attributes:
        config: the context policy of that video; None: there is no video yet.
        frames: its length in latent frames.
        retrieved: one entry for each block that retrieved.
    """

    def __init__(self) -> None:
        self.config: RetrievalConfig | None = None
        self.frames = 0
        self.retrieved: list[Retrieval] = []


class RetrievalMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongLiveRAG_RetrievalMemory",
            display_name="Retrieval Memory",
            category="model_patches/video",
            description="Blocks of an autoregressive video attend to a sink, to the most similar earlier frames and to "
            "a local window, instead of to all of the past. For Sampler AR Video with cfg 1.",
            inputs=[
                io.Model.Input("model", tooltip="An autoregressive Wan: Self-Forcing, Causal-Forcing or a relative."),
                io.Int.Input("window", default=12, min=1, max=1024, tooltip="Latent frames a block attends to in all."),
                io.Int.Input(
                    "sink", default=1, min=0, max=64, tooltip="First frames of the video, always attended to."
                ),
                io.Int.Input(
                    "memory", default=6, min=0, max=64, tooltip="Frames retrieved for a block. 0: a window only."
                ),
                io.Combo.Input(
                    "query",
                    options=["latest", "draft"],
                    default="latest",
                    tooltip="What memory is searched with: the newest finished frame, or the block's own first draft, "
                    "which also finds what a change of scene brings back.",
                ),
                io.String.Input(
                    "device_memory",
                    default="",
                    tooltip="Keys and values on the GPU at most, such as 8GB. Empty: what is free beside the weights.",
                ),
                io.String.Input(
                    "host_memory",
                    default="",
                    tooltip="Keys and values in host memory at most, such as 32GB. Empty: half of what is available.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, window: int, sink: int, memory: int, query: str, device_memory: str, host_memory: str
    ) -> io.NodeOutput:
        from longlive_rag import RetrievalConfig
        from longlive_rag.budget import BudgetOptions

        # Where there is no memory, the window is the model's own attention, in the model's own positions.
        policy = {
            "context_frames": window,
            "sink_frames": sink,
            "memory_frames": memory,
            "positions": "relative" if memory else "absolute",
            "query": query,
        }
        RetrievalConfig(**policy, block_frames=1)  # refused here, and not after the models have been loaded
        budget = BudgetOptions(device_memory or None, host_memory or None).budget
        RetrievalConfig.from_backbone(model.model)  # so is a model that patch does not know
        patched = model.clone()
        retrieved = RetrievedFrames()
        patched.set_attachments(KEY, retrieved)

        def sample(executor: Any, noise: Any, latent_image: Any, sampler: Any, *args: Any, **kwargs: Any) -> Any:
            return _sample(executor, policy, budget, retrieved, noise, latent_image, sampler, *args, **kwargs)

        patched.add_wrapper_with_key("outer_sample", KEY, sample)
        return io.NodeOutput(patched)


def _sample(
    executor: Any,
    policy: dict[str, Any],
    budget: Budget,
    retrieved: RetrievedFrames,
    noise: Any,
    latent_image: Any,
    sampler: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Make one video with memory; around the sampler, so that the weights are anyone's again when it returns."""
    from longlive_rag import RetrievalConfig, patch

    frames_per_block = getattr(sampler, "extra_options", {}).get("num_frame_per_block")
    if frames_per_block is None:
        raise ValueError("Retrieval Memory needs the sampler Sampler AR Video, which makes a video block by block")
    guider = executor.class_obj
    cfg = getattr(guider, "cfg", 1.0)
    if cfg != 1.0:
        raise ValueError(f"cfg must be 1 with Sampler AR Video, whose cache holds one condition, got {cfg}")
    config = RetrievalConfig(**policy, block_frames=frames_per_block)
    model = guider.model_patcher.model.diffusion_model
    with patch(model, config, budget=budget, release_cache=True) as patched:
        samples = executor(noise, latent_image, sampler, *args, **kwargs)
        retrieved.config, retrieved.frames, retrieved.retrieved = config, noise.shape[2], patched.retrieved
    return samples


class MemoryPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongLiveRAG_MemoryPicture",
            display_name="Memory Picture",
            category="model_patches/video",
            description="What each block of the last video made with this model retrieved.",
            inputs=[
                io.Model.Input("model", tooltip="The output of Retrieval Memory that the video was made with."),
                io.Latent.Input("samples", tooltip="The sampler's output: the picture is of this video."),
                io.Float.Input("fps", default=16.0, min=0.1, max=1000.0, tooltip="Of the video file."),
            ],
            outputs=[io.Image.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, samples: dict[str, Any], fps: float) -> io.NodeOutput:
        retrieved = model.get_attachment(KEY)
        if retrieved is None:
            raise ValueError("model must be the output of Retrieval Memory")
        frames = samples["samples"].shape[2]
        if retrieved.config is None or retrieved.frames != frames:
            made = f"of {retrieved.frames}" if retrieved.config else "none"
            raise ValueError(f"samples must be the last video made with this model, {made}, got {frames} latent frames")
        picture = draw(retrieved, fps)
        return io.NodeOutput(picture, ui=ui.PreviewImage(picture, cls=cls))


def draw(retrieved: RetrievedFrames, fps: float) -> Any:
    """The picture as ComfyUI keeps pictures: float32 [1, H, W, 3] from 0 to 1."""
    import tempfile
    from pathlib import Path

    import numpy as np
    import torch
    from PIL import Image

    from longlive_rag.retrieval_log import draw_retrieval, retrieval_entries

    entries = retrieval_entries(retrieved.retrieved)
    if not any(entry["frames"] for entry in entries):
        raise ValueError(
            "nothing was retrieved: the video is too short for its memory, memory is 0, or all was forgotten"
        )
    assert retrieved.config is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "retrieved.png"
        # Wan's latent frames stand for four pictures each.
        draw_retrieval(entries, retrieved.config, retrieved.frames, 4 / fps, path)
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255)[None]


class LongLiveRAG(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [RetrievalMemory, MemoryPicture]


async def comfy_entrypoint() -> LongLiveRAG:
    return LongLiveRAG()
