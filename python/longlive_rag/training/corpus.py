"""The latent corpus: a folder of clean latents, one file per video, made by a frozen generator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor
from tqdm import tqdm

from longlive_rag.files import output_folder, write_json
from longlive_rag.ranks import Ranks
from longlive_rag.training.latents import write_latents

SPARE_BYTES = 64 << 20
"""To leave free on the disk."""


class LatentSource(Protocol):
    """Makes videos by number. A number always gives the same video, whichever others are made with it."""

    settings: dict[str, str | int | float]
    """What the videos depend on; the same for every run on one folder."""
    batch: int
    """Videos made together."""
    video_bytes: int
    """Size of one video's latents."""

    def make(self, numbers: Sequence[int]) -> list[tuple[Tensor, dict[str, str]]]:
        """Latents [T, C, H, W] and metadata of each."""
        ...


class Written(NamedTuple):
    """How many videos a rank made, and how many there were before."""

    made: int
    existing: int


def video_path(folder: Path, number: int) -> Path:
    return folder / f"latent_{number:06d}.safetensors"


def write_corpus(source: LatentSource, folder: str | Path, videos: int, ranks: Ranks | None = None) -> Written:
    """Make this rank's share of the videos 0 .. videos - 1; those that exist already are kept.

    The folder's `corpus.json` records the source's settings, so that one folder holds one corpus.

    Raises:
        ValueError: `videos` is not positive, or the folder holds another corpus.
        OSError: the disk has no room for the missing videos, or the folder cannot be written to.
    """
    ranks = ranks or Ranks()
    if videos < 1:
        raise ValueError(f"videos must be at least 1, got {videos}")
    folder = output_folder(folder)
    _claim(folder, source.settings)
    missing = [number for number in range(videos) if not video_path(folder, number).exists()]
    # By number, not by place in the list: another rank may have started already, and so see another list.
    mine = [number for number in missing if number % ranks.world == ranks.rank]
    _check_room(folder, len(missing) * source.video_bytes)
    with tqdm(total=len(mine), desc="videos", unit="video", disable=not ranks.first) as progress:
        for first in range(0, len(mine), source.batch):
            numbers = mine[first : first + source.batch]
            for number, (latents, metadata) in zip(numbers, source.make(numbers), strict=True):
                write_latents(video_path(folder, number), latents, {"number": str(number), **metadata})
                progress.update()
    return Written(len(mine), videos - len(missing))


def _claim(folder: Path, settings: dict[str, str | int | float]) -> None:
    record = folder / "corpus.json"
    if not record.exists():
        write_json(record, settings)
        return
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{record} is damaged: {error}") from error
    if found != settings:
        names = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
        differences = ", ".join(f"{name} {found.get(name)} instead of {settings.get(name)}" for name in names)
        raise ValueError(f"{folder} holds another corpus: {differences}; choose another folder")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise OSError(
            f"{folder} needs {needed / 2**30:.1f} GiB for the missing videos, the disk has {free / 2**30:.1f} GiB free"
        )
