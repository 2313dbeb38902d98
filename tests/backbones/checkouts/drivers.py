"""One driver for each repository: how to recognise its checkout, build its pipeline and have it generate."""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.checkouts.foreign import Settings, Sizes, use_tiny
from longlive_rag import RetrievalConfig

Config = RetrievalConfig | str | None


@dataclass(frozen=True)
class Video:
    """What to generate; sizes in latent pixels."""

    frames: int
    size: tuple[int, int] = (4, 8)
    batch: int = 1
    prompts: tuple[str, ...] = ("a cat",)
    switches: tuple[int, ...] = ()
    """First frame of each prompt after the first."""
    given: int = 0
    """Frames of an image or video that it goes on from."""
    seed: int = 0

    def noise(self, channels: int = 16) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch, self.frames, channels, *self.size, generator=generator)

    def initial(self, channels: int = 16) -> Tensor | None:
        if not self.given:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.batch, self.given, channels, *self.size, generator=generator)


@dataclass(frozen=True)
class Case:
    name: str
    videos: tuple[Video, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    config: Config = "native"
    """For `patch`; None: what it reads off the pipeline."""
    family: str | None = None
    """As which it is recognised, if not as its driver's."""


def sizes_in_turn(frames: int) -> tuple[Video, ...]:
    """Landscape, portrait with as many tokens, and another number of tokens."""
    other = min(frames, 30)
    return (Video(frames), Video(other, size=(8, 4), seed=1), Video(other, size=(4, 12), seed=2))


class TextEncoder(torch.nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self._sizes = sizes

    def forward(self, text_prompts: Sequence[str]) -> dict[str, Tensor]:
        shape = (self._sizes.text_len, self._sizes.text_dim)
        generators = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in text_prompts]
        return {"prompt_embeds": torch.stack([torch.randn(shape, generator=generator) for generator in generators])}


class Decoder(torch.nn.Module):
    """Stands for the VAE; the latents are what is compared."""

    def decode_to_pixel(self, latents: Tensor, *_: Any, **__: Any) -> Tensor:
        return latents

    decode_to_pixel_chunk = decode_to_pixel


class Driver:
    """Self-Forcing and Causal-Forcing, and what their relatives share."""

    repository = "Self-Forcing"
    family = "Self-Forcing"
    mark = "pipeline/causal_inference.py"
    """A file that only checkouts of this family, or of one that comes later in the list, have."""
    models: tuple[str, ...] = ("wan.modules.causal_model",)
    pipeline = ("pipeline.causal_inference", "CausalInferencePipeline")
    caches: tuple[str, ...] = ("kv_cache1",)
    channels = 16
    published: dict[str, Any] = {  # noqa: RUF012
        "denoising_step_list": [1000, 500], "warp_denoising_step": True, "num_frame_per_block": 3,
        "independent_first_frame": False, "context_noise": 0,
    }  # fmt: skip

    def __init__(self, root: Path, sizes: Sizes, fill: Callable[[torch.nn.Module], None]) -> None:
        self.root, self.sizes, self._fill = root, sizes, fill
        for name in self.models:
            use_tiny(importlib.import_module(name).CausalWanModel, sizes, fill)

    @classmethod
    def fits(cls, root: Path) -> bool:
        return (root / cls.mark).is_file()

    def cases(self, frames: int) -> list[Case]:
        window = {"local_attn_size": 9, "sink_size": 1}
        return [
            Case("window 9, sink 1", sizes_in_turn(frames), {"model_kwargs": window}),
            Case("all of the past", sizes_in_turn(21)),
            Case("window 9, batch of 2", (Video(30, batch=2),), {"model_kwargs": window}),
            Case(
                "image-to-video",
                (Video(30, given=1),),
                {"model_kwargs": {"local_attn_size": 9}, "independent_first_frame": True},
            ),
        ]

    def build(self, settings: dict[str, Any]) -> Any:
        self.sizes.tokens = 8
        kwargs = Settings({"local_attn_size": -1, "timestep_shift": 5.0} | settings.get("model_kwargs", {}))
        args = Settings(self.published | settings | {"model_kwargs": kwargs})
        pipeline = self.make(args)
        pipeline.num_transformer_blocks = self.sizes.layers
        return pipeline

    def make(self, args: Settings) -> Any:
        module, name = self.pipeline
        make = getattr(importlib.import_module(module), name)
        return make(args, torch.device("cpu"), text_encoder=TextEncoder(self.sizes), vae=Decoder())

    def target(self, pipeline: Any) -> Any:
        """What a user patches."""
        return pipeline

    def resize(self, pipeline: Any, size: tuple[int, int], batch: int) -> None:
        """Set the pipeline up for another number of tokens; with as many, it keeps its cache."""
        tokens = math.prod(size) // 4
        if tokens == self.sizes.tokens:
            return
        for module in pipeline.generator.model.modules():
            for name in ("max_attention_size", "frame_length", "block_length"):
                if hasattr(module, name):
                    setattr(module, name, getattr(module, name) // self.sizes.tokens * tokens)
        pipeline.generator.seq_len = pipeline.generator.seq_len // self.sizes.tokens * tokens
        self.sizes.tokens = pipeline.frame_seq_length = tokens
        for name in self.caches:
            setattr(pipeline, name, None)

    def generate(self, pipeline: Any, video: Video) -> Tensor:
        """Latents [B, F, C, H, W]."""
        self.resize(pipeline, video.size, video.batch)
        torch.manual_seed(video.seed)
        options = {} if video.initial() is None else {"initial_latent": video.initial()}
        prompts = list(video.prompts) * video.batch
        return pipeline.inference(video.noise(), prompts, return_latents=True, **options)[1]

    def expected(self, pipeline: Any, video: Video) -> Tensor:
        """What the patched pipeline should make; the unpatched one's own, unless that is known to be at fault."""
        return self.generate(pipeline, video)

    def retrieved(self, pipeline: Any) -> list[list[int]] | None:
        """Frames that each block retrieved by the repository's own code."""
        return None


class CausalForcing(Driver):
    repository = "Causal-Forcing"
    mark = "get_causal_ode_data_chunkwise.py"

    def cases(self, frames: int) -> list[Case]:
        window = {"local_attn_size": 9, "sink_size": 1}
        return [
            Case("chunk-wise, window 9, sink 1", sizes_in_turn(frames), {"model_kwargs": window}),
            Case("frame-wise, window 9, sink 1", (Video(30),), {"model_kwargs": window, "num_frame_per_block": 1}),
        ]


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
        return [Case("all of the past", sizes_in_turn(21))]

    def make(self, args: Settings) -> Any:
        models = importlib.import_module("causvid.models")
        models.TEXTENCODER_NAME_TO_CLASS["causal_wan"] = lambda: TextEncoder(self.sizes)
        models.VAE_NAME_TO_CLASS["causal_wan"] = Decoder
        base = importlib.import_module("causvid.models.wan.wan_base.modules.model").WanModel
        base.from_pretrained = classmethod(lambda *_, **__: torch.nn.Identity())
        make = importlib.import_module("causvid.models.wan.causal_inference").InferencePipeline
        own = {"model_name": "causal_wan", "denoising_step_list": [1000, 522, 0], "warp_denoising_step": False}
        return make(Settings(args | own), torch.device("cpu"))


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
            Case("one shot", sizes_in_turn(frames), {"inference": inference}),
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
        conditional = pipeline.text_encoder(list(video.prompts) * video.batch)
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


DRIVERS: tuple[type[Driver], ...] = (
    LongLive2, CausVid, Krea, LongLiveRAG, LongLive, MemFlow, RollingForcing, InfinityRoPE, CausalForcing, Driver,
)  # fmt: skip
