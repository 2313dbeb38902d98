"""`longlive-rag train`: trains the retrieval autoencoder, and measures what an embedding finds."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from longlive_rag.files import output_folder, write_json
from longlive_rag.training.config import PAPER, BadData, TrainingConfig, TrainingOptions

if TYPE_CHECKING:
    import torch

    from longlive_rag.embedding import LatentAutoencoder
    from longlive_rag.ranks import Ranks
    from longlive_rag.training.latents import LatentCorpus
    from longlive_rag.training.trainer import AutoencoderTrainer


@dataclass(frozen=True)
class Train:
    """Train the retrieval autoencoder on a corpus of latents, or compare trained ones with --evaluate.

    When training is interrupted (Ctrl-C, SIGTERM), its state is saved; --resume continues exactly where it stopped.
    Under torchrun, the processes share each step.

    Examples:
      longlive-rag train --data corpus --output encoder
      longlive-rag train --data corpus --output encoder --resume
      longlive-rag train --evaluate encoder/best.pt --output comparison
    """

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "what to do": ("output", "data", "resume", "ablation", "evaluate", "also", "rollouts", "bad_data"),
        "model": ("embedding_dim", "hidden_dims"),
        "losses": ("delta_weight", "delta_window", "delta_margin", "smooth_weight"),
        "optimisation": (
            "epochs",
            "batch",
            "learning_rate",
            "weight_decay",
            "gradient_clip",
            "chunk_frames",
            "chunks_per_video",
            "validation_fraction",
            "seed",
        ),
        "machine and logging": ("device", "precision", "workers", "save_every", "tensorboard"),
    }

    output: Path
    """Folder for checkpoints, metrics and plots; created if it is missing."""
    data: Path | None = None
    """Folder of latents: safetensors files from `longlive-rag corpus`, or .pt files of shape [T, C, H, W]."""
    ablation: bool = False
    """Also train without each temporal loss and without both, and compare them all."""
    evaluate: tuple[Path, ...] = ()
    """Instead of training, compare these checkpoints with average pooling on the small world; writes report.json and
    embeddings.png."""
    also: tuple[Path, ...] = ()
    """Files of latents, or videos, for which a comparison also measures similarity against time lag."""
    rollouts: int = 0
    """In a comparison, also generate this many videos of the small world with each embedding, and count the inhabitants
    that are still themselves when they come back; 6 take about half a minute per embedding."""
    resume: bool = False
    """Continue the training in the output folder."""
    bad_data: BadData = "refuse"
    """What to do about a file that cannot be trained on: refuse the corpus, or skip the file."""
    save_every: int = 50
    """Epochs between the checkpoints that are kept."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: the GPU if there is one."""
    workers: int = 0
    """Data-loading processes per rank."""
    tensorboard: bool = False
    """Also write TensorBoard events (pip install 'longlive_rag[tensorboard]')."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    """The objective and its optimisation."""

    def run(self) -> int:
        if (self.data is None) == (not self.evaluate):
            what = "neither" if self.data is None else "both"
            raise ValueError(f"give either data, to train on, or evaluate, checkpoints to compare, got {what}")
        if self.save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {self.save_every}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if self.rollouts < 0 or self.rollouts == 1:
            raise ValueError(f"rollouts must be 0, or at least 2 for an interval, got {self.rollouts}")
        for path in (*self.evaluate, *self.also):
            if not path.is_file():
                raise FileNotFoundError(f"no file to evaluate at {path}")
        output_folder(self.output)
        if self.data is None:
            from longlive_rag.embedding import LatentAutoencoder

            self._compare({_label(path): LatentAutoencoder.from_checkpoint(path) for path in self.evaluate})
            return 0
        return self._train(self.data)

    def _train(self, data: Path) -> int:
        from longlive_rag.embedding import LatentAutoencoder
        from longlive_rag.ranks import Ranks
        from longlive_rag.training.interruption import StopSignal
        from longlive_rag.training.latents import open_corpus
        from longlive_rag.training.trainer import BEST

        ranks = Ranks.from_environment()
        device = ranks.device(self.device)
        with ranks.process_group(device), StopSignal() as stop:
            corpus = ranks.on_first(lambda: open_corpus(data, self.training.chunk_frames, self.bad_data))
            if ranks.first and corpus.skipped:
                print(f"{len(corpus.skipped)} bad files left out; the first: {corpus.skipped[0]}", file=sys.stderr)
            config = self.training.config(*corpus.latent_shape[1:])
            runs = ablations(config) if self.ablation else {"": config}
            for name, variant in runs.items():
                trainer = self._trainer(name, variant, corpus, ranks, device)
                if not trainer.run(lambda: stop.received is not None):
                    if ranks.first:
                        self._say_how_to_go_on(trainer)
                    return 128 + (stop.received or 15)
                if ranks.first:
                    self._finish(trainer)
        if ranks.first and self.ablation:
            best = {name: self.output / name / BEST for name in runs}
            self._compare({name: LatentAutoencoder.from_checkpoint(path) for name, path in best.items()})
        return 0

    def _trainer(
        self, name: str, config: TrainingConfig, corpus: LatentCorpus, ranks: Ranks, device: torch.device
    ) -> AutoencoderTrainer:
        from longlive_rag.training.trainer import LAST, AutoencoderTrainer

        output = output_folder(self.output / name)
        return AutoencoderTrainer(
            config,
            corpus,
            output,
            ranks=ranks,
            device=device,
            # Of an interrupted ablation, the later trainings have not begun.
            resume=self.resume and (not self.ablation or (output / LAST).exists()),
            save_every=self.save_every,
            workers=self.workers,
            tensorboard=self.tensorboard,
            label=name or "training",
        )

    def _say_how_to_go_on(self, trainer: AutoencoderTrainer) -> None:
        from longlive_rag.training.trainer import LAST

        arguments = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
        print(
            f"interrupted in epoch {trainer.epoch + 1} of {trainer.config.epochs}; saved in {trainer.output / LAST}. "
            f"Go on with: longlive-rag {shlex.join(arguments)}",
            file=sys.stderr,
        )

    def _finish(self, trainer: AutoencoderTrainer) -> None:
        from longlive_rag.embedding import LatentAutoencoder
        from longlive_rag.training.plots import draw_training, similarity_matrix
        from longlive_rag.training.trainer import BEST, METRICS

        output = trainer.output
        best = LatentAutoencoder.from_checkpoint(output / BEST)
        held_out = trainer.corpus.videos[trainer.validation_videos[0]]
        untrained = trainer.config.autoencoder(*trainer.corpus.latent_shape)
        before, after = (similarity_matrix(model, held_out) for model in (untrained, best))
        draw_training(output / "training.png", output / METRICS, before, after, held_out.path.stem)
        best.save(output / "encoder.safetensors")
        print(f"lowest validation loss {trainer.best:.5f}: {output / BEST}, curves in {output / 'training.png'}")

    def _compare(self, encoders: dict[str, LatentAutoencoder]) -> None:
        from tqdm import tqdm

        from longlive_rag.embedding import AveragePool, Embedding, LatentAutoencoder
        from longlive_rag.small_world import embeddings
        from longlive_rag.small_world.backbone import load_backbone, load_codec
        from longlive_rag.small_world.policies import POLICIES

        everything: dict[str, Embedding] = {
            "average pool": AveragePool(),
            "average pool, 4 x 4": AveragePool(grid=4),
            **encoders,
        }
        codec, config = load_codec(), POLICIES["retrieval"].config
        truth = embeddings.world_videos(codec)
        files = {str(path): embeddings.read_latents_or_video(path) for path in self.also}
        suitable = {
            name: embedding
            for name, embedding in everything.items()
            if not isinstance(embedding, LatentAutoencoder) or embedding.in_channels == truth.drafts.shape[2]
        }
        small_world = {name: embeddings.measure_on_world(each, truth, config) for name, each in suitable.items()}
        if self.rollouts:
            model = load_backbone()
            for name, embedding in tqdm(suitable.items(), desc="roll-outs", unit="embedding"):
                rollouts = embeddings.measure_in_rollouts(embedding, model, codec, self.rollouts)
                small_world[name]["rollouts"] = rollouts
        report = {
            "policy": asdict(config),
            "small_world": small_world,
            "files": {
                path: {name: embeddings.measure_alone(each, latents) for name, each in everything.items()}
                for path, latents in files.items()
            },
        }
        write_json(self.output / "report.json", report)
        embeddings.draw_comparison(report, self.output / "embeddings.png")
        print(embeddings.comparison_table(report))
        print(f"\nwritten: {self.output / 'report.json'}, {self.output / 'embeddings.png'}")


def ablations(config: TrainingConfig) -> dict[str, TrainingConfig]:
    """The recipe, and what each temporal loss adds to it; the paper's weights as well where the recipe has others."""
    variants = {
        "full": config,
        "without_delta": replace(config, delta_weight=0.0),
        "without_smoothing": replace(config, smooth_weight=0.0),
        "reconstruction_only": replace(config, delta_weight=0.0, smooth_weight=0.0),
    }
    paper = replace(config, delta_weight=PAPER.delta_weight, smooth_weight=PAPER.smooth_weight)
    return variants if paper == config else {**variants, "paper_weights": paper}


def _label(path: Path) -> str:
    """A checkpoint's own name, or where the name says nothing, its folder's."""
    from longlive_rag.training.trainer import BEST, LAST

    return path.parent.name if path.name in (BEST, LAST) else path.stem
