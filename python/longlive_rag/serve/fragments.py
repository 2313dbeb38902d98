"""Fragments of an MP4: each holds whole blocks, begins with a keyframe, and can be appended to a file for ever."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from longlive_rag.generation.video import Frames

TIMESCALE = 90_000  # ticks of a second; every usual frame rate divides it
_BT709, _LIMITED_RANGE = 1, 1  # ffmpeg's codes


class Fragment(NamedTuple):
    """An encoded block."""

    head: bytes
    """What a file begins with; the same for every fragment of the same size and rate."""
    body: bytes
    """The fragment itself: `moof` and `mdat`."""


def encode_fragment(pictures: Frames, *, fps: Fraction, first_picture: int, number: int) -> Fragment:
    """Encode pictures uint8 [N, H, W, 3] as the fragment `number` (from 1) of a video.

    Each has an encoder of its own, so that a block's bytes depend on its pictures only: a server that was killed goes
    on as if nothing had happened.
    """
    import av

    buffer = io.BytesIO()
    layout = {
        "movflags": "frag_keyframe+empty_moov+default_base_moof",
        "video_track_timescale": str(TIMESCALE),
    }
    with av.open(buffer, "w", format="mp4", options=layout) as container:
        stream = container.add_stream("libx264", rate=fps)
        context = stream.codec_context
        context.height, context.width = pictures.shape[1:3]
        context.pix_fmt = "yuv420p"
        context.time_base = 1 / fps
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        context.thread_count = 1
        # No B-frames: a fragment ends when its last picture is shown, and the first is shown at its time.
        # One keyframe, whatever is shown: another one would begin a fragment of its own.
        context.options = {
            "crf": "23",
            "preset": "veryfast",
            "tune": "zerolatency",
            "x264-params": "mbtree=0:keyint=infinite:scenecut=0",
        }
        for index, image in enumerate(pictures):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            picture.pts, picture.time_base = index, 1 / fps
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    data = buffer.getvalue()
    head, body = bytearray(), bytearray()
    for kind, start, end in boxes(data, 0, len(data)):
        if kind in (b"ftyp", b"moov"):
            head += data[start:end]
        elif kind in (b"moof", b"mdat"):
            body += data[start:end]
    _renumber(body, number, round(first_picture * TIMESCALE / fps))
    return Fragment(bytes(head), bytes(body))


def boxes(data: bytes | bytearray, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each box of an MP4 between two offsets."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        if size < 8:
            raise ValueError(f"an MP4 box must have at least 8 bytes, got {size} at offset {start}")
        yield kind, start, start + size
        start += size


def codec_string(head: bytes) -> str:
    """What Media Source Extensions call the codec, such as avc1.42C00C, from the head of a file."""
    place = head.index(b"avcC") + 4
    return "avc1." + head[place + 1 : place + 4].hex().upper()


def _renumber(body: bytearray, number: int, time: int) -> None:
    """Give the one fragment in `body` its number and its time, in ticks."""
    for kind, start, end in boxes(body, 0, len(body)):
        if kind != b"moof":
            continue
        for inner, inner_start, inner_end in boxes(body, start + 8, end):
            if inner == b"mfhd":
                struct.pack_into(">I", body, inner_start + 12, number)
            elif inner == b"traf":
                for leaf, leaf_start, _ in boxes(body, inner_start + 8, inner_end):
                    if leaf == b"tfdt":
                        version = body[leaf_start + 8]
                        struct.pack_into(">Q" if version else ">I", body, leaf_start + 12, time)
