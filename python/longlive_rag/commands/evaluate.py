"""`longlive-rag evaluate`: how far each of several videos has drifted from its own beginning."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from longlive_rag.evaluation.comparison import compare
from longlive_rag.evaluation.drift import METRICS, SEGMENT_FRAMES, Drift, check_segment_frames, measure_drift
from longlive_rag.evaluation.drift_report import comparison_table, draw_drift, drift_table, error_table, farthest
from longlive_rag.files import output_folder, write_json
from longlive_rag.generation.video import VideoReader
from longlive_rag.options import Positional


@dataclass(frozen=True)
class Evaluate:
    """Measure how far videos drift: the relative change of sharpness, colour and more from first segment to last.

    Writes report.json, drift.png, and for each video one that plays its first five seconds beside its last five. Two
    videos or more are compared, each with the first, with intervals. Nothing is downloaded. Memory hardly grows with
    the length of a video.

    Examples:
      longlive-rag evaluate sliding_window.mp4 retrieval.mp4 --output drift
    """

    videos: Positional[tuple[Path, ...]]
    """Video files in any format that FFmpeg reads. The others are compared with the first."""
    output: Path
    """Folder for the results; created if it is missing."""
    segment_frames: int = SEGMENT_FRAMES
    """Length of a segment, in frames: drift is the change from the first one to the last."""

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
            drifts: dict[str, Drift] = {}
            beside: dict[str, Path] = {}
            for number, (label, reader) in enumerate(zip(self._labels(), readers, strict=True), 1):
                drifts[label] = self._measure(label, reader)
                beside[label] = output / f"{number:02d}_{reader.path.stem}_first_and_last.mp4"
                drifts[label].ends.write(beside[label], reader.fps)
                drifts[label].ends.forget()
        print(f"Change from the first {self.segment_frames} frames to the last {self.segment_frames}:\n")
        print(drift_table(drifts))
        print("\nVideo drift error over all segments (comparable between videos of one length):\n")
        print(error_table(drifts))
        first, *others = drifts
        comparisons = [(first, other, compare(drifts[first], drifts[other])) for other in others]
        for video, other, differences in comparisons:
            print(f"\nHow much further {video} is from its beginning than {other} (points, 95% interval):\n")
            print(comparison_table(video, other, differences))
        if others:
            print(f"\n{farthest(drifts)}.")
        draw_drift(drifts, output / "drift.png")
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
                    "segments": len(drift.segments),
                    "video_drift_error": drift.video_drift_error,
                    "ends": {"seconds": drift.ends.length / reader.fps, "drift": drift.end_change},
                    "self_similarity": {
                        "lag_seconds": drift.self_similarity.lags.tolist(),
                        "mean": [None if mean != mean else mean for mean in map(float, drift.self_similarity.means)],
                    },
                }
                for reader, drift in zip(readers, drifts.values(), strict=True)
            ],
            "comparisons": [
                {
                    "video": str(self.videos[0]),
                    "other": str(self.videos[index]),
                    "further": {
                        name: None if each is None else {"mean": each.mean, "low": each.low, "high": each.high}
                        for name, each in differences.items()
                    },
                }
                for index, (_, _, differences) in enumerate(comparisons, 1)
            ],
        }
        write_json(output / "report.json", report)
        print(f"\nWritten: {output / 'drift.png'}, {output / 'report.json'}, {', '.join(map(str, beside.values()))}")
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
            return measure_drift(images, self.segment_frames, fps=reader.fps)
        except ValueError as error:
            raise ValueError(f"{reader.path}: {error}" if str(reader.path) not in str(error) else str(error)) from error
