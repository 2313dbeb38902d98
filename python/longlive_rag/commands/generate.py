"""`longlive-rag generate`: long videos from a Wan-family checkpoint and prompts."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from longlive_rag.budget import Budget, BudgetOptions, format_bytes
from longlive_rag.config import PAPER_STEPS, RetrievalConfig, Solver
from longlive_rag.files import output_folder
from longlive_rag.generation.prompts import Script, enumerate_videos, read_scripts, script_of
from longlive_rag.generation.wan_files import (
    BACKBONES,
    WanFiles,
    find_checkpoint,
    find_tiny_decoder,
    find_wan_files,
    from_where,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from longlive_rag.generation.beginning import Beginning
    from longlive_rag.generation.decoder import Decoder
    from longlive_rag.generation.pipeline import Pipeline
    from longlive_rag.generation.settings import VideoSettings
    from longlive_rag.parallel.team import Team
    from longlive_rag.ranks import Ranks


@dataclass(frozen=True)
class Generate:
    """Generate long videos with retrieval memory from a Wan-family checkpoint and prompts.

    Writes one video per prompt, which can be watched while it grows, with a log of what each block retrieved (JSON and
    PNG) next to it. A run that was stopped in whatever way goes on after its last finished block when it is started
    again: the videos are the same as without the stop. Under torchrun, the processes share the prompts; with
    --sequence-parallel, so many of them make each video together.

    Examples:
      longlive-rag generate --backbone self-forcing \\
          --checkpoint self_forcing_dmd.pt --wan-dir Wan2.1-T2V-1.3B --seconds 60 \\
          --prompt "A red fox walks through snow" --output videos
      torchrun --nproc-per-node 8 --no-python longlive-rag generate \\
          --backbone longlive --checkpoint longlive_base.pt --lora lora.pt \\
          --wan-dir Wan2.1-T2V-1.3B --prompts prompts.txt --output videos
      torchrun --nproc-per-node 4 --no-python longlive-rag generate \\
          --sequence-parallel 4 --backbone self-forcing \\
          --checkpoint self_forcing_dmd.pt --wan-dir Wan2.1-T2V-1.3B \\
          --prompt "A red fox walks through snow" --output videos
    """

    # fmt: off
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "what to make": (
            "output", "prompt", "prompt_at", "prompts", "image", "video", "seconds", "fps", "height", "width", "replay",
            "overwrite",
        ),
        "weights": ("backbone", "wan_dir", "checkpoint", "weights", "decoder", "lora", "lora_alpha", "embedding"),
        "context policy": ("policy",),
        "sampling": ("denoising_steps", "timestep_shift", "solver", "context_noise", "seed"),
        "machine": (
            "device", "dtype", "compile", "sequence_parallel", "shard_weights", "low_memory", "memory", "rebuild",
        ),
    }
    # fmt: on

    backbone: Literal["self-forcing", "causal-forcing", "longlive", "longlive2", "wan"]
    """Family of the checkpoint; wan is any other causal few-step model with Wan's transformer."""
    wan_dir: Path
    """Folder with the text encoder, tokenizer and VAE of Wan2.1-T2V-1.3B, for longlive2 of Wan2.2-TI2V-5B, in Wan's or
    diffusers' layout."""
    output: Path
    """Folder for the videos; created if it is missing."""
    checkpoint: Path | None = None
    """Weights of the transformer: .pt, .safetensors, an index of shards, or a folder."""
    decoder: Literal["wan", "tiny"] = "wan"
    """What makes pictures of latents: Wan's VAE, or taehv's imitation of it, much faster and less sharp, whose file
    taew2_1, or taew2_2 for longlive2, must lie in --wan-dir."""
    lora: Path | None = None
    """LoRA to merge into the weights (LongLive has one)."""
    lora_alpha: float | None = None
    """Alpha of the LoRA, whose scale is alpha / rank. Default: its rank."""
    weights: str | None = None
    """Entry of a .pt checkpoint to load, such as generator_ema. Default: the one that the authors evaluate."""
    prompt: str | None = None
    """Text that describes the video; either this or --prompts must be given."""
    prompt_at: tuple[str, ...] = ()
    """Times at which the prompt changes, each with the new one: 10s "The fox sleeps" 20s "It wakes up"."""
    prompts: Path | None = None
    """Text file with one prompt per line, for one video each; in a line, @10s stands before a prompt for the time from
    then on."""
    image: Path | None = None
    """Picture that each video begins with; it is held for the first block, or for longlive2 the first latent frame."""
    video: Path | None = None
    """Video, of the same frame rate, that each video goes on from: it begins with the end of that one."""
    seconds: float = 30.0
    """Length of each video, rounded up to whole blocks."""
    fps: float = 16.0
    """Frames per second of the video file."""
    height: int = 480
    """A multiple of 16."""
    width: int = 832
    """A multiple of 16."""
    policy: RetrievalConfig = field(default_factory=RetrievalConfig)
    """The context policy."""
    embedding: Path | None = None
    """Checkpoint of the retrieval autoencoder used to search memory. Default: the mean of each latent channel."""
    denoising_steps: tuple[float, ...] = PAPER_STEPS
    """Timesteps in descending order from 1000, before the shift."""
    timestep_shift: float = 5.0
    """Shift of the noise schedule."""
    solver: Solver = "renoise"
    """From step to step: fresh noise on the clean prediction, or UniPC, LongLive 2's sampler."""
    context_noise: float = 0.0
    """Timestep of the clean pass, which writes the keys and values that later blocks attend to."""
    seed: int = 0
    """Seed of the noise, the same for every prompt."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto: the GPU if there is one, under torchrun that of the process."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of weights and memory; auto is bfloat16 on a GPU and float32 on a CPU."""
    compile: bool = False
    """Compile the transformer with torch.compile: the first block waits for it, and later runs find it on disk. The
    video is another one in its last bits."""
    sequence_parallel: int = 1
    """Processes, of those that torchrun starts, that make each video together; must divide the attention heads. Memory
    options are for each of them."""
    shard_weights: bool = False
    """With --sequence-parallel: each process holds a share of the transformer's weights, and those of one layer are
    gathered while it works. For models that do not fit one GPU."""
    low_memory: bool = False
    """Run the text encoder on the CPU, and keep the VAE there while the transformer runs."""
    memory: BudgetOptions = field(default_factory=BudgetOptions)
    """How much memory keys and values may take."""
    rebuild: bool = False
    """Compute keys and values again from the latents when a frame is retrieved that fitted nowhere; approximate."""
    replay: Path | None = None
    """JSON file of a video with these settings, whose blocks are to retrieve what it says, bit for bit, instead of what
    is found to be most similar."""
    overwrite: bool = False
    """Generate finished videos again, and begin anew where one was begun with other settings."""

    def run(self) -> int:
        import torch

        from longlive_rag.generation.existing import replayed, unfinished, video_facts
        from longlive_rag.parallel.team import join_team
        from longlive_rag.ranks import Ranks

        if self.shard_weights and self.sequence_parallel < 2:
            raise ValueError("shard_weights needs several processes for a video: give sequence_parallel too")
        if self.compile and self.sequence_parallel > 1:
            raise ValueError(f"compile must be off with sequence_parallel, got {self.sequence_parallel} ranks")
        settings, scripts = self.settings(), self._scripts()
        for script in scripts:
            if script.changes and script.changes[-1][0] >= self.seconds:
                raise ValueError(
                    f"prompts must change before the video's end at {self.seconds:g}s, got {script.changes[-1][0]:g}s"
                )
        beginning = self._beginning(settings)
        checkpoint = find_checkpoint(self.backbone, self.checkpoint)
        for name, path in (("lora", self.lora), ("embedding", self.embedding)):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"{name} file {path} does not exist")
        files = find_wan_files(self.wan_dir, self.backbone)
        if self.decoder == "tiny":
            find_tiny_decoder(self.wan_dir, self.backbone)
        for package in ("diffusers", "transformers", "ftfy"):
            importlib.import_module(package)
        published_lora = BACKBONES[self.backbone].lora
        if published_lora is not None and self.lora is None:
            print(f"Note: without --lora. {self.backbone} is a base and {from_where([published_lora], Path('.'))}")
        unlike = self._unlike_published()
        if unlike:
            print(f"Note: {self.backbone} is published with {unlike}.")
        budget = replace(self.memory.budget, rebuild=self.rebuild)
        ranks = Ranks.from_environment()
        device = self.torch_device(ranks)
        dtype = self.torch_dtype(device)
        facts = {
            "backbone": self.backbone,
            "checkpoint": checkpoint.name,
            "weights": self.weights,
            "lora": self.lora.name if self.lora else None,
            "lora_alpha": self.lora_alpha,
            "embedding": self.embedding.name if self.embedding else None,
            "dtype": str(dtype).removeprefix("torch."),
            "compile": self.compile or None,
            "solver": None if self.solver == "renoise" else self.solver,
            "decoder": None if self.decoder == "wan" else self.decoder,
            "beginning": beginning.identity if beginning else None,
        }
        output = output_folder(self.output)
        replay = None if self.replay is None else replayed(self.replay, scripts, facts, settings)
        with join_team(ranks, self.sequence_parallel, device) as team:
            videos = list(enumerate_videos(scripts, output))[team.number :: team.teams]
            todo = videos
            if not self.overwrite:
                todo = team.from_first(lambda: unfinished(videos, facts, settings, replay, budget, device))
            if team.first and len(todo) < len(videos):
                print(f"{len(videos) - len(todo)} of {len(videos)} videos are there already.")
            if not todo:
                return 0

            texts = [text for video in todo for text in video.script.texts]
            embeds = team.from_first(lambda: self._encode(texts, files, device, dtype))
            begin = None if beginning is None else _begin(beginning, files, device, dtype)
            pipeline = self.load(checkpoint, files, settings, embeds[0].shape[-1], device, dtype, budget, team)
            if team.first:
                together = f"{team.ranks} ranks, the first " if team.ranks > 1 else ""
                print(
                    f"{len(todo)} videos of {pipeline.latent_frames} latent frames on {together}{device}; keys and "
                    f"values take {format_bytes(pipeline.held_frames * pipeline.frame_bytes)} in all"
                    f"{' on each rank' if together else ''}."
                )
            left = iter(embeds)
            for video in todo:
                times = [0.0, *(seconds for seconds, _ in video.script.changes)]
                timed = [(seconds, next(left).to(device)) for seconds in times]
                more = video_facts(video.script, facts)
                try:
                    usage = pipeline.generate(
                        timed, video.path, more, begin=begin, replay=replay, overwrite=self.overwrite
                    )
                except (MemoryError, torch.OutOfMemoryError) as error:
                    raise ValueError(
                        f"{video.path.name} could not be finished: {error}; the same command goes on after its last "
                        f"finished block, also with less memory"
                    ) from error
                if team.first:
                    print(f"Written: {video.path}\nKeys and values in the end: {usage}", flush=True)
        return 0

    def settings(self) -> VideoSettings:
        """The options as settings of a video."""
        from longlive_rag.generation.sampling import Sampling
        from longlive_rag.generation.settings import VideoSettings

        return VideoSettings(
            seconds=self.seconds,
            fps=self.fps,
            height=self.height,
            width=self.width,
            sampling=Sampling(
                self.denoising_steps, self.timestep_shift, self.context_noise, self.seed, solver=self.solver
            ),
            policy=self.policy,
        )

    def _unlike_published(self) -> str:
        """The options that would make the backbone's published settings of these."""
        given = {**vars(self.policy), **vars(self)}
        options = []
        for name, value in BACKBONES[self.backbone].settings.items():
            if given[name] != value:
                values = value if isinstance(value, tuple) else (value,)
                words = (f"{each:g}" if isinstance(each, float) else str(each) for each in values)
                options.append(f"--{name.replace('_', '-')} {' '.join(words)}")
        return " ".join(options)

    def _scripts(self) -> list[Script]:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError(f"give either prompt or prompts, got {'neither' if self.prompt is None else 'both'}")
        if self.prompts is None:
            return [script_of(self.prompt or "", self.prompt_at)]
        if self.prompt_at:
            raise ValueError("prompt_at belongs to prompt; in the file of prompts, write @10s between two of a line")
        return read_scripts(self.prompts)

    def _beginning(self, settings: VideoSettings) -> Beginning | None:
        from longlive_rag.generation.beginning import from_image, from_video

        if self.image is not None and self.video is not None:
            raise ValueError("give either image or video, got both")
        for name, path in (("image", self.image), ("video", self.video)):
            if path is not None and not path.is_file():
                raise FileNotFoundError(f"{name} file {path} does not exist")
        if self.image is not None:
            return from_image(self.image, settings, one_frame=BACKBONES[self.backbone].image_is_a_frame)
        return None if self.video is None else from_video(self.video, settings)

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        """What `dtype` means on a device."""
        import torch

        automatic = "bfloat16" if device.type == "cuda" else "float32"
        dtype: torch.dtype = getattr(torch, automatic if self.dtype == "auto" else self.dtype)
        return dtype

    def torch_device(self, ranks: Ranks) -> torch.device:
        """What `device` names; raises ValueError if it is not there."""
        import torch

        try:
            device = ranks.device(None if self.device == "auto" else self.device)
        except RuntimeError:
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}") from None
        if device.type == "cuda":
            if (device.index or 0) >= torch.cuda.device_count():
                raise ValueError(f"device {device} is not there; torch sees {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(device)
        return device

    def _encode(self, prompts: list[str], files: WanFiles, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Embeddings of all prompts, on the CPU; the encoder, larger than all the rest, is gone when this returns."""
        import torch
        from tqdm import tqdm

        from longlive_rag.generation.text_encoder import PromptEncoder

        # In float16 UMT5 overflows.
        encoder_dtype = torch.float32 if dtype is torch.float32 else torch.bfloat16
        encoder = PromptEncoder(files, device="cpu" if self.low_memory else device, dtype=encoder_dtype)
        bar = tqdm(prompts, desc="encoding prompts", unit="prompt", disable=None)
        embeds = [encoder.encode(prompt).to("cpu", dtype) for prompt in bar]
        del encoder
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return embeds

    def load(
        self,
        checkpoint: Path,
        files: WanFiles,
        settings: VideoSettings,
        text_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        budget: Budget,
        team: Team | None = None,
    ) -> Pipeline:
        """The transformer, VAE and embedding that the options name, checked against each other.

        Args:
            team: the processes that make each video together, by default this one alone.
        """
        import torch

        from longlive_rag.embedding import AveragePool, Embedding, LatentAutoencoder
        from longlive_rag.generation.compilation import compile_model
        from longlive_rag.generation.pipeline import Pipeline
        from longlive_rag.generation.tiny_decoder import TinyDecoder
        from longlive_rag.generation.wan_vae import StreamingDecoder
        from longlive_rag.models.checkpoints import load_causal_wan

        keys = (self.weights,) if self.weights else BACKBONES[self.backbone].weight_keys
        model = load_causal_wan(
            checkpoint,
            weight_keys=keys,
            lora=self.lora,
            lora_alpha=self.lora_alpha,
            device=device,
            dtype=dtype,
            group=team.group if team is not None and self.shard_weights else None,
        )
        if model.text_dim != text_dim:
            raise ValueError(
                f"{checkpoint} takes prompt embeddings of width {model.text_dim}, but the text encoder in "
                f"{self.wan_dir} makes {text_dim}"
            )
        if self.compile:
            compile_model(model)
        embedding: Embedding = AveragePool()
        if self.embedding is not None:
            autoencoder = LatentAutoencoder.from_checkpoint(self.embedding).to(device)
            if autoencoder.in_channels != model.in_dim:
                raise ValueError(
                    f"{self.embedding} embeds {autoencoder.in_channels} latent channels, but {checkpoint} makes "
                    f"{model.in_dim}"
                )
            embedding = autoencoder
        # The first rank decodes; the others only read the sizes.
        first = team is None or team.first
        where = device if first else torch.device("cpu")
        decoder: Decoder
        if self.decoder == "tiny":
            decoder = TinyDecoder.from_file(find_tiny_decoder(self.wan_dir, self.backbone), device=where, dtype=dtype)
        else:
            decoder = StreamingDecoder.from_files(files, device=where, dtype=dtype)
        low_memory = self.low_memory and first
        return Pipeline(model, decoder, embedding, settings, low_memory=low_memory, budget=budget, team=team)


def _begin(beginning: Beginning, files: WanFiles, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Makes the latents that videos begin with: once, and with a VAE that is gone afterwards."""
    from functools import cache

    from longlive_rag.generation.beginning import encode
    from longlive_rag.generation.wan_vae import load_vae

    return cache(lambda: encode(load_vae(files, device=device, dtype=dtype), beginning.pictures()))
