"""What is finished of a video, kept beside it, so that a run that was stopped goes on where it stood.

The journal of `fox.mp4` is the folder `.fox.journal`: `settings.json`; a `block-<n>.safetensors` with the latents of
each finished block, what it retrieved and where the random numbers stood; and a `segment-<n>.safetensors` with each
finished stretch of encoded pictures. Blocks and segments are archives (`longlive_rag.archive`) that carry the settings'
digest, so that one that is cut short, altered or of another video is noticed. With each block is the room that keys and
values had: where it was measured, a run that goes on must not measure another one, and so forget other frames.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longlive_rag import archive
from longlive_rag.budget import Budget
from longlive_rag.files import remove_leftovers, write_json
from longlive_rag.generation.video import Segment, partial_path
from longlive_rag.selection import Retrieval

_SETTINGS = "settings.json"
_NO_LIMIT = -1
_BLOCK, _SEGMENT, _BEGINNING = "block", "segment", "beginning"


@dataclass(frozen=True)
class JournalBlock:
    """A finished block."""

    latents: Tensor
    """[B, F, C, H, W], on the CPU."""
    random_state: Tensor
    """uint8, state of the generator after the block's last draw."""
    retrieval: Retrieval | None
    """What the block retrieved, if anything."""
    budget: Budget
    """Of device, host and disk, as the memory had it at the block's end (`FrameBank.budget`), of all ranks together;
    the rest is not kept."""


def journal_folder(video: Path) -> Path:
    """Where the journal of a video is."""
    return video.with_name(f".{video.stem}.journal")


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names and both values of the settings that differ, or nothing."""
    changed = [f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]]
    return "; ".join(changed)


class Journal:
    """The journal of one video.

    Args:
        video: path of the video.
        settings: JSON values; everything that decides what the video looks like.
        notes: JSON values; what may change but is worth telling, such as the machine.

    Attributes:
        blocks: finished blocks that can be relied on.
        retrieved: what they retrieved.
        budget: of the last of them.
        remarks: sentences about what was found, for the user.
    """

    def __init__(self, video: Path, settings: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> None:
        self.video, self.folder = video, journal_folder(video)
        self.settings, self.notes = json.loads(json.dumps(settings)), json.loads(json.dumps(notes or {}))
        self.blocks = 0
        self.retrieved: list[Retrieval] = []
        self.budget: Budget | None = None
        self.remarks: list[str] = []
        self._key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Refuse to go on with a video of other settings.

        Raises:
            ValueError: the message says which settings differ.
        """
        known = self._known()
        changed = changed_settings(known["settings"], self.settings) if known else ""
        if changed:
            raise ValueError(
                f"{self.video} was begun with other settings ({changed}); go on with those, choose another --output, "
                f"or --overwrite"
            )

    def remove_others(self) -> None:
        """Remove the journal if it is of other settings, or if nobody can tell."""
        try:
            self.check()
        except ValueError:
            self.remove()

    def open(self) -> None:
        """Find what can be relied on, and remove the rest.

        Raises:
            OSError: the folder cannot be read or written to.
            ValueError: as `check`.
        """
        self.check()
        known = self._known()
        self.folder.mkdir(exist_ok=True)
        for index in range(len(list(self.folder.glob(f"{_BLOCK}-*")))):
            try:
                block = self.block(index)
            except (OSError, ValueError) as error:
                self.remarks.append(f"Going on before block {index}: {error}")
                break
            self.blocks += 1
            self.budget = block.budget
            if block.retrieval is not None:
                self.retrieved.append(block.retrieval)
        changed = changed_settings(known["notes"], self.notes) if known and self.blocks else ""
        if changed:
            self.remarks.append(f"What is added may differ in its last bits: {changed}")
        for path in self.folder.iterdir():
            kept = path.name.startswith(f"{_BLOCK}-") and path.name < self._path(_BLOCK, self.blocks).name
            kept = kept or path.name.startswith((f"{_SEGMENT}-", f"{_BEGINNING}-")) or path.name == _SETTINGS
            if not kept:
                path.unlink()
        if known is None or changed or not self.blocks:
            write_json(self.folder / _SETTINGS, {"settings": self.settings, "notes": self.notes})

    def block(self, index: int) -> JournalBlock:
        """A finished block.

        Raises:
            OSError: it has vanished.
            ValueError: it has been cut short, altered, or is of another video.
        """
        tensors = self._read(_BLOCK, index)
        if "budget" not in tensors:
            raise ValueError(f"{self._path(_BLOCK, index)} is of an earlier version of longlive_rag")
        retrieval = None
        if "frames" in tensors:
            start = index * tensors["latents"].shape[1]
            retrieval = Retrieval(start, tensors["frames"], tensors["similarity"])
        device, host, disk = (None if size == _NO_LIMIT else size for size in tensors["budget"].tolist())
        budget = Budget(device=device, host=host, disk=disk or 0)
        return JournalBlock(tensors["latents"], tensors["random_state"], retrieval, budget)

    def put_block(self, index: int, block: JournalBlock) -> None:
        """Record a finished block; when this returns, it survives a power cut."""
        sizes = block.budget.device, block.budget.host, block.budget.disk
        budget = torch.tensor([_NO_LIMIT if size is None else size for size in sizes])
        tensors = {"latents": block.latents, "random_state": block.random_state, "budget": budget}
        if block.retrieval is not None:
            tensors |= {"frames": block.retrieval.frame_table, "similarity": block.retrieval.similarity_table}
        self._write(_BLOCK, index, tensors)

    def beginning(self) -> Tensor | None:
        """The latents [n, C, H, W] that the video begins with; None if they are not recorded, or not whole."""
        try:
            return self._read(_BEGINNING, 0)["latents"]
        except (OSError, ValueError):
            return None

    def put_beginning(self, latents: Tensor) -> None:
        """Record the latents that the video begins with, so that they are the same to the last bit another time."""
        self._write(_BEGINNING, 0, {"latents": latents})

    def segments(self, pictures: int) -> Iterator[Segment]:
        """The finished segments within the first `pictures` pictures of the video; later ones are removed."""
        index = 0
        while pictures:
            try:
                tensors = self._read(_SEGMENT, index)
            except (OSError, ValueError):
                break
            segment = Segment(tensors["data"].numpy(), tensors["packets"].numpy())
            pictures -= len(segment.packets)
            if pictures < 0:
                break
            yield segment
            index += 1
        for path in self.folder.glob(f"{_SEGMENT}-*"):
            if path.name >= self._path(_SEGMENT, index).name:
                path.unlink()

    def put_segment(self, index: int, segment: Segment) -> None:
        """Record a finished segment."""
        self._write(_SEGMENT, index, {name: torch.from_numpy(part) for name, part in segment._asdict().items()})

    def remove_finished(self) -> None:
        """Remove what is left if this video is finished; a journal of other settings stays, for it is another's."""
        if self.folder.is_dir():
            known = self._known()
            if known is None or not changed_settings(known["settings"], self.settings):
                self.remove()
                partial_path(self.video).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the journal and all that killed runs have left beside the video."""
        # First what makes it one: if this is interrupted, the rest is of no video.
        (self.folder / _SETTINGS).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in (self.video, partial_path(self.video), *map(self.video.with_suffix, (".json", ".png"))):
            remove_leftovers(path)

    def _known(self) -> dict[str, Any] | None:
        """What the settings file says; None if there is none.

        Raises:
            ValueError: it cannot be read, and the blocks are of other settings.
        """
        path = self.folder / _SETTINGS
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            return {"settings": dict(known["settings"]), "notes": dict(known["notes"])}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if self._path(_BLOCK, 0).exists():
                try:
                    self.block(0)
                except (OSError, ValueError):
                    raise ValueError(
                        f"{path} cannot be read ({error}), so that nobody knows what {self.video} was to become; "
                        f"restore it, or --overwrite"
                    ) from error
            return None

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index:08d}.safetensors"

    def _read(self, kind: str, index: int) -> dict[str, Tensor]:
        with archive.Archive(self._path(kind, index), f"journal {kind}") as entry:
            if entry.facts != {"settings": self._key, "index": index}:
                raise ValueError(f"{entry.path} is of another video")
            return dict(entry)

    def _write(self, kind: str, index: int, tensors: Mapping[str, Tensor]) -> None:
        facts = {"settings": self._key, "index": index}
        specs = {name: archive.spec_of(tensor) for name, tensor in tensors.items()}
        archive.write(self._path(kind, index), f"journal {kind}", facts, specs, tensors.values())
