"""`longlive-rag corpus`: the clean latents that the retrieval autoencoder learns from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from longlive_rag.ranks import Ranks
    from longlive_rag.training.corpus import LatentSource


@dataclass(frozen=True)
class Corpus:
    """Generate the clean latents that `longlive-rag train` learns from, one safetensors file per video.

    Existing files are kept, so an interrupted run continues when it is started again. Under torchrun, the processes
    share the work across GPUs and machines.

    Examples:
      longlive-rag corpus --output corpus
      longlive-rag corpus --output corpus --source self-forcing --videos 1000 \\
          --checkpoint self_forcing_dmd.pt --wan-dir Wan2.1-T2V-1.3B \\
          --prompts prompts.txt
    """

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "what to make": ("output", "source", "videos", "frames", "height", "width", "seed"),
        "Wan-family sources": ("checkpoint", "lora", "wan_dir", "prompts"),
        "machine": ("batch", "device"),
    }

    output: Path
    """Folder for the latents; created if it is missing."""
    source: Literal["small-world", "world", "night", "self-forcing", "causal-forcing", "longlive", "wan"] = (
        "small-world"
    )
    """Where the videos come from: small-world is the bundled backbone, world the small world's true videos, encoded,
    night the same at all hours; the others are Wan-family checkpoints."""
    videos: int = 96
    """Number of videos."""
    frames: int | None = None
    """Latent frames per video. Default: 64 for the small world, or 90 (as in the paper) for Wan."""
    seed: int = 0
    """Seed of prompts and noise; each video depends only on the seed and its number."""
    batch: int = 8
    """Videos that the small-world backbone generates at once; Wan generates one at a time."""
    checkpoint: Path | None = None
    """Weights of the transformer."""
    lora: Path | None = None
    """LoRA to merge into the weights (LongLive has one)."""
    wan_dir: Path | None = None
    """Folder with the text encoder, tokenizer and VAE of Wan2.1-T2V-1.3B."""
    prompts: Path | None = None
    """Text file with one prompt per line."""
    height: int = 480
    """Height of Wan's videos, a multiple of 16."""
    width: int = 832
    """Width of Wan's videos, a multiple of 16."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: the GPU if there is one."""

    def run(self) -> int:
        from longlive_rag.ranks import Ranks
        from longlive_rag.training.corpus import write_corpus

        for name in ("videos", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")
        ranks = Ranks.from_environment()
        done = write_corpus(self._source(ranks), self.output, self.videos, ranks)
        kept = f", {done.existing} were there already" if done.existing else ""
        print(f"{done.made} videos made in {self.output}{kept}")
        if ranks.first:
            print(f"next: longlive-rag train --data {self.output} --output {self.output.with_name('encoder')}")
        return 0

    def _source(self, ranks: Ranks) -> LatentSource:
        from longlive_rag.small_world.backbone import load_backbone, load_codec
        from longlive_rag.small_world.corpus import WorldSource, rollout_source

        frames = self.frames or (64 if self.source in ("small-world", "world", "night") else 90)
        if self.source in ("world", "night"):
            return WorldSource(load_codec(), frames, self.seed, night=self.source == "night")
        device = ranks.device(self.device)
        if self.source == "small-world":
            return rollout_source(load_backbone().to(device), frames, seed=self.seed, batch=self.batch)
        from longlive_rag.training.wan_source import wan_source

        return wan_source(
            self.source,
            self.checkpoint,
            self.lora,
            self.wan_dir,
            self.prompts,
            height=self.height,
            width=self.width,
            frames=frames,
            seed=self.seed,
            device=device,
        )
