"""ComfyUI's autoregressive Wan, sampled as its workflows do: guider, model patcher, sampler of `SamplerARVideo`.

The packages of ComfyUI's requirements.txt must be importable, but for torchvision and torchaudio, which get doubles.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.checkouts.driver import Case, Driver, TextEncoder, Video
from backbones.checkouts.foreign import Sizes
from longlive_rag.generation.sampling import warp_steps

SHIFT = 5.0


class ComfyUI(Driver):
    """A pipeline is a `ModelPatcher`."""

    repository = "ComfyUI"
    family = "ComfyUI autoregressive Wan"
    mark = "comfy/ldm/wan/ar_model.py"
    models = ()
    caches = ()

    def __init__(self, root: Path, sizes: Sizes, fill: Callable[[torch.nn.Module], None]) -> None:
        super().__init__(root, sizes, fill)
        importlib.import_module("comfy.cli_args").args.cpu = True
        names = ("model_base", "model_patcher", "samplers", "supported_models")
        self._comfy: Any = {name: importlib.import_module(f"comfy.{name}") for name in names}

    def cases(self, frames: int) -> list[Case]:
        return [
            Case("chunk-wise", (Video(21), Video(21, size=(8, 4), seed=1), Video(21, size=(4, 12), seed=2))),
            Case("frame-wise", (Video(21),), {"num_frame_per_block": 1}),
            Case("batch of 2", (Video(21, batch=2),)),
            Case("image-to-video", (Video(21, given=1),), {"num_frame_per_block": 1}),
        ]

    def build(self, settings: dict[str, Any]) -> Any:
        sizes = {**self.sizes.model, "in_dim": 16, "out_dim": 16}
        config = self._comfy["supported_models"].WAN21_T2V({"image_model": "wan2.1", "model_type": "t2v", **sizes})
        config.sampling_settings = {"shift": SHIFT}
        config.set_inference_dtype(torch.float32, None)
        base = self._comfy["model_base"].WAN21_CausalAR(config, device="cpu")
        self._fill(base.diffusion_model)
        cpu = torch.device("cpu")
        patcher = self._comfy["model_patcher"].ModelPatcher(base.requires_grad_(False), cpu, cpu)
        patcher.frames_per_block = settings.get("num_frame_per_block", 3)
        return patcher

    def resize(self, pipeline: Any, size: tuple[int, int], batch: int) -> None:
        pass  # its sampler makes a new cache for each video

    def generate(self, pipeline: Any, video: Video) -> Tensor:
        samplers = self._comfy["samplers"]
        guider = samplers.CFGGuider(pipeline.clone())
        prompt = TextEncoder(self.sizes)(list(video.prompts))["prompt_embeds"]
        guider.set_conds([[prompt, {}]], [[prompt, {}]])
        guider.set_cfg(1.0)
        initial = video.initial()
        if initial is not None:  # as its node ARVideoI2V puts it there
            options = guider.model_options.setdefault("transformer_options", {})
            latent_format = pipeline.model.latent_format
            options["ar_config"] = {"initial_latent": latent_format.process_out(initial.transpose(1, 2))}
        steps = torch.tensor([*warp_steps(self.published["denoising_step_list"], SHIFT), 0.0]) / 1000
        sampler = samplers.ksampler("ar_video", {"num_frame_per_block": pipeline.frames_per_block})
        noise = video.noise().transpose(1, 2)
        samples = guider.sample(noise, torch.zeros_like(noise), sampler, steps, disable_pbar=True, seed=video.seed)
        return samples.transpose(1, 2)
