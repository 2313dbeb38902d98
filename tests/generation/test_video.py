"""Video files: what is written comes back, whole or in part, and what cannot be read is refused by name."""

from __future__ import annotations

from typing import cast

import av
import numpy as np
import pytest

from longlive_rag.generation.video import VideoReader, VideoWriter
from support.video_files import read_video


def moving_gradient(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    images = [
        np.stack([rows * 4, columns * 3, np.full_like(rows, 5 * index % 256)], axis=-1) for index in range(frames)
    ]
    return np.stack(images).astype(np.uint8)


def test_frames_written_in_pieces_come_back_in_order(tmp_path):
    frames = moving_gradient(40)
    path = tmp_path / "video.mp4"
    with VideoWriter(path, fps=16) as writer:
        for start in range(0, 40, 7):
            writer.write(frames[start : start + 7])
    back, fps = read_video(path)
    assert fps == 16
    assert back.shape == frames.shape
    # A frame moved by one place differs by 5 in blue, and a colour matrix mixed up differs by tens.
    assert np.abs(back.astype(int) - frames).mean(axis=(1, 2, 3)).max() < 2.0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["video.mp4"]


def test_file_is_what_players_take(tmp_path):
    path = tmp_path / "video.mp4"
    with VideoWriter(path, fps=30000 / 1001, size=(48, 64)) as writer:
        writer.write(moving_gradient(5))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.frames == 5
        assert stream.average_rate is not None and stream.time_base is not None
        assert float(stream.average_rate) == pytest.approx(30000 / 1001)
        assert stream.codec_context.colorspace == 1
        times = [float(cast(int, frame.pts) * stream.time_base) for frame in container.decode(stream)]
        assert times == pytest.approx([index * 1001 / 30000 for index in range(5)], abs=1e-4)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_video_is_kept_and_earlier_file_untouched(tmp_path, error):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"an earlier video")
    with pytest.raises(error), VideoWriter(path, fps=8) as writer:
        writer.write(moving_gradient(9))
        raise error
    assert path.read_bytes() == b"an earlier video"
    back, _ = read_video(tmp_path / "video.partial.mp4")
    assert len(back) == 9


def test_video_plays_while_it_grows(tmp_path):
    with VideoWriter(tmp_path / "video.mp4", fps=8) as writer:
        # x264 looks some 50 frames ahead; what came before must be on disk, as a killed process would leave it.
        writer.write(moving_gradient(120))
        grown, _ = read_video(writer.partial_path)
        assert len(grown) >= 48


def test_no_frame_leaves_no_file(tmp_path):
    with VideoWriter(tmp_path / "video.mp4", fps=8) as writer:
        writer.write(np.zeros((0, 48, 64, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (np.zeros((2, 47, 64, 3), np.uint8), ValueError, "even.*47 x 64"),
        (np.zeros((2, 48, 64, 3), np.float32), TypeError, "uint8.*float32"),
        (np.zeros((48, 64, 3), np.uint8), ValueError, r"\[N, H, W, 3\]"),
        ([[1, 2, 3]], TypeError, "uint8 numpy array, got list"),
    ],
)
def test_unusable_frames_are_refused(tmp_path, frames, error, message):
    with pytest.raises(error, match=message), VideoWriter(tmp_path / "video.mp4", fps=8) as writer:
        writer.write(frames)
    assert list(tmp_path.iterdir()) == []


def test_size_may_not_change(tmp_path):
    with (
        pytest.raises(ValueError, match="48 x 64 as the video is, got 48 x 32"),
        VideoWriter(tmp_path / "video.mp4", fps=8, size=(48, 64)) as writer,
    ):
        writer.write(moving_gradient(2, width=32))


def test_unusable_destinations_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .*missing of .*video\.mp4 does not exist"):
        VideoWriter(tmp_path / "missing" / "video.mp4", fps=8)
    with pytest.raises(ValueError, match=r"\.mp4"):
        VideoWriter(tmp_path / "video.gif", fps=8)
    with pytest.raises(ValueError, match="fps"):
        VideoWriter(tmp_path / "video.mp4", fps=0)
    with pytest.raises(ValueError, match="47 x 64"):
        VideoWriter(tmp_path / "video.mp4", fps=8, size=(47, 64))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.mp4"):
        VideoWriter(tmp_path / "folder.mp4", fps=8)


def test_unreadable_videos_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        read_video(tmp_path / "none.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("this is no video")
    with pytest.raises(ValueError, match=r"text\.mp4 is not a readable video"):
        read_video(text)
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"sound\.wav holds no video stream"):
        read_video(sound)


def test_truncated_video_is_refused(tmp_path):
    path = tmp_path / "video.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    with VideoWriter(path, fps=8) as writer:
        writer.write(noise)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"video.mp4 is (truncated|damaged)"):
        read_video(path)
    path.write_bytes(data[:200])
    with pytest.raises(ValueError, match=r"video\.mp4 (is not a readable video|holds no video)"):
        read_video(path)


def test_reader_holds_one_frame_at_a_time(tmp_path):
    path = tmp_path / "video.mp4"
    frames = moving_gradient(12)
    with VideoWriter(path, fps=8) as writer:
        writer.write(frames)
    with VideoReader(path) as video:
        assert (video.fps, video.size, video.frames) == (8, (48, 64), 12)
        shapes = [image.shape for image in video]
    assert shapes == [(48, 64, 3)] * 12
