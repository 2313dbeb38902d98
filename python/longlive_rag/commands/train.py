"""`longlive-rag train`: trains the retrieval autoencoder."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from longlive_rag.embedding import LatentAutoencoder
from longlive_rag.files import output_folder
from longlive_rag.training.config import TrainingConfig
from longlive_rag.training.distributed import Ranks
from longlive_rag.training.interruption import StopSignal
from longlive_rag.training.latents import BadData, open_corpus
from longlive_rag.training.plots import draw_training, similarity_matrix
from longlive_rag.training.trainer import BEST, LAST, METRICS, Trainer


@dataclass(frozen=True)
class Train:
    """Train the retrieval autoencoder on a corpus of latents, by default with the paper's objective and settings.

    An interrupted training (Ctrl-C, SIGTERM) is saved, and goes on with --resume as if nothing had happened. Under
    torchrun the ranks share each step.
    """

    data: Path
    """Folder of latents: safetensors files of `longlive-rag corpus`, or .pt files [T, C, H, W]."""
    output: Path
    """Folder for checkpoints, metrics and the picture."""
    resume: bool = False
    """Go on with the training in the folder."""
    bad_data: BadData = "refuse"
    """A file that cannot be trained on: "refuse" the corpus, or "skip" the file."""
    save_every: int = 50
    """Epochs between checkpoints that are kept."""
    device: str | None = None
    """Default: the GPU if there is one."""
    workers: int = 0
    """Processes that read latents for each rank."""
    tensorboard: bool = False
    """Write TensorBoard events, too (pip install 'longlive_rag[tensorboard]')."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = field(default_factory=TrainingConfig)
    """The objective and its optimisation."""

    def run(self) -> int:
        if self.save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {self.save_every}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        ranks = Ranks.from_environment()
        device = ranks.device(self.device)
        with ranks.process_group(device), StopSignal() as stop:
            output_folder(self.output)
            corpus = ranks.on_first(lambda: open_corpus(self.data, self.training.chunk_frames, self.bad_data))
            if ranks.first and corpus.skipped:
                print(f"{len(corpus.skipped)} bad files left out; the first: {corpus.skipped[0]}", file=sys.stderr)
            trainer = Trainer(
                self.training,
                corpus,
                self.output,
                ranks=ranks,
                device=device,
                resume=self.resume,
                save_every=self.save_every,
                workers=self.workers,
                tensorboard=self.tensorboard,
            )
            if not trainer.run(lambda: stop.received is not None):
                assert stop.received is not None or ranks.world > 1
                if ranks.first:
                    self._say_how_to_go_on(trainer)
                return 128 + (stop.received or 15)
            if ranks.first:
                self._finish(trainer)
        return 0

    def _say_how_to_go_on(self, trainer: Trainer) -> None:
        arguments = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
        print(
            f"interrupted in epoch {trainer.epoch + 1} of {self.training.epochs}; saved in {self.output / LAST}. "
            f"Go on with: longlive-rag {shlex.join(arguments)}",
            file=sys.stderr,
        )

    def _finish(self, trainer: Trainer) -> None:
        best = LatentAutoencoder.from_checkpoint(self.output / BEST)
        held_out = trainer.corpus.videos[trainer.validation_videos[0]]
        untrained = self.training.autoencoder(*trainer.corpus.latent_shape)
        matrices = [similarity_matrix(model, held_out) for model in (untrained, best)]
        picture = self.output / "training.png"
        draw_training(picture, self.output / METRICS, matrices[0], matrices[1], held_out.path.stem)
        best.save(self.output / "encoder.safetensors")
        print(f"lowest validation loss {trainer.best:.5f}; {self.output / BEST}, picture in {picture}")
