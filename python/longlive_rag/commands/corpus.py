"""`longlive-rag corpus`: the clean latents that the retrieval autoencoder learns from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longlive_rag.training.corpus import LatentSource, write_corpus
from longlive_rag.training.distributed import Ranks


@dataclass(frozen=True)
class Corpus:
    """Make a corpus of clean latents, one safetensors file a video, for `longlive-rag train`.

    Videos that are there already are kept, so an interrupted run is simply started again. Under torchrun the ranks
    share the work, over GPUs and machines.
    """

    output: Path
    """Folder for the latents."""
    source: Literal["world"] = "world"
    """What makes the videos: "world", the small world's true videos."""
    videos: int = 160
    """How many."""
    frames: int = 64
    """Latent frames of each."""
    seed: int = 0
    """Of prompts and noise; video i is the same whatever it is made together with."""

    def run(self) -> int:
        ranks = Ranks.from_environment()
        if self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")
        done = write_corpus(self._source(), self.output, self.videos, ranks)
        kept = f", {done.existing} were there already" if done.existing else ""
        print(f"{done.made} videos of {self.frames} latent frames made in {self.output}{kept}")
        if ranks.first:
            print(f"next: longlive-rag train --data {self.output} --output {self.output.with_name('encoder')}")
        return 0

    def _source(self) -> LatentSource:
        from longlive_rag.training.sources import WorldSource, small_world_codec

        return WorldSource(small_world_codec(), self.frames, self.seed)
