"""`longlive-rag corpus`: the clean latents that the retrieval autoencoder learns from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longlive_rag.ranks import Ranks
from longlive_rag.training.corpus import LatentSource, write_corpus


@dataclass(frozen=True)
class Corpus:
    """Make a corpus of clean latents, one safetensors file a video, for `longlive-rag train`.

    Videos that are there already are kept, so an interrupted run is simply started again. Under torchrun the ranks
    share the work, over GPUs and machines.
    """

    output: Path
    """Folder for the latents; created if it is missing."""
    source: Literal["small-world", "world", "self-forcing", "causal-forcing", "longlive", "wan"] = "small-world"
    """What makes the videos: the bundled small-world backbone; "world": the small world's true videos, encoded; or a
    Wan-family checkpoint."""
    videos: int = 96
    """How many."""
    frames: int | None = None
    """Latent frames of each; default 64 in the small world, else 90, the paper's."""
    seed: int = 0
    """Of prompts and noise; video i is the same whatever it is made together with."""
    batch: int = 8
    """Videos the small-world backbone makes together; Wan makes one at a time."""
    checkpoint: Path | None = None
    """The Wan-family transformer's weights."""
    lora: Path | None = None
    """LoRA to merge into them (LongLive's)."""
    wan_dir: Path | None = None
    """Folder with Wan's text encoder, tokenizer and VAE."""
    prompts: Path | None = None
    """Prompt pool for Wan: text file with one prompt per line."""
    height: int = 480
    """Pixels of Wan's videos, a multiple of 16."""
    width: int = 832
    """Pixels of Wan's videos, a multiple of 16."""
    device: str | None = None
    """Default: the GPU if there is one."""

    def run(self) -> int:
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

        frames = self.frames or (64 if self.source in ("small-world", "world") else 90)
        if self.source == "world":
            return WorldSource(load_codec(), frames, self.seed)
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
