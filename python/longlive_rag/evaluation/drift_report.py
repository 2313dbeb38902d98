"""Drift of several videos as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from longlive_rag import figures
from longlive_rag.evaluation.drift import METRICS, Array, Drift

_COLUMNS = 4
_VIDEOS_IN_A_ROW = 2


def drift_table(drifts: Mapping[str, Drift]) -> str:
    """One line per video: relative change of every metric, last segment against first."""
    label_width = max(len("video"), *map(len, drifts))
    widths = {name: max(7, len(name)) for name in METRICS}
    lines = ["  ".join([f"{'video':{label_width}}", *(f"{name:>{width}}" for name, width in widths.items())])]
    for label, drift in drifts.items():
        cells = [f"{_percent(change):>{widths[name]}}" for name, change in drift.change.items()]
        lines.append("  ".join([f"{label:{label_width}}", *cells]))
    return "\n".join(lines)


def draw_drift(drifts: Mapping[str, Drift], rates: Mapping[str, float], path: Path) -> None:
    """Draw the first and last frame of each video and each metric over time, relative to the first segment.

    Args:
        drifts: label -> drift.
        rates: label -> frames per second.
        path: PNG file, written atomically.
    """
    strip_rows = -(-len(drifts) // _VIDEOS_IN_A_ROW)
    curve_rows = -(-len(METRICS) // _COLUMNS)
    figure = figures.figure(16, 2.6 * strip_rows + 3.0 * curve_rows)
    grid = figure.add_gridspec(strip_rows + curve_rows, _COLUMNS, height_ratios=[2.6] * strip_rows + [3.0] * curve_rows)
    colours = {label: f"C{index}" for index, label in enumerate(drifts)}

    for index, (label, drift) in enumerate(drifts.items()):
        row, column = divmod(2 * index, _COLUMNS)
        seconds = (len(drift.values) - 1) / rates[label]
        for offset, (image, when) in enumerate(((drift.first_frame, 0.0), (drift.last_frame, seconds))):
            axes = figure.add_subplot(grid[row, column + offset])
            axes.imshow(image)
            axes.set_title(f"{label}, {when:.1f} s", fontsize=10, color=colours[label])
            axes.set_axis_off()

    for index, name in enumerate(METRICS):
        row, column = divmod(index, _COLUMNS)
        axes = figure.add_subplot(grid[strip_rows + row, column])
        for label, drift in drifts.items():
            change = drift.change[name]
            if change is None:
                continue
            relative = 100 * (drift.values[:, index] / drift.first[name] - 1)
            # The first frame has no motion; it is drawn with the second's.
            relative = np.where(np.isnan(relative), relative[1], relative)
            times = np.arange(len(relative)) / rates[label]
            smooth = _running_mean(relative, drift.segment_frames)
            middles = _running_mean(times, drift.segment_frames)
            axes.plot(times, relative, color=colours[label], linewidth=0.6, alpha=0.3)
            axes.plot(middles, smooth, color=colours[label], linewidth=1.8, label=_percent(change))
        axes.axhline(0, color="black", linewidth=0.8)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False, loc="upper left", handlelength=1.2)
        axes.set_title(f"{name} (change, %)", fontsize=10)
        axes.set_xlabel("seconds", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figures.save(figure, path)


def _running_mean(values: Array, length: int) -> Array:
    return np.convolve(values, np.full(length, 1 / length), mode="valid")


def _percent(change: float | None) -> str:
    return "-" if change is None else f"{100 * change:+.1f}%"
