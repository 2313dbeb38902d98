"""`patch` as a block of diffusers' modular pipelines, for AnyFlow FAR; needs diffusers 0.42."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import diffusers
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
from transformers import AutoTokenizer, UMT5EncoderModel

from longlive_rag.backbones.patching import patch
from longlive_rag.config import RetrievalConfig

# diffusers resolves these names when they are used, which a type checker does not see.
AnyFlowFARPipeline: Any = diffusers.AnyFlowFARPipeline

COMPONENTS: dict[str, Any] = {
    "tokenizer": AutoTokenizer,
    "text_encoder": UMT5EncoderModel,
    "transformer": diffusers.AnyFlowFARTransformer3DModel,
    "vae": diffusers.AutoencoderKLWan,
    "scheduler": diffusers.FlowMapEulerDiscreteScheduler,
}


class AnyFlowFARMemoryBlocks(ModularPipelineBlocks):
    """`AnyFlowFARPipeline` with retrieval memory, as one block.

    It takes what the pipeline takes, and gives `videos` and `retrieved`, as `Patched.retrieved`. The transformer is
    patched while a video is made, so that it can be saved, moved and exchanged in between. What memory does is part of the
    pipeline's config, which `save_pretrained` writes:

        pipeline = AnyFlowFARMemoryBlocks().init_pipeline("nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers")
        pipeline.load_components()
        pipeline.update_components(retrieval_memory={"memory_frames": 3})
        videos = pipeline(prompt="a panda", num_inference_steps=4, output="videos")

    | config | |
    |---|---|
    | `retrieval_memory` | fields of `RetrievalConfig` in place of those that `patch(pipeline)` reads off the model; "native": no memory |
    | `retrieval_embedding` | path of a retrieval autoencoder's checkpoint; None: average pooling |
    """  # noqa: E501  (a table)

    @property
    def description(self) -> str:
        return "AnyFlow FAR with retrieval memory: the frames most like the newest come back into the attention."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec(name, kind) for name, kind in COMPONENTS.items()]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [
            ConfigSpec("retrieval_memory", {}, "fields of RetrievalConfig, or 'native'"),
            ConfigSpec("retrieval_embedding", None, "path of a retrieval autoencoder's checkpoint"),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        taken = inspect.signature(AnyFlowFARPipeline.__call__).parameters
        return [InputParam(name, default=taken[name].default) for name in taken if name not in ("self", "return_dict")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("videos", description="the pipeline's frames, as `output_type` says"),
            OutputParam("retrieved", description="what each block got from memory"),
        ]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """
        Raises:
            TypeError, ValueError: `retrieval_memory` or an input is wrong.
            FileNotFoundError: there is no checkpoint at `retrieval_embedding`.
        """
        block_state: Any = self.get_block_state(state)
        given = {name: getattr(block_state, name) for name in self.input_names}
        pipeline = AnyFlowFARPipeline(**{name: getattr(components, name) for name in COMPONENTS})
        config = _config(pipeline, components.config["retrieval_memory"])
        with patch(pipeline, config, embedding=components.config["retrieval_embedding"]) as patched:
            block_state.videos = pipeline(**given).frames
            block_state.retrieved = patched.retrieved
        self.set_block_state(state, block_state)
        return components, state

    def save_config(self, save_directory: str | os.PathLike[Any], push_to_hub: bool = False, **options: Any) -> None:
        """Part of `save_pretrained`. Also writes a file of one import, through which, beside a pipeline that was saved,
        `ModularPipeline.from_pretrained(folder, trust_remote_code=True)` finds this block."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **options)
        module, name = type(self).__module__, type(self).__name__
        file = Path(save_directory, f"{module.rpartition('.')[2]}.py")
        file.write_text(f"from {module} import {name} as {name}\n")


def _config(pipeline: Any, saved: Any) -> RetrievalConfig | Literal["native"]:
    if saved == "native":
        return "native"
    if not isinstance(saved, Mapping):
        raise TypeError(f"retrieval_memory must be a dict of RetrievalConfig's fields or 'native', got {saved!r:.80}")
    own = RetrievalConfig.from_backbone(pipeline)
    fields = vars(own) | dict(saved)
    if "context_frames" not in saved and isinstance(fields["memory_frames"], int):
        # The model's own window stays what it is.
        fields["context_frames"] = own.local_frames + fields["memory_frames"]
    return RetrievalConfig(**fields)
