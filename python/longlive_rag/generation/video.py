"""Video files: H.264 written while the video grows, and frames read in bounded memory.

Frames are uint8 RGB arrays `[N, H, W, 3]` throughout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from longlive_rag.files import atomic_path, check_writable

if TYPE_CHECKING:
    import av
    import av.container

Frames = np.ndarray[Any, np.dtype[np.uint8]]

# ffmpeg's codes for BT.709 and for limited ("TV") range. Players guess the colours of untagged files by their height.
_BT709 = 1
_LIMITED_RANGE = 1
_KEYFRAME_SECONDS = 2
_RATE_FACTOR = 17  # of x264; visually lossless


class VideoWriter:
    """Writes one H.264 file (yuv420p, BT.709, index in front) while its frames are being made.

    Until it is finished, the video is a file `<stem>.partial.mp4` in the same folder, in fragments of two seconds, so
    that it can be played at any time, even after a crash. Leaving the `with` block normally moves it to `path` with its
    index in front; an exception or interrupt closes and keeps the partial file, and an earlier file at `path` is left
    alone. If no frame was written, no file remains.

    Args:
        path: destination, ending in `.mp4`. Its folder must exist.
        fps: frames per second, positive.
        size: (height, width) in pixels, both even; None takes that of the first frames.

    Raises:
        ValueError: a suffix other than `.mp4`, an odd size, or a frame rate out of range.
        OSError: `path` is a folder, or its folder is missing or cannot be written to.
    """

    def __init__(self, path: str | Path, *, fps: float, size: tuple[int, int] | None = None) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"path must end in .mp4, got {str(path)!r}")
        if not 0 < fps <= 1000:
            raise ValueError(f"fps must be above 0 and at most 1000, got {fps}")
        if size is not None:
            _check_even(size)
        check_writable(self.path)
        self.partial_path = self.path.with_name(f"{self.path.stem}.partial.mp4")
        self.fps = Fraction(fps).limit_denominator(1001)
        self.size = size
        self.frames_written = 0
        self._container: av.container.OutputContainer | None = None
        self._stream: Any = None
        self._finished = False

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_container()
        if kind is None and self.frames_written:
            _move_index_to_front(self.partial_path, self.path)
        self._finished = True

    def write(self, frames: Frames) -> None:
        """Append `frames` uint8 [N, H, W, 3]; N may be 0.

        Raises:
            TypeError: `frames` is not a uint8 array.
            ValueError: its shape is not [N, H, W, 3], its size odd or not the video's, or the writer is closed.
        """
        import av

        if self._finished:
            raise ValueError(f"the writer of {self.path} is closed")
        _check_frames("frames", frames)
        size = (frames.shape[1], frames.shape[2])
        if self.size is None:
            _check_even(size)
            self.size = size
        if size != self.size:
            raise ValueError(f"frames must be {_pixels(self.size)} as the video is, got {_pixels(size)}")
        if self._container is None:
            self._open_container(*self.size)
        assert self._container is not None
        for image in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            picture.pts = self.frames_written
            picture.time_base = 1 / self.fps
            self._container.mux(self._stream.encode(picture))
            self.frames_written += 1

    def _open_container(self, height: int, width: int) -> None:
        import av

        # Fragments, since an ordinary MP4 cannot be played without its index, which is written last.
        layout = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        self._container = av.open(str(self.partial_path), "w", format="mp4", options=layout)
        options = {"crf": str(_RATE_FACTOR), "preset": "medium"}
        stream = self._container.add_stream("libx264", rate=self.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / self.fps
        context.gop_size = max(1, round(_KEYFRAME_SECONDS * self.fps))
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        self._stream = stream

    def _close_container(self) -> None:
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            container.mux(self._stream.encode(None))
        finally:
            container.close()


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
