"""Trains the retrieval autoencoder: reproducible by seed, and resumable at any step with the same result."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from longlive_rag.files import atomic_path, load_checkpoint
from longlive_rag.ranks import Ranks
from longlive_rag.training.chunks import Chunk, ChunkDataset, draw_chunks, fixed_chunks, split_videos
from longlive_rag.training.config import TrainingConfig
from longlive_rag.training.latents import LatentCorpus
from longlive_rag.training.losses import Losses, autoencoder_losses

LAST, BEST, METRICS = "last.pt", "best.pt", "metrics.jsonl"
TERMS = ("total", *Losses._fields)
SECONDS_BETWEEN_SAVES = 300.0


class AutoencoderTrainer:
    """One training in one folder.

    Writes ``best.pt`` (lowest validation loss) and ``epoch_NNNN.pt`` in the released checkpoint's format, ``last.pt``,
    which also holds the state of the training, and ``metrics.jsonl``, one line per epoch.

    Args:
        config: see `TrainingConfig`.
        corpus: checked latents.
        output: folder, which exists.
        resume: continue from the folder's ``last.pt``.
        save_every: epochs from one ``epoch_NNNN.pt`` to the next.
        workers: processes per rank that read latents.
        tensorboard: also write TensorBoard events to the folder.
        label: shown with the progress.

    Raises:
        FileExistsError: the folder holds a training and `resume` is not set.
        FileNotFoundError: `resume` is set, but there is nothing to resume.
        ValueError: there are too few videos, or the training to resume had other settings or data.
    """

    def __init__(
        self,
        config: TrainingConfig,
        corpus: LatentCorpus,
        output: Path,
        *,
        ranks: Ranks,
        device: torch.device,
        resume: bool = False,
        save_every: int = 50,
        workers: int = 0,
        tensorboard: bool = False,
        label: str = "training",
    ) -> None:
        self.config, self.corpus, self.output = config, corpus, output
        self.ranks, self.device, self.workers, self.save_every, self.label = ranks, device, workers, save_every, label
        self.training_videos, self.validation_videos = split_videos(
            len(corpus.videos), config.validation_fraction, config.seed
        )
        chunks = len(self.training_videos) * config.chunks_per_video
        self.batch = min(config.batch, chunks) // ranks.world * ranks.world
        if not self.batch:
            raise ValueError(f"a step needs a chunk for each of the {ranks.world} ranks, got {chunks} chunks an epoch")
        self.steps = chunks // self.batch
        self.model = config.autoencoder(*corpus.latent_shape).to(device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        self.dtype = config.autocast_dtype(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.dataset = ChunkDataset(corpus.videos, config.chunk_frames)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.epoch, self.step, self.best = 0, 0, math.inf
        self.sums = torch.zeros(len(TERMS), dtype=torch.float64, device=device)
        self.random_state = self.generator.get_state()
        last = output / LAST
        if resume:
            self._load(last)
        elif last.exists():
            raise FileExistsError(
                f"{output} already holds a training; continue it with --resume, or choose another folder"
            )
        self.tensorboard = None
        if tensorboard and ranks.first:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(output)
        self.saved_at = time.monotonic()

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end, or until `stop` says so after a step.

        Returns:
            Whether the end was reached. If not, the state is in ``last.pt``.

        Raises:
            ValueError: the training diverged.
        """
        if self.ranks.first:
            self._trim_metrics()
        model: nn.Module = DistributedDataParallel(self.model) if self.ranks.world > 1 else self.model
        progress = tqdm(
            total=self.config.epochs * self.steps,
            initial=self.epoch * self.steps + self.step,
            desc=self.label,
            unit="step",
            disable=not self.ranks.first,
            mininterval=1,
        )
        with progress, _deterministic():
            while self.epoch < self.config.epochs:
                began, first_step = time.monotonic(), self.step
                if not self._train_epoch(model, progress, stop):
                    self.save()
                    return False
                frames = (self.step - first_step) * self.batch * self.config.chunk_frames
                speed = frames / (time.monotonic() - began)
                train = self.ranks.mean((self.sums / self.steps).tolist(), self.device)
                validated = self._validate()
                if not math.isfinite(validated[0]):
                    raise ValueError(
                        f"the training diverged in epoch {self.epoch}; learning_rate must be below "
                        f"{self.config.learning_rate} here"
                    )
                progress.set_postfix(train=f"{train[0]:.4f}", validation=f"{validated[0]:.4f}", refresh=False)
                self._end_epoch(train, validated, speed)
        return True

    def _train_epoch(self, model: nn.Module, progress: tqdm, stop: Callable[[], bool]) -> bool:
        """Do the rest of the current epoch; returns False if stopped before the last step of the training."""
        per_video, last_epoch = self.config.chunks_per_video, self.epoch + 1 == self.config.epochs
        self.random_state = self.generator.get_state()
        chunks = draw_chunks(
            self.corpus.videos, self.training_videos, self.config.chunk_frames, per_video, self.generator
        )
        batches = [chunks[first : first + self.batch] for first in range(0, self.steps * self.batch, self.batch)]
        for latents in self._load_chunks(batches[self.step :]):
            self._optimize(model, latents)
            self.step += 1
            progress.update()
            if self.ranks.any(stop(), self.device) and not (last_epoch and self.step == self.steps):
                return False
        return True

    def save(self) -> None:
        """Write the state after the current step to ``last.pt``. All ranks must call this together."""
        sums = self.ranks.mean(self.sums.tolist(), self.device)
        if self.ranks.first:
            self._write_state(sums)

    def _write_state(self, sums: list[float]) -> None:
        state = {
            "settings": asdict(self.config),
            "data": self._data(),
            "ranks": self.ranks.world,
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "sums": sums,
            "random_state": self.random_state,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with atomic_path(self.output / LAST) as partial:
            torch.save({**self._checkpoint(), "training": state}, partial)
        self.saved_at = time.monotonic()

    def _load(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: there is nothing to resume")
        try:
            content = load_checkpoint(path, device=self.device)
            weights, state = content["model"], content["training"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be resumed: it is damaged, or not the state of a training") from error
        settings = {**asdict(self.config), "ranks": self.ranks.world}
        found = {**state["settings"], "ranks": state["ranks"]}
        names = [name for name in settings if found.get(name) != settings[name]]
        if names:
            differences = ", ".join(f"{name} {found.get(name)} instead of {settings[name]}" for name in names)
            raise ValueError(f"{path} was trained with other settings: {differences}")
        if state["data"] != self._data():
            raise ValueError(f"{path} was trained on other latents than these {len(self.corpus.videos)} videos")
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.generator.set_state(state["random_state"].cpu())

    def _load_chunks(self, batches: Sequence[Sequence[Chunk]]) -> Iterator[Tensor]:
        """This rank's share of each batch, [B, S, C, H, W] on the device."""
        shares = [list(batch[self.ranks.rank :: self.ranks.world]) for batch in batches]
        cuda = self.device.type == "cuda"
        loader: DataLoader[Tensor] = DataLoader(
            self.dataset,
            batch_sampler=[share for share in shares if share],
            num_workers=self.workers,
            pin_memory=cuda,
        )
        for latents in loader:
            yield latents.to(self.device, non_blocking=cuda)

    def _losses(self, model: nn.Module, latents: Tensor) -> Losses:
        frames = latents.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            recon, embeddings = model(frames)
        return autoencoder_losses(recon, embeddings, latents, self.config.delta_window, self.config.delta_margin)

    def _total(self, losses: Losses) -> Tensor:
        return losses.total(self.config.delta_weight, self.config.smooth_weight)

    def _optimize(self, model: nn.Module, latents: Tensor) -> None:
        model.train()
        losses = self._losses(model, latents)
        total = self._total(losses)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.sums += torch.stack([total, *losses]).detach()

    @torch.no_grad()
    def _validate(self) -> list[float]:
        chunks = fixed_chunks(
            self.corpus.videos, self.validation_videos, self.config.chunk_frames, self.config.chunks_per_video
        )
        self.model.eval()
        sums, count = torch.zeros_like(self.sums), 0
        for latents in self._load_chunks([chunks[i : i + self.batch] for i in range(0, len(chunks), self.batch)]):
            losses = self._losses(self.model, latents)
            sums += len(latents) * torch.stack([self._total(losses), *losses])
            count += len(latents)
        *means, count_mean = self.ranks.mean([*sums.tolist(), float(count)], self.device)
        return [mean / count_mean for mean in means]

    def _end_epoch(self, train: list[float], validated: list[float], speed: float) -> None:
        finished, self.epoch, self.step = self.epoch, self.epoch + 1, 0
        self.sums.zero_()
        self.random_state = self.generator.get_state()
        improved = validated[0] < self.best
        self.best = min(self.best, validated[0])
        if not self.ranks.first:
            return
        if improved:
            self._export(BEST)
        line = {
            "epoch": finished,
            "step": self.epoch * self.steps,
            "train": dict(zip(TERMS, train, strict=True)),
            "validation": dict(zip(TERMS, validated, strict=True)),
            "frames_per_second": round(speed, 1),
        }
        with (self.output / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.tensorboard is not None:
            for name in ("train", "validation"):
                for term, value in line[name].items():  # type: ignore[attr-defined]
                    self.tensorboard.add_scalar(f"{name}/{term}", value, finished)
        if self.epoch % self.save_every == 0:
            self._export(f"epoch_{self.epoch:04d}.pt")
        at_the_end = self.epoch == self.config.epochs
        if at_the_end or self.epoch % self.save_every == 0 or time.monotonic() - self.saved_at > SECONDS_BETWEEN_SAVES:
            self._write_state(self.sums.tolist())

    def _export(self, name: str) -> None:
        with atomic_path(self.output / name) as partial:
            torch.save(self._checkpoint(), partial)

    def _checkpoint(self) -> dict[str, Any]:
        """The released format: readable by `LatentAutoencoder.from_checkpoint`."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        return {"model": weights, "config": self.model.config}

    def _data(self) -> list[tuple[str, list[int]]]:
        return [(video.path.name, list(video.shape)) for video in self.corpus.videos]

    def _trim_metrics(self) -> None:
        """Drop epochs that will be repeated, because the state was saved before they ended."""
        path = self.output / METRICS
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["epoch"] < self.epoch]
            with atomic_path(path) as partial:
                partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Use deterministic kernels where they exist, and restore the process's settings afterwards."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
