"""Drivers of LongLive, and of the repositories that build on it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.checkouts.driver import Case, Driver, Video, sizes_in_turn
from backbones.checkouts.foreign import Settings, Sizes, use_tiny


class LongLive(Driver):
    repository = "LongLive 1"
    family = "LongLive"
    mark = "wan/modules/causal_model_infinity.py"
    models: tuple[str, ...] = ("wan.modules.causal_model", "wan.modules.causal_model_infinity")
    pipeline = ("pipeline.interactive_causal_inference", "InteractiveCausalInferencePipeline")

    def cases(self, frames: int) -> list[Case]:
        window = {"local_attn_size": 9, "sink_size": 3}
        infinite = window | {"use_infinite_attention": True}
        switch = Video(frames, prompts=("a cat", "a dog"), switches=(frames // 2 // 3 * 3,))
        early = Video(30, prompts=("a cat", "a dog"), switches=(6,))
        return [
            Case("absolute", sizes_in_turn(frames), {"model_kwargs": window, "global_sink": True}),
            Case("absolute, batch of 2", (Video(30, batch=2),), {"model_kwargs": window, "global_sink": True}),
            Case("relative (infinity)", sizes_in_turn(frames), {"model_kwargs": infinite, "global_sink": True}),
            Case("prompt switches, global sink", (switch, early), {"model_kwargs": window, "global_sink": True}),
            Case("prompt switches, new sink", (switch, early), {"model_kwargs": window, "global_sink": False}),
            Case("prompt switches, relative, global sink", (switch,), {"model_kwargs": infinite, "global_sink": True}),
        ]

    def generate(self, pipeline: Any, video: Video) -> Tensor:
        self.resize(pipeline, video.size, video.batch)
        torch.manual_seed(video.seed)
        return pipeline.inference(
            video.noise(), text_prompts_list=[[prompt] * video.batch for prompt in video.prompts],
            switch_frame_indices=list(video.switches), return_latents=True,
        )[1]  # fmt: skip


class LongLiveRAG(Driver):
    repository = "LongLive-RAG"
    family = "LongLive-RAG"
    mark = "wan/modules/causal_model_latentmem.py"
    models: tuple[str, ...] = ("wan.modules.causal_model", "wan.modules.causal_model_latentmem")

    def cases(self, frames: int) -> list[Case]:
        kwargs = {
            "local_attn_size": 12, "sink_size": 1, "memory_size": 6, "recent_exclude": 5, "use_latentmem": True,
            "compression_method": "avg_pool",
        }  # fmt: skip
        small = kwargs | {"local_attn_size": 9, "memory_size": 3, "recent_exclude": 2}
        return [
            Case("its own retrieval, the paper's numbers", sizes_in_turn(frames), {"model_kwargs": kwargs}, None),
            Case("its own retrieval, window 9, K 3, R 2", (Video(frames),), {"model_kwargs": small}, None),
            Case(
                "without memory",
                (Video(30),),
                {"model_kwargs": {"local_attn_size": 12, "sink_size": 1}},
                family="LongLive",
            ),
        ]

    def generate(self, pipeline: Any, video: Video) -> Tensor:
        self.resize(pipeline, video.size, video.batch)
        torch.manual_seed(video.seed)
        return pipeline.inference(video.noise(), list(video.prompts) * video.batch, return_latents=True)[1]

    def retrieved(self, pipeline: Any) -> list[list[int]] | None:
        return [entry["selected_global_frames"][0] for entry in pipeline.memory_indices_log]


class MemFlow(LongLive):
    repository = "MemFlow"
    family = "MemFlow"
    mark = "prompts/interactive_example.jsonl"
    models: tuple[str, ...] = ("wan.modules.causal_model",)
    caches = ("kv_cache1", "kv_bank1")

    @classmethod
    def fits(cls, root: Path) -> bool:
        path = root / Driver.mark
        return path.is_file() and "kv_bank" in path.read_text()

    def cases(self, frames: int) -> list[Case]:
        window = {"local_attn_size": 9, "sink_size": 3, "bank_size": 3, "record_interval": 3}
        switch = Video(frames, prompts=("a cat", "a dog"), switches=(frames // 2 // 3 * 3,))
        return [
            Case("bank made empty", sizes_in_turn(frames), {"model_kwargs": window, "global_sink": True}),
            Case("batch of 2", (Video(30, batch=2),), {"model_kwargs": window, "global_sink": True}),
            Case("prompt switch, global sink", (switch,), {"model_kwargs": window, "global_sink": True}),
            Case("prompt switch, new sink", (switch,), {"model_kwargs": window, "global_sink": False}),
        ]

    def expected(self, pipeline: Any, video: Video) -> Tensor:
        """Without a global sink, the published code goes on with a sink of zeros, which the switch never writes; here
        its pass writes it."""
        if pipeline.global_sink or not video.switches:
            return self.generate(pipeline, video)
        attentions = [block.self_attn for block in pipeline.generator.model.blocks]
        sink = attentions[0].sink_size

        def write_all(_: Any, __: Any, options: dict[str, Any]) -> None:
            for attention in attentions:
                attention.sink_size = 0 if options.get("is_recache") else sink

        hook = pipeline.generator.register_forward_pre_hook(write_all, with_kwargs=True)
        latents = self.generate(pipeline, video)
        hook.remove()
        return latents

    def make(self, args: Settings) -> Any:
        pipeline = super().make(args)

        pipeline.bank_size = 0

        def without_bank(module: Any, call: tuple[Any, ...], options: dict[str, Any]) -> Any:
            return call, options | {"update_bank": False, "q_bank": False}

        pipeline.generator.register_forward_pre_hook(without_bank, with_kwargs=True)
        return pipeline


class LongLive2(Driver):
    repository = "LongLive 2"
    family = "LongLive 2"
    mark = "wan_5b/modules/causal_model.py"
    models: tuple[str, ...] = ("wan_5b.modules.causal_model",)
    pipeline = ("pipeline.causal_diffusion_inference", "CausalDiffusionInferencePipeline")
    caches = ("kv_cache_pos", "kv_cache_neg")
    channels = 48

    def __init__(self, root: Path, sizes: Sizes, fill: Callable[[torch.nn.Module], None]) -> None:
        self.root, self.sizes = root, sizes
        for name in self.models:
            use_tiny(
                importlib.import_module(name).CausalWanModel, sizes, fill, in_dim=self.channels, out_dim=self.channels
            )
        published = importlib.import_module("utils.config").wan_default_config["Wan2.2-TI2V-5B"]
        published.update(num_heads=sizes.heads, head_dim=sizes.head_dim, num_transformer_blocks=sizes.layers)

    def cases(self, frames: int) -> list[Case]:
        frames = frames // 4 * 4
        inference = {"sampling_steps": 2, "sink_size": 4, "local_attn_size": 16}
        shots = inference | {"multi_shot_sink": True, "multi_shot_rope_offset": 8}
        cut = importlib.import_module("utils.dataset").DEFAULT_SCENE_CUT_PREFIX
        scenes = Video(
            frames, prompts=("a cat", f"{cut}a dog", f"{cut}a house"), switches=(frames // 3, frames // 3 * 2)
        )
        return [
            Case("one shot", sizes_in_turn(frames, other=28), {"inference": inference}),
            Case("three shots, offsets and pins", (scenes,), {"inference": shots}),
            Case(
                "guidance 3, t_scale 0.5",
                (Video(frames // 2 // 4 * 4),),
                {"inference": inference | {"guidance_scale": 3.0, "negative_prompt": "bad"}, "inference_t_scale": 0.5},
            ),
            Case("relative", (Video(frames),), {"inference": inference, "use_relative_rope": True}),
            Case("batch of 2", (Video(frames // 2 // 4 * 4, batch=2),), {"inference": inference}),
            Case(
                "image-to-video",
                (Video(frames // 2 // 4 * 4, given=1),),
                {"inference": inference | {"independent_first_frame": True}},
            ),
        ]

    def build(self, settings: dict[str, Any]) -> Any:
        self.sizes.tokens = 8
        kwargs = {"model_name": "Wan2.2-TI2V-5B", "timestep_shift": 5.0, "num_frame_per_block": 4}
        args = {"image_or_video_shape": [1, 32, self.channels, 4, 8], "num_frame_per_block": 4, "context_noise": 0}
        args |= settings | {"model_kwargs": Settings(kwargs), "inference": Settings(settings["inference"])}
        return self.make(Settings(args))

    def generate(self, pipeline: Any, video: Video) -> Tensor:
        self.resize(pipeline, video.size, video.batch)
        torch.manual_seed(video.seed)
        starts = range(0, video.frames, 4)
        # The prefix stands only at the first block of a shot.
        prompts = []
        for start in starts:
            shot = sum(first // 4 * 4 <= start for first in video.switches)
            first = start == 0 or any(switch // 4 * 4 == start for switch in video.switches)
            prompt = video.prompts[shot]
            prompts.append(prompt if first else prompt[prompt.find("a ") :])
        options = {} if not video.given else {"initial_latent": video.initial(self.channels)}
        return pipeline.inference(video.noise(self.channels), [prompts] * video.batch, return_latents=True, **options)
