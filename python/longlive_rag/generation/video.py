"""Video files: H.264 written while the video grows, and frames read in bounded memory.

Frames are uint8 RGB arrays `[N, H, W, 3]` throughout.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from longlive_rag.files import atomic_path, check_writable

if TYPE_CHECKING:
    import av
    import av.container

Frames = npt.NDArray[np.uint8]

# ffmpeg's codes for BT.709 and for limited ("TV") range. Players guess the colours of untagged files by their height.
_BT709 = 1
_LIMITED_RANGE = 1
_SEGMENT_SECONDS = 2
# A picture is decoded at most so many pictures before it is shown: x264's reordering with a pyramid of B-frames.
_REORDERING = 2
# Visually lossless. Without macroblock trees x264 spends more bits, but with them, in its vector code, it makes other
# bits each time (13 different files in 15 tries).
_X264_OPTIONS = {"crf": "18", "preset": "medium", "x264-params": "mbtree=0"}
# x264's choices depend on how many threads it has, by default on the machine's cores.
_ENCODER_THREADS = 4


class Segment(NamedTuple):
    """A stretch of a video that is encoded on its own."""

    data: npt.NDArray[np.uint8]
    """The packets, one after the other."""
    packets: npt.NDArray[np.int64]
    """[N, 3]: size, number of the picture, and 1 for a keyframe, of each packet in the order of decoding."""


class SegmentStore(Protocol):
    """Where a writer keeps finished segments, to go on from them another time."""

    def put_segment(self, index: int, segment: Segment) -> None:
        """Keep the segment with this number."""
        ...


class VideoWriter:
    """Writes one H.264 file (yuv420p, BT.709, index in front) while its frames are being made.

    The video is encoded in segments of two seconds, each by an encoder of its own, so that a video that is written in
    two goes is the same, to the last byte, as one that is written in one.

    Until it is finished, the video is a file `<stem>.partial.mp4` in the same folder, in fragments of two seconds, so
    that it can be played at any time, even after a crash. Leaving the `with` block normally moves it to `path` with its
    index in front; an exception or interrupt closes and keeps the partial file, and an earlier file at `path` is left
    alone. If no frame was written, no file remains.

    Args:
        path: destination, ending in `.mp4`. Its folder must exist.
        fps: frames per second, positive.
        size: (height, width) in pixels, both even; None takes that of the first frames.
        store: is given each finished segment.
        finished: the segments, with `size`, that an earlier writer gave to its store; the video goes on after them.

    Attributes:
        frames_written: frames of the video so far, inside the `with` block those of `finished` included.

    Raises:
        ValueError: a suffix other than `.mp4`, an odd size, or a frame rate out of range.
        OSError: `path` is a folder, or its folder is missing or cannot be written to.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float,
        size: tuple[int, int] | None = None,
        store: SegmentStore | None = None,
        finished: Iterable[Segment] = (),
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"path must end in .mp4, got {str(path)!r}")
        if not 0 < fps <= 1000:
            raise ValueError(f"fps must be above 0 and at most 1000, got {fps}")
        if size is not None:
            _check_even(size)
        check_writable(self.path)
        self.partial_path = partial_path(self.path)
        self.fps = Fraction(fps).limit_denominator(1001)
        self.size = size
        self.segment_frames = max(1, round(_SEGMENT_SECONDS * self.fps))
        self.frames_written = 0
        self._store, self._finished = store, finished
        self._container: av.container.OutputContainer | None = None
        self._stream: Any = None
        self._encoder: Any = None
        self._packets: list[tuple[bytes, int, bool]] = []
        self._packets_written = 0
        self._broken = self._closed = False

    def __enter__(self) -> VideoWriter:
        segments = iter(self._finished)
        first = next(segments, None)
        if first is not None:
            try:
                # The earlier partial file may be longer: it stays until this one has all that is finished.
                with atomic_path(self.partial_path) as temporary:
                    self._open_container(temporary)
                    for segment in chain([first], segments):
                        self._append(segment)
            except BaseException:
                self._close_container(after_error=True)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._close_container(after_error=kind is not None)
        if kind is None and self.frames_written:
            _move_index_to_front(self.partial_path, self.path)

    def write(self, frames: Frames) -> None:
        """Append `frames` uint8 [N, H, W, 3]; N may be 0.

        Raises:
            TypeError: `frames` is not a uint8 array.
            ValueError: its shape is not [N, H, W, 3], its size odd or not the video's, or the writer is closed.
        """
        import av

        if self._closed:
            raise ValueError(f"the writer of {self.path} is closed")
        _check_frames("frames", frames)
        size = (frames.shape[1], frames.shape[2])
        if self.size is None:
            _check_even(size)
            self.size = size
        if size != self.size:
            raise ValueError(f"frames must be {_pixels(self.size)} as the video is, got {_pixels(size)}")
        if self._container is None:
            self._open_container(self.partial_path)
        for image in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            picture.pts = self.frames_written
            picture.time_base = 1 / self.fps
            if self._encoder is None:
                self._encoder = self._new_encoder()
            self._encode(picture)
            self.frames_written += 1
            if self.frames_written % self.segment_frames == 0:
                self._end_segment()

    def _open_container(self, path: Path) -> None:
        import av

        # Fragments, since an ordinary MP4 cannot be played without its index, which is written last.
        layout = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        self._container = av.open(str(path), "w", format="mp4", options=layout)
        # Its own encoder encodes nothing; it only says in the file what those of the segments say of themselves.
        self._stream = self._container.add_stream("libx264", rate=self.fps)
        self._configure(self._stream.codec_context)

    def _new_encoder(self) -> Any:
        import av
        from av.codec.context import Flags

        encoder = av.CodecContext.create("libx264", "w")
        encoder.framerate = self.fps
        encoder.flags |= Flags.global_header
        self._configure(encoder)
        return encoder

    def _configure(self, context: Any) -> None:
        assert self.size is not None
        context.height, context.width = self.size
        context.pix_fmt = "yuv420p"
        context.time_base = 1 / self.fps
        context.gop_size = self.segment_frames
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        context.thread_count = _ENCODER_THREADS
        context.options = _X264_OPTIONS

    def _encode(self, picture: av.VideoFrame | None) -> None:
        self._broken = True  # unless all goes well; then there is nothing more to be had from this encoder
        for packet in self._encoder.encode(picture):
            self._packets.append((bytes(packet), packet.pts, packet.is_keyframe))
            self._mux(*self._packets[-1])
        self._broken = False

    def _mux(self, data: bytes, number: int, keyframe: bool) -> None:
        import av

        assert self._container is not None
        packet = av.Packet(data)
        # An encoder counts decoding times otherwise in a segment that is too short to be reordered.
        packet.pts, packet.dts = number, self._packets_written - _REORDERING
        packet.duration, packet.time_base = 1, 1 / self.fps
        packet.is_keyframe = keyframe
        packet.stream = self._stream
        self._container.mux(packet)
        self._packets_written += 1

    def _end_segment(self) -> None:
        self._encode(None)
        self._encoder = None
        if self._store is not None:
            table = [(len(data), number, keyframe) for data, number, keyframe in self._packets]
            data = np.frombuffer(bytearray().join(packet[0] for packet in self._packets), np.uint8)
            index = self.frames_written // self.segment_frames - 1
            self._store.put_segment(index, Segment(data, np.array(table, np.int64)))
        self._packets = []

    def _append(self, segment: Segment) -> None:
        start = 0
        for size, number, keyframe in segment.packets.tolist():
            self._mux(segment.data[start : start + size].tobytes(), number, bool(keyframe))
            start += size
        self.frames_written += len(segment.packets)

    def _close_container(self, *, after_error: bool) -> None:
        if self._container is None:
            return
        # After an error, such as a full disk, closing may fail in its turn; the first error is the one to be seen.
        with contextlib.suppress(OSError) if after_error else contextlib.nullcontext():
            try:
                if self._encoder is not None and not self._broken:
                    self._encode(None)
            finally:
                container, self._container, self._encoder = self._container, None, None
                container.close()


def partial_path(path: Path) -> Path:
    """Where a video is while it grows."""
    return path.with_name(f"{path.stem}.partial.mp4")


class VideoReader:
    """Reads a video frame by frame; only one frame is in memory at a time.

        with VideoReader(path) as video:
            for image in video:          # uint8 [H, W, 3]
                ...

    Attributes:
        fps: average frames per second.
        size: (height, width) in pixels.
        frames: number of frames the file declares, or None where it does not say.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a video, has no video stream or, while iterating, turns out to be damaged or truncated.
    """

    def __init__(self, path: str | Path) -> None:
        import av

        self.path = Path(path)
        if self.path.is_dir():
            raise IsADirectoryError(f"expected a video file, got the folder {self.path}")
        if not self.path.is_file():
            raise FileNotFoundError(f"video file {self.path} does not exist")
        try:
            self._container = av.open(str(self.path))
        except av.error.PermissionError as error:
            raise PermissionError(f"video file {self.path} cannot be read: {error.strerror}") from error
        except av.error.FFmpegError as error:
            raise ValueError(f"{self.path} is not a readable video file: {error.strerror}") from error
        if not self._container.streams.video:
            self._container.close()
            raise ValueError(f"{self.path} holds no video stream")
        self._stream = self._container.streams.video[0]
        # More threads would only hold more pictures in memory.
        self._stream.codec_context.thread_count = min(4, os.cpu_count() or 1)
        self._stream.thread_type = "AUTO"
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        self.size = (self._stream.height, self._stream.width)
        self.frames: int | None = self._stream.frames or None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frames]:
        import av

        height, width = self.size
        packets = decoded = 0
        try:
            for packet in self._container.demux(self._stream):
                packets += packet.size > 0
                for picture in packet.decode():
                    decoded += 1
                    yield np.asarray(picture.to_ndarray(format="rgb24", width=width, height=height), dtype=np.uint8)
        except av.error.FFmpegError as error:
            raise ValueError(f"{self.path} is damaged after frame {decoded}: {error.strerror}") from error
        # An MP4's index says how many packets there are; ffmpeg itself takes a truncated file for a shorter one.
        if "mp4" in self._container.format.name and self.frames is not None and packets < self.frames:
            raise ValueError(f"{self.path} is truncated: it declares {self.frames} frames and holds {packets}")
        if decoded == 0:
            raise ValueError(f"{self.path} holds no video frame")


def _move_index_to_front(partial: Path, path: Path) -> None:
    """Remux the fragments in `partial`, without encoding them again, into one ordinary file at `path`."""
    import av

    with atomic_path(path) as temporary:
        layout = {"movflags": "faststart"}
        with av.open(str(partial)) as source, av.open(str(temporary), "w", format="mp4", options=layout) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            # Fragments have no edit list, so a video whose frames are coded out of order starts late.
            delay = source.streams.video[0].start_time or 0
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None and packet.pts is not None:
                    packet.pts, packet.dts = packet.pts - delay, packet.dts - delay
                    packet.stream = stream
                    target.mux(packet)
    partial.unlink()


def _check_frames(name: str, frames: Frames) -> None:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        given = frames.dtype if hasattr(frames, "dtype") else type(frames).__name__
        raise TypeError(f"{name} must be a uint8 numpy array, got {given}")
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"{name} must be [N, H, W, 3], got {list(frames.shape)}")


def _check_even(size: tuple[int, int]) -> None:
    height, width = size
    if height < 16 or width < 16 or height % 2 or width % 2:
        raise ValueError(f"the video's height and width must be even and at least 16, got {_pixels(size)}")


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
