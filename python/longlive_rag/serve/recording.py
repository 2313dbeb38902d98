"""One growing video on disk: an MP4 that plays at any time, its latents, thumbnails and a log of its blocks.

All files are only ever appended to, the log last: what the log does not know of did not happen, and is cut off when a
server that was killed goes on.
"""

from __future__ import annotations

import io
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

from longlive_rag.files import atomic_path
from longlive_rag.generation.video import Frames
from longlive_rag.serve.fragments import codec_string, encode_fragment

_THUMBNAIL = 160  # pixels, of the longer side


@dataclass(frozen=True)
class Facts:
    """What a video is made of; the first line of its log."""

    scene: str
    seed: int
    policies: tuple[str, ...]
    fps: float
    latent_shape: tuple[int, ...]
    """[policies, frames of a block, C, H, W]."""
    dtype: str


class Recording:
    """The files of one video.

    One thread adds blocks; any thread may read what is finished.

    Args:
        folder: where they lie.
        number: of the video, from 1.
        facts: of a new video; None goes on with the one that is there.

    Raises:
        ValueError: the log that is there cannot be read.
        OSError: a file is missing or cannot be written to.
    """

    def __init__(self, folder: Path, number: int, facts: Facts | None = None) -> None:
        self.folder, self.number = folder, number
        self.path = self._named("mp4")
        self.mime = ""
        # A few integers for each block, all that grows in memory with a video.
        self._ends = {kind: array("Q", [0]) for kind in ("mp4", "latents", "thumbs", "jsonl")}
        self._blocks = 0
        self._pictures = 0
        self.frames = 0
        if facts is not None:
            self.facts = facts
            self._files: dict[str, BinaryIO] = {kind: self._named(kind).open("xb") for kind in self._ends}
            self._write("jsonl", _line({"video": number, **asdict(facts)}))
            self._ends["jsonl"][0] = self._files["jsonl"].tell()
        else:
            self.facts = self._recover()
            self._files = {kind: self._named(kind).open("r+b") for kind in self._ends}
            for kind, file in self._files.items():
                file.truncate(self._ends[kind][-1])
                file.seek(0, os.SEEK_END)
            if self._blocks:
                self._set_mime(self._read_bytes("mp4", 0, 4096))

    @classmethod
    def latest(cls, folder: Path) -> int:
        """Number of the newest video in a folder; 0: there is none."""
        numbers = [path.stem.removeprefix("video-") for path in folder.glob("video-*.jsonl")]
        return max((int(number) for number in numbers if number.isdigit()), default=0)

    @property
    def blocks(self) -> int:
        """Finished blocks."""
        return self._blocks

    @property
    def size(self) -> int:
        """Length of what is finished of the MP4."""
        return self._ends["mp4"][self._blocks]

    @property
    def seconds(self) -> float:
        """Length of what is finished, in seconds of playback."""
        return self._pictures / self.facts.fps

    def add(self, pictures: Frames, thumbnails: Sequence[Frames], latents: Tensor, facts: dict[str, Any]) -> dict:
        """Append a block.

        Args:
            pictures: uint8 [N, H, W, 3], all policies side by side.
            thumbnails: for each latent frame of the block, one picture [H, W, 3] of each policy, policies first.
            latents: [policies, F, C, H, W].
            facts: JSON that is kept with the block.

        Returns:
            The block's record.
        """
        fps = Fraction(self.facts.fps).limit_denominator(1001)
        fragment = encode_fragment(pictures, fps=fps, first_picture=self._pictures, number=self._blocks + 1)
        jpegs = [_jpeg(image) for image in thumbnails]
        frames = latents.shape[1]
        offset = self._ends["mp4"][-1]
        first = len(fragment.head) if self._blocks == 0 else 0
        record = {
            "block": self._blocks,
            "frame": self.frames,
            "frames": frames,
            "time": self._pictures / self.facts.fps,
            "duration": len(pictures) / self.facts.fps,
            "offset": offset + first,
            "bytes": len(fragment.body),
            **facts,
        }
        try:
            self._write("latents", latents.contiguous().view(torch.uint8).numpy().tobytes())
            self._write("mp4", fragment.head[:first] + fragment.body)
            self._write("thumbs", b"".join(jpegs))
            self._write("jsonl", _line({**record, "thumbnails": [len(jpeg) for jpeg in jpegs]}))
        except BaseException:
            for kind, file in self._files.items():  # a full disk: what was written of the block is taken back
                file.truncate(self._ends[kind][self._blocks])
                file.seek(0, os.SEEK_END)
            raise
        if not self.mime:
            self._set_mime(fragment.head)
        for kind, file in self._files.items():
            self._ends[kind].append(file.tell())
        self._pictures += len(pictures)
        self.frames += frames
        self._blocks += 1  # last: readers look at it first
        return record

    def record(self, block: int) -> dict[str, Any]:
        """What is known of a finished block."""
        line: dict[str, Any] = json.loads(self._read("jsonl", block))
        return line

    def records(self, first: int, last: int) -> list[dict[str, Any]]:
        """Of the blocks from `first` up to `last`, which is not included."""
        last = min(last, self.blocks)
        if first >= last:
            return []
        start, end = self._ends["jsonl"][first], self._ends["jsonl"][last]
        return [json.loads(line) for line in self._read_bytes("jsonl", start, end).splitlines()]

    def latents(self, block: int) -> Tensor:
        """[policies, F, C, H, W] of a finished block."""
        data = bytearray(self._read("latents", block))
        dtype: torch.dtype = getattr(torch, self.facts.dtype)
        return torch.frombuffer(data, dtype=dtype).view(self.facts.latent_shape)

    def thumbnail(self, frame: int, panel: int) -> bytes:
        """JPEG of a finished latent frame as a policy made it.

        Raises:
            IndexError: there is no such frame or policy.
        """
        length = self.facts.latent_shape[1]
        block = frame // length
        if not (0 <= block < self.blocks and 0 <= panel < len(self.facts.policies)):
            raise IndexError(f"video {self.number} has no frame {frame} of policy {panel}")
        sizes = self.record(block)["thumbnails"]
        place = panel * length + frame % length
        start = self._ends["thumbs"][block] + sum(sizes[:place])
        return self._read_bytes("thumbs", start, start + sizes[place])

    def save(self) -> Path:
        """Write what is finished as an ordinary MP4 with its index in front, and return its path.

        Raises:
            ValueError: nothing is finished yet.
        """
        import av

        if not self.blocks:
            raise ValueError("There is nothing to save yet.")
        path = self.folder / f"saved-{self.number:04d}-{self.blocks:06d}.mp4"
        data = io.BytesIO(self._read_bytes("mp4", 0, self.size))
        with (
            atomic_path(path) as temporary,
            av.open(data, "r") as source,
            av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as target,
        ):
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        return path

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _named(self, kind: str) -> Path:
        return self.folder / f"video-{self.number:04d}.{kind}"

    def _write(self, kind: str, data: bytes) -> None:
        file = self._files[kind]
        file.write(data)
        file.flush()

    def _read(self, kind: str, block: int) -> bytes:
        if not 0 <= block < self.blocks:
            raise IndexError(f"video {self.number} has {self.blocks} blocks, got {block}")
        return self._read_bytes(kind, self._ends[kind][block], self._ends[kind][block + 1])

    def _read_bytes(self, kind: str, start: int, end: int) -> bytes:
        with self._named(kind).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def _set_mime(self, head: bytes) -> None:
        self.mime = f'video/mp4; codecs="{codec_string(head)}"'

    def _recover(self) -> Facts:
        """Read the log up to the last block whose files are all there."""
        path = self._named("jsonl")
        sizes = {kind: self._named(kind).stat().st_size for kind in self._ends}
        end = 0
        facts: Facts | None = None
        with path.open("rb") as log:
            for line in log:
                try:
                    entry = json.loads(line)
                    if not line.endswith(b"\n"):
                        break
                except ValueError:
                    break
                if facts is None:
                    facts = _facts(entry, path)
                    end = len(line)
                    self._ends["jsonl"][0] = end
                    block_bytes = torch.Size(facts.latent_shape).numel() * getattr(torch, facts.dtype).itemsize
                    continue
                end += len(line)
                ends = {
                    "mp4": entry["offset"] + entry["bytes"],
                    "latents": self._ends["latents"][-1] + block_bytes,
                    "thumbs": self._ends["thumbs"][-1] + sum(entry["thumbnails"]),
                    "jsonl": end,
                }
                if any(ends[kind] > sizes[kind] for kind in ends):  # a power cut may keep the log and lose the rest
                    break
                for kind, offset in ends.items():
                    self._ends[kind].append(offset)
                self._blocks += 1
                self._pictures += round(entry["duration"] * facts.fps)
                self.frames += entry["frames"]
        if facts is None:
            raise ValueError(f"{path} is no log of a video that can be gone on with")
        return facts


def _facts(entry: dict[str, Any], path: Path) -> Facts:
    try:
        known = {name: entry[name] for name in Facts.__dataclass_fields__}
    except (KeyError, TypeError):
        raise ValueError(f"{path} is no log of a video that can be gone on with") from None
    return Facts(**{**known, "policies": tuple(known["policies"]), "latent_shape": tuple(known["latent_shape"])})


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _jpeg(image: Frames) -> bytes:
    picture = Image.fromarray(image)
    scale = _THUMBNAIL / max(picture.size)
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), method)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
