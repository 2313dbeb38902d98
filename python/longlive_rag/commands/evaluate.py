"""`longlive-rag evaluate`: how far each of several videos has drifted from its own beginning."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from longlive_rag.evaluation.drift import METRICS, SEGMENT_FRAMES, Drift, check_segment_frames, measure_drift
from longlive_rag.evaluation.drift_report import draw_drift, drift_table
from longlive_rag.files import output_folder, write_json
from longlive_rag.generation.video import VideoReader
from longlive_rag.options import Positional


@dataclass(frozen=True)
class Evaluate:
    """Measure how far videos drift: the relative change of sharpness, colour and more from first segment to last.

    Writes report.json and drift.png. Memory use does not grow with the length of a video.

    Examples:
      longlive-rag evaluate sliding_window.mp4 retrieval.mp4 --output drift
    """

    videos: Positional[tuple[Path, ...]]
    """Video files in any format that FFmpeg reads."""
    output: Path
    """Folder for report.json and drift.png; created if it is missing."""
    segment_frames: int = SEGMENT_FRAMES
    """Length of the first and of the last segment, in frames."""

    def run(self) -> int:
        if not self.videos:
            raise ValueError("videos must name at least one file, got none")
        check_segment_frames(self.segment_frames)
        with ExitStack() as stack:
            readers = [stack.enter_context(VideoReader(path)) for path in self.videos]
            for reader in readers:
                if reader.frames is not None and reader.frames < 2 * self.segment_frames:
                    raise ValueError(
                        f"{reader.path} has {reader.frames} frames, too few for two segments of {self.segment_frames}; "
                        "choose a smaller --segment-frames"
                    )
            output = output_folder(self.output)
            drifts = {
                label: self._measure(label, reader) for label, reader in zip(self._labels(), readers, strict=True)
            }
        rates = {label: reader.fps for label, reader in zip(drifts, readers, strict=True)}
        print(f"Change from the first {self.segment_frames} frames to the last {self.segment_frames}:\n")
        print(drift_table(drifts))
        draw_drift(drifts, rates, output / "drift.png")
        report = {
            "segment_frames": self.segment_frames,
            "metrics": METRICS,
            "videos": [
                {
                    "path": str(reader.path),
                    "frames": len(drift.values),
                    "fps": reader.fps,
                    "height": reader.size[0],
                    "width": reader.size[1],
                    "drift": drift.change,
                    "first": drift.first,
                    "last": drift.last,
                }
                for reader, drift in zip(readers, drifts.values(), strict=True)
            ],
        }
        write_json(output / "report.json", report)
        print(f"\nWritten: {output / 'report.json'}, {output / 'drift.png'}")
        return 0

    def _labels(self) -> list[str]:
        """File names where these tell the videos apart, else paths, numbered where even these are the same."""
        names = [path.name for path in self.videos]
        if len(set(names)) < len(names):
            names = [str(path) for path in self.videos]
        counts = Counter(names)
        return [f"{name} ({index + 1})" if counts[name] > 1 else name for index, name in enumerate(names)]

    def _measure(self, label: str, reader: VideoReader) -> Drift:
        images = tqdm(reader, desc=label, total=reader.frames, unit="frame", disable=None, leave=False)
        try:
            return measure_drift(images, self.segment_frames)
        except ValueError as error:
            raise ValueError(f"{reader.path}: {error}" if str(reader.path) not in str(error) else str(error)) from error
