"""Files of clean latents, read frame by frame: our safetensors and the released `.pt`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from longlive_rag.files import atomic_path, load_checkpoint
from longlive_rag.training.config import BadData

SUFFIXES = (".safetensors", ".pt")
KEY = "latents"
_CHECKED_AT_ONCE = 32  # frames in memory while a file is checked


@dataclass(frozen=True)
class LatentVideo:
    """The clean latents of one video, on disk; only the header has been read.

    shape: (frames, channels, height, width).
    """

    path: Path
    shape: tuple[int, int, int, int]
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> LatentVideo:
        """Read the header of a file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or holds something other than latents [T, C, H, W].
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no latents at {path}")
        if path.suffix == ".pt":
            latents = _map_pt(path)
            shape, dtype = tuple(latents.shape), str(latents.dtype)
            floating, metadata = latents.is_floating_point(), {}
        else:
            try:
                with safe_open(path, "pt") as file:
                    names = list(file.keys())
                    if KEY not in names:
                        raise ValueError(f'{path} must hold a tensor "{KEY}", got {", ".join(names) or "nothing"}')
                    header = file.get_slice(KEY)
                    shape, dtype = tuple(header.get_shape()), header.get_dtype()
                    floating, metadata = dtype in ("F16", "BF16", "F32", "F64"), dict(file.metadata() or {})
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}") from error
        if len(shape) != 4 or 0 in shape or not floating:
            raise ValueError(f"{path} must hold floating-point latents [T, C, H, W], got {dtype} {list(shape)}")
        return cls(path, shape, metadata)

    @property
    def frames(self) -> int:
        return self.shape[0]

    def read(self, start: int = 0, frames: int | None = None) -> Tensor:
        """Read frames ``start .. start + frames`` (None: to the end), and no others, as float32 [frames, C, H, W]."""
        stop = self.frames if frames is None else start + frames
        if not 0 <= start < stop <= self.frames:
            raise ValueError(f"frames {start} to {stop} of {self.path} do not exist, it has {self.frames}")
        if self.path.suffix == ".pt":
            return _map_pt(self.path)[start:stop].to(torch.float32, copy=True)
        with safe_open(self.path, "pt") as file:
            return file.get_slice(KEY)[start:stop].float()

    def check_finite(self) -> None:
        """Read the whole file once, piece by piece.

        Raises:
            ValueError: it has NaN or infinity; the message names the latent frame.
        """
        for start in range(0, self.frames, _CHECKED_AT_ONCE):
            latents = self.read(start, min(_CHECKED_AT_ONCE, self.frames - start))
            bad = ~latents.isfinite().flatten(1).all(dim=1)
            if bad.any():
                frame = start + int(bad.nonzero()[0])
                raise ValueError(f"{self.path} has NaN or infinity in latent frame {frame}")


@dataclass(frozen=True)
class LatentCorpus:
    """Checked latents of one size, ready for training.

    skipped: the files left out, with one sentence each.
    """

    videos: list[LatentVideo]
    skipped: list[str]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.videos[0].shape[1:]


def write_latents(path: Path, latents: Tensor, metadata: dict[str, str]) -> None:
    """Write latents [T, C, H, W] and their metadata, atomically."""
    with atomic_path(path) as partial:
        partial.write_bytes(save({KEY: latents.detach().cpu().contiguous()}, metadata))


def open_corpus(folder: str | Path, shortest: int, bad_data: BadData = "refuse") -> LatentCorpus:
    """Find all latents of a folder and check them by reading every file once.

    Args:
        folder: with `.safetensors` or `.pt` files, at any depth.
        shortest: minimum number of latent frames of a video.
        bad_data: "refuse" the whole folder for one bad file, or "skip" the file.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file is bad, and named in the message; or none is good.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of latents at {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and not path.name.startswith("."))
    if not paths:
        raise ValueError(f"{folder} holds no latents: expected {' or '.join(SUFFIXES)} files (see longlive-rag corpus)")
    videos, faults = [], []
    for path in paths:
        try:
            videos.append(LatentVideo.open(path))
        except ValueError as error:
            faults.append(str(error))
    usual = _usual_size(videos)
    good = []
    for video in tqdm(videos, desc="checking latents", unit="file", leave=False, delay=2):
        try:
            _check(video, usual, shortest)
            good.append(video)
        except ValueError as error:
            faults.append(str(error))
    if faults and bad_data == "refuse":
        others = f" (and {len(faults) - 1} more bad files)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{others}; leave bad files out with --bad-data skip")
    if not good:
        raise ValueError(f"{folder} holds no usable latents: all {len(faults)} files are bad; the first: {faults[0]}")
    return LatentCorpus(good, faults)


def _usual_size(videos: Sequence[LatentVideo]) -> tuple[int, ...]:
    sizes = Counter(video.shape[1:] for video in videos)
    return sizes.most_common(1)[0][0] if sizes else ()


def _check(video: LatentVideo, size: tuple[int, ...], shortest: int) -> None:
    if video.shape[1:] != size:
        expected, found = (" x ".join(map(str, shape)) for shape in (size, video.shape[1:]))
        raise ValueError(f"{video.path} has latent frames of {found}, expected {expected} like the others")
    if video.frames < shortest:
        raise ValueError(f"{video.path} has {video.frames} latent frames, expected at least {shortest}")
    video.check_finite()


def _map_pt(path: Path) -> Tensor:
    latents = load_checkpoint(path, mmap=True)
    if not isinstance(latents, Tensor):
        raise ValueError(f"{path} must hold a tensor of latents [T, C, H, W], got a {type(latents).__name__}")
    return latents
