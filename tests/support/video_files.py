"""Reading back the videos that a test has written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from longlive_rag.generation.video import Frames, VideoReader


def read_video(path: Path) -> tuple[Frames, float]:
    """All frames, uint8 [N, H, W, 3], and frames per second."""
    with VideoReader(path) as video:
        return np.stack(list(video)), video.fps
