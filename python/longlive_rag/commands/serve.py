"""`longlive-rag serve`: a video that grows in the browser while people watch, steer it and see what it remembers."""

from __future__ import annotations

import importlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from longlive_rag.budget import BudgetOptions
from longlive_rag.config import PAPER_STEPS, RetrievalConfig
from longlive_rag.files import output_folder

if TYPE_CHECKING:
    from longlive_rag.serve.scene import Scene

_FIRST_PROMPT = "A red fox walks through a snowy forest at dawn"


@dataclass(frozen=True)
class Serve:
    """Show a video that grows while people watch it, steer it with prompts, and see what it remembers.

    Without --backbone it is the bundled small world: no GPU, no download. Leaves video-0001.mp4 and so on in --output,
    each of which can be played at any time, even after a crash.

    Examples:
      longlive-rag serve
      longlive-rag serve --resume
      longlive-rag serve --backbone self-forcing --checkpoint self_forcing_dmd.pt \\
          --wan-dir Wan2.1-T2V-1.3B --prompt "A red fox walks through snow"
    """

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "server": ("host", "port", "allow_host", "output", "resume", "ahead", "seed"),
        "weights": ("backbone", "wan_dir", "checkpoint", "weights", "lora", "lora_alpha", "embedding", "decoder"),
        "what to make with them": ("prompt", "fps", "height", "width", "policy"),
        "sampling": ("denoising_steps", "timestep_shift", "context_noise"),
        "machine": ("device", "dtype", "memory"),
    }

    host: str = "127.0.0.1"
    """Address to listen on. One that other machines can reach asks its visitors for a token."""
    port: int = 8765
    """Port to listen on; 0: any that is free."""
    allow_host: tuple[str, ...] = ()
    """Further names that this machine is called by, such as those of a proxy in front."""
    output: Path = Path("serve_output")
    """Folder for the videos; created if it is missing."""
    resume: bool = False
    """Go on with the newest video in the folder."""
    ahead: float = 1.5
    """Seconds that may be made before the foremost viewer has seen them."""
    seed: int = 0
    """Seed of the first video."""
    backbone: Literal["self-forcing", "causal-forcing", "longlive", "wan"] | None = None
    """Family of the checkpoint, as for generate. Default: the bundled small world."""
    wan_dir: Path | None = None
    """Folder with the text encoder, tokenizer and VAE of Wan2.1-T2V-1.3B."""
    checkpoint: Path | None = None
    """Weights of the transformer."""
    weights: str | None = None
    """Entry of a .pt checkpoint to load."""
    lora: Path | None = None
    """LoRA to merge into the weights."""
    lora_alpha: float | None = None
    """Alpha of the LoRA. Default: its rank."""
    embedding: Path | None = None
    """Checkpoint of the retrieval autoencoder used to search memory. Default: the mean of each latent channel."""
    decoder: Literal["wan", "tiny"] = "wan"
    """What makes pictures of latents: Wan's VAE, or taehv's imitation of it, as for generate."""
    prompt: str = _FIRST_PROMPT
    """What the video begins with."""
    fps: float = 16.0
    """Pictures per second."""
    height: int = 480
    """A multiple of 16."""
    width: int = 832
    """A multiple of 16."""
    policy: RetrievalConfig = field(default_factory=RetrievalConfig)
    """The context policy."""
    denoising_steps: tuple[float, ...] = PAPER_STEPS
    """Timesteps in descending order from 1000, before the shift."""
    timestep_shift: float = 5.0
    """Shift of the noise schedule."""
    context_noise: float = 0.0
    """Timestep of the clean pass."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto: the GPU if there is one. The small world is always on the CPU."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of weights and memory; auto is bfloat16 on a GPU and float32 on a CPU."""
    memory: BudgetOptions = field(default_factory=BudgetOptions)
    """How much memory keys and values may take."""

    def run(self) -> int:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be from 0 to 65535, got {self.port}")
        if not 0 < self.ahead <= 3600:
            raise ValueError(f"--ahead must be above 0 and at most 3600 seconds, got {self.ahead}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must be from 0 to 2**31 - 1, got {self.seed}")
        for package in ("starlette", "uvicorn", "websockets"):
            importlib.import_module(package)

        from longlive_rag.serve import listen
        from longlive_rag.serve.guard import is_loopback
        from longlive_rag.serve.studio import Studio

        socket = listen.bind(self.host, self.port)
        folder = output_folder(self.output)
        scene = self._small_world() if self.backbone is None else self._wan()
        studio = Studio(scene, folder, ahead=self.ahead, seed=self.seed, resume=self.resume)
        token = None if is_loopback(self.host) else secrets.token_urlsafe(16)
        host = f"[{self.host}]" if ":" in self.host else self.host
        address = f"http://{host}:{socket.getsockname()[1]}/{f'?token={token}' if token else ''}"
        print(f"Open {address}\nCtrl+C ends it; the video is {studio.recording.path}", flush=True)
        listen.make_server(studio, token=token, hosts=self.allow_host).run(sockets=[socket])
        print(f"Written: {studio.recording.path} ({studio.recording.seconds:.1f} s)")
        return 0

    def _small_world(self) -> Scene:
        for name in ("wan_dir", "checkpoint", "weights", "lora", "lora_alpha", "embedding"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --backbone, got none")
        import torch

        from longlive_rag.serve.small_scene import SmallScene

        torch.set_num_threads(1)  # matrices this small are multiplied faster by one
        budget = self.memory.budget
        return SmallScene() if budget.device is None else SmallScene(budget.device)

    def _wan(self) -> Scene:
        if self.backbone is None or self.wan_dir is None:
            raise ValueError("--wan-dir must be given with --backbone, got none")
        for package in ("diffusers", "transformers", "ftfy"):
            importlib.import_module(package)
        import torch

        from longlive_rag.commands.generate import Generate
        from longlive_rag.generation.text_encoder import PromptEncoder
        from longlive_rag.generation.wan_files import find_checkpoint, find_wan_files
        from longlive_rag.ranks import Ranks
        from longlive_rag.serve.wan_scene import WanScene

        like = Generate(
            backbone=self.backbone,
            wan_dir=self.wan_dir,
            output=self.output,
            checkpoint=self.checkpoint,
            lora=self.lora,
            lora_alpha=self.lora_alpha,
            weights=self.weights,
            fps=self.fps,
            height=self.height,
            width=self.width,
            policy=self.policy,
            embedding=self.embedding,
            decoder=self.decoder,
            denoising_steps=self.denoising_steps,
            timestep_shift=self.timestep_shift,
            context_noise=self.context_noise,
            device=self.device,
            dtype=self.dtype,
        )
        settings = like.settings()
        checkpoint, files = find_checkpoint(self.backbone, self.checkpoint), find_wan_files(self.wan_dir, self.backbone)
        device = like.torch_device(Ranks())
        dtype = like.torch_dtype(device)
        encoder_dtype = torch.float32 if dtype is torch.float32 else torch.bfloat16  # in float16 UMT5 overflows
        encoder = PromptEncoder(files, device=device, dtype=encoder_dtype)
        pipeline = like.load(checkpoint, files, settings, encoder.width, device, dtype, self.memory.budget)
        name = f"{self.backbone} ({checkpoint.name})"
        return WanScene(pipeline, encoder.encode, name=name, prompt=self.prompt)
