"""Drivers of the repositories that are near to Self-Forcing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.checkouts.driver import Case, Decoder, Driver, TextEncoder, Video, sizes_in_turn
from backbones.checkouts.foreign import Settings


class CausalForcing(Driver):
    repository = "Causal-Forcing"
    mark = "get_causal_ode_data_chunkwise.py"

    def cases(self, frames: int) -> list[Case]:
        window = {"local_attn_size": 9, "sink_size": 1}
        return [
            Case("chunk-wise, window 9, sink 1", sizes_in_turn(frames), {"model_kwargs": window}),
            Case("chunk-wise, batch of 2", (Video(30, batch=2),), {"model_kwargs": window}),
            Case("frame-wise, window 9, sink 1", (Video(30),), {"model_kwargs": window, "num_frame_per_block": 1}),
            Case(
                "frame-wise, image-to-video",
                (Video(30, given=1),),
                {"model_kwargs": window, "num_frame_per_block": 1},
            ),
        ]


class RollingForcing(Driver):
    repository = "Rolling Forcing"
    family = "Rolling Forcing"
    mark = "pipeline/rolling_forcing_inference.py"
    pipeline = ("pipeline.rolling_forcing_inference", "CausalInferencePipeline")
    caches = ("kv_cache_clean",)
    published = Driver.published | {"denoising_step_list": [1000, 800, 600, 400, 200]}

    def cases(self, frames: int) -> list[Case]:
        return [Case("window 21, sink 3", sizes_in_turn(frames)), Case("batch of 2", (Video(30, batch=2),))]

    def generate(self, pipeline: Any, video: Video) -> Tensor:
        self.resize(pipeline, video.size, video.batch)
        torch.manual_seed(video.seed)
        prompts = list(video.prompts) * video.batch
        return pipeline.inference_rolling_forcing(video.noise(), prompts, return_latents=True)[1]


class InfinityRoPE(Driver):
    repository = "Infinity-RoPE"
    family = "Infinity-RoPE"

    @classmethod
    def fits(cls, root: Path) -> bool:
        path = root / cls.mark
        return path.is_file() and "kv_flush" in path.read_text()

    def cases(self, frames: int) -> list[Case]:
        window = {"model_kwargs": {"local_attn_size": 9, "sink_size": 1}}
        scenes = Video(frames, prompts=("a cat [15s] | a dog [9s#] | a house",), seed=4)
        early = Video(30, prompts=("a cat [1.5s] | a dog",), seed=5)
        early_cut = Video(30, prompts=("a cat [0.75s#] | a dog",), seed=6)
        return [
            Case("one scene", sizes_in_turn(frames), window),
            Case("scenes, soft and cut, window full", (scenes,), window),
            Case("scenes before the window is full, newest frames kept", (early, early_cut), window),
        ]

    def expected(self, pipeline: Any, video: Video) -> Tensor:
        """Before its window is full, the published flush copies frames that are not there yet, zeros, in the place of
        the two newest; here it copies those."""
        self.resize(pipeline, video.size, video.batch)
        kept: list[dict[str, Tensor]] = []
        state: dict[str, Any] = {"index": None, "end": 0}
        tokens = self.sizes.tokens

        def mend(_: Any, __: Any, options: dict[str, Any]) -> None:
            cache = options["kv_cache"]
            index = cache[0]["local_end_index"]
            flushed = state["index"] is not None and index is not state["index"] and int(index) == 3 * tokens
            if flushed and state["end"] < cache[0]["k"].shape[1]:
                for layer, before in zip(cache, kept, strict=True):
                    for name in ("k", "v"):
                        newest = before[name][:, state["end"] - 2 * tokens : state["end"]]
                        layer[name][:, tokens : 3 * tokens] = newest
            state["index"] = index

        def keep(_: Any, __: Any, options: dict[str, Any], ___: Any) -> None:
            cache = options["kv_cache"]
            kept[:] = [{name: layer[name].clone() for name in ("k", "v")} for layer in cache]
            state["end"] = int(cache[0]["local_end_index"])

        before = pipeline.generator.register_forward_pre_hook(mend, with_kwargs=True)
        after = pipeline.generator.register_forward_hook(keep, with_kwargs=True)
        latents = self.generate(pipeline, video)
        before.remove()
        after.remove()
        return latents


class CausVid(Driver):
    repository = "CausVid"
    family = "CausVid"
    mark = "causvid/models/wan/causal_inference.py"
    models = ("causvid.models.wan.causal_model",)

    def cases(self, frames: int) -> list[Case]:
        given = (Video(21, given=6),)
        return [Case("all of the past", sizes_in_turn(21, other=21)), Case("6 of its frames given", given)]

    def generate(self, pipeline: Any, video: Video) -> Tensor:
        self.resize(pipeline, video.size, video.batch)
        torch.manual_seed(video.seed)
        prompts = list(video.prompts) * video.batch
        return pipeline.inference(video.noise(), prompts, start_latents=video.initial(), return_latents=True)[1]

    def make(self, args: Settings) -> Any:
        models = importlib.import_module("causvid.models")
        models.TEXTENCODER_NAME_TO_CLASS["causal_wan"] = lambda: TextEncoder(self.sizes)
        models.VAE_NAME_TO_CLASS["causal_wan"] = Decoder
        base = importlib.import_module("causvid.models.wan.wan_base.modules.model").WanModel
        base.from_pretrained = classmethod(lambda *_, **__: torch.nn.Identity())
        make = importlib.import_module("causvid.models.wan.causal_inference").InferencePipeline
        own = {"model_name": "causal_wan", "denoising_step_list": [1000, 522, 0], "warp_denoising_step": False}
        return make(Settings(args | own), torch.device("cpu"))


class Krea(Driver):
    """The server needs a GPU: its model and pipeline are called as it calls them."""

    repository = "krea realtime"
    family = "krea realtime"
    mark = "release_server.py"
    cached_frames = 6

    def cases(self, frames: int) -> list[Case]:
        return [
            Case("cache of 6 frames", sizes_in_turn(frames)),
            Case("cache of 6 frames, projections fused", (Video(30),), {"fuse": True}),
            Case("prompt switch", (Video(30, prompts=("a cat", "a dog"), switches=(15,)),)),
        ]

    def build(self, settings: dict[str, Any]) -> Any:
        pipeline = super().build({name: value for name, value in settings.items() if name != "fuse"})
        for block in pipeline.generator.model.blocks:
            if settings.get("fuse"):
                block.self_attn.fuse_projections()
        pipeline.local_attn_size = self.cached_frames + pipeline.num_frame_per_block
        return pipeline

    def generate(self, pipeline: Any, video: Video) -> Tensor:
        self.resize(pipeline, video.size, video.batch)
        torch.manual_seed(video.seed)
        noise, model, frames = video.noise(), pipeline.generator.model, pipeline.num_frame_per_block
        output = torch.zeros_like(noise)
        conditional = pipeline.text_encoder([video.prompts[0]] * video.batch)
        pipeline._initialize_crossattn_cache(video.batch, noise.dtype, noise.device)
        pipeline._initialize_kv_cache(video.batch, noise.dtype, noise.device)
        steps = pipeline.denoising_step_list
        for start in range(0, video.frames, frames):
            call = {
                "conditional_dict": conditional, "crossattn_cache": pipeline.crossattn_cache,
                "current_start": min(start, self.cached_frames) * self.sizes.tokens,
            }  # fmt: skip
            if start:
                pipeline._initialize_kv_cache(video.batch, noise.dtype, noise.device)
                past = output[:, :start]
                clean = torch.cat([past[:, :1], past[:, 1:][:, 1 - self.cached_frames :]], dim=1)
                model.block_mask = model._prepare_blockwise_causal_attn_mask(
                    device="cpu", num_frames=clean.shape[1], frame_seqlen=self.sizes.tokens,
                    num_frame_per_block=frames, local_attn_size=-1,
                )  # fmt: skip
                times = torch.zeros(clean.shape[:2])
                pipeline.generator(noisy_image_or_video=clean, timestep=times, kv_cache=pipeline.kv_cache1, **call)
                model.block_mask = None
            if start in video.switches:  # after the pass that fills the cache, which is still under the old prompt
                conditional |= pipeline.text_encoder([video.prompts[video.switches.index(start) + 1]] * video.batch)
                pipeline._initialize_crossattn_cache(video.batch, noise.dtype, noise.device)
                call["crossattn_cache"] = pipeline.crossattn_cache
            latents = noise[:, start : start + frames]
            for step, time in enumerate(steps):
                times = time * torch.ones(latents.shape[:2])
                _, predicted = pipeline.generator(
                    noisy_image_or_video=latents, timestep=times, kv_cache=pipeline.kv_cache1, **call
                )
                if step + 1 < len(steps):
                    flat = predicted.flatten(0, 1)
                    level = steps[step + 1] * torch.ones(len(flat), dtype=torch.long)
                    latents = pipeline.scheduler.add_noise(flat, torch.randn_like(flat), level)
                    latents = latents.unflatten(0, predicted.shape[:2])
            output[:, start : start + frames] = predicted
        return output
