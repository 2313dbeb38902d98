"""Drift of several videos as tables and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from longlive_rag import figures
from longlive_rag.evaluation.comparison import NOTICEABLE, Difference, compare
from longlive_rag.evaluation.drift import METRICS, Array, Drift

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CURVES_IN_A_ROW = 4
_PICTURES = 9
_LONGEST_LABEL = 60


def drift_table(drifts: Mapping[str, Drift]) -> str:
    """One line per video: relative change of every metric, last segment against first."""
    return _table({label: [_percent(change) for change in drift.change.values()] for label, drift in drifts.items()})


def error_table(drifts: Mapping[str, Drift]) -> str:
    """One line per video: video drift error of every metric."""
    return _table(
        {
            label: ["-" if error is None else f"{error:.2f}" for error in drift.video_drift_error.values()]
            for label, drift in drifts.items()
        }
    )


def comparison_table(video: str, other: str, differences: Mapping[str, Difference | None]) -> str:
    """One line per metric: which of two videos has moved further from its beginning, and by how much."""
    width = max(map(len, METRICS))
    lines = []
    for name, difference in differences.items():
        if difference is None:
            lines.append(f"{name:{width}}  nothing to compare with")
            continue
        between = (
            f" ({_points(difference.low)} to {_points(difference.high)})"
            if difference.low is not None and difference.high is not None
            else ""
        )
        further = (video if difference.mean > 0 else other) if difference.decided else "undecided"
        lines.append(f"{name:{width}}  {_points(difference.mean):>7}{between:22}  {further}")
    return "\n".join(lines)


def farthest(drifts: Mapping[str, Drift]) -> str:
    """A sentence: which of several videos is farthest from its beginning in most metrics, over its later segments."""
    distances = np.stack([abs(drift.deviations).mean(axis=0) for drift in drifts.values()])
    distances = distances[:, ~np.isnan(distances).any(axis=0)]
    second, first = np.sort(distances, axis=0)[-2:]
    led = first - second >= NOTICEABLE
    wins = np.bincount(distances.argmax(axis=0)[led], minlength=len(distances))
    most = int(wins.argmax())
    return f"{list(drifts)[most]} is farthest from its beginning in {wins[most]} of {len(first)} metrics"


def draw_drift(drifts: Mapping[str, Drift], path: Path) -> None:
    """Draw the course of each video in pictures, each metric over time, and what tells the first video from the second.

    Args:
        drifts: label -> drift.
        path: PNG file, written atomically.
    """
    curve_rows = -(-len(METRICS) // _CURVES_IN_A_ROW)
    heights = [1.6] * len(drifts) + [2.5] * curve_rows + [3.0]
    figure = figures.figure(16, sum(heights) + 0.6)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    colours = {label: f"C{index}" for index, label in enumerate(drifts)}
    if len(drifts) > 1:
        figure.suptitle(farthest(drifts), fontsize=14)
    for row, (label, drift) in enumerate(drifts.items()):
        strip = grid[row].subgridspec(2, _PICTURES, height_ratios=[1, 7], wspace=0.02, hspace=0)
        title = figure.add_subplot(strip[0, :])
        title.set_axis_off()
        title.text(0, 0, _short(label), fontsize=11, color=colours[label], fontweight="bold")
        for column, index in enumerate(np.linspace(0, len(drift.thumbnails) - 1, _PICTURES).round().astype(int)):
            seconds, image = drift.thumbnails[index]
            axes = figure.add_subplot(strip[1, column])
            axes.imshow(image)
            axes.set_xticks([], [])
            axes.set_yticks([], [])
            axes.set_xlabel(f"{seconds:.0f} s", fontsize=9)
            axes.spines[:].set_color(colours[label])
            axes.spines[:].set_linewidth(2)
    for row in range(curve_rows):
        panels = grid[len(drifts) + row].subgridspec(1, _CURVES_IN_A_ROW)
        for column, name in enumerate(list(METRICS)[row * _CURVES_IN_A_ROW :][:_CURVES_IN_A_ROW]):
            _draw_metric(figure.add_subplot(panels[column]), name, drifts, colours)
    below = grid[-1].subgridspec(1, 2)
    _draw_self_similarity(figure.add_subplot(below[0]), drifts, colours)
    if len(drifts) > 1:
        first, second = list(drifts)[:2]
        _draw_comparison(figure.add_subplot(below[1]), first, second, drifts, colours)
    figures.save(figure, path)


def _draw_metric(axes: Axes, name: str, drifts: Mapping[str, Drift], colours: Mapping[str, str]) -> None:
    index = list(METRICS).index(name)
    lowest = highest = 0.0
    for label, drift in drifts.items():
        change = drift.change[name]
        if change is None:
            continue
        relative = 100 * (drift.values[:, index] / drift.first[name] - 1)
        # The first frame has no motion; it is drawn with the second's.
        relative = np.where(np.isnan(relative), relative[1], relative)
        times = np.arange(len(relative)) / drift.fps
        axes.plot(times, relative, color=colours[label], linewidth=0.6, alpha=0.3)
        smooth = _running_mean(relative, drift.segment_frames)
        lowest, highest = min(lowest, float(smooth.min())), max(highest, float(smooth.max()))
        middles = _running_mean(times, drift.segment_frames)
        axes.plot(middles, smooth, color=colours[label], linewidth=1.8, label=_percent(change))
    # Single frames may leave the panel; the curves and 0 are in it, and half a per cent is not drawn as a mountain.
    margin = max(1.0, 0.3 * (highest - lowest))
    axes.set_ylim(lowest - margin, highest + margin)
    axes.axhline(0, color="black", linewidth=0.8)
    _finish(axes, f"{name} (change, %)", "seconds")


def _draw_self_similarity(axes: Axes, drifts: Mapping[str, Drift], colours: Mapping[str, str]) -> None:
    for label, drift in drifts.items():
        lags, means = drift.self_similarity
        axes.plot(lags, means, color=colours[label], linewidth=1.8, label=_short(label))
    axes.set_ylim(min(0.9, axes.get_ylim()[0]), 1.02)
    _finish(axes, "how alike two pictures are, by the time between them", "seconds between them")
    axes.set_ylabel("correlation", fontsize=9)


def _draw_comparison(
    axes: Axes, video: str, other: str, drifts: Mapping[str, Drift], colours: Mapping[str, str]
) -> None:
    differences = compare(drifts[video], drifts[other])
    drawn = {name: difference for name, difference in differences.items() if difference is not None}
    for row, difference in enumerate(drawn.values()):
        colour = colours[video if difference.mean > 0 else other] if difference.decided else "0.6"
        if difference.low is not None and difference.high is not None:
            axes.plot([100 * difference.low, 100 * difference.high], [row, row], color=colour, linewidth=2.5)
        axes.plot(100 * difference.mean, row, "o", color=colour, markersize=6)
    for label, colour in ((video, colours[video]), (other, colours[other]), ("undecided", "0.6")):
        axes.plot([], [], "-o", color=colour, linewidth=2.5, label=_short(label))
    axes.axvline(0, color="black", linewidth=0.8)
    # Most differences are a few points, one may be hundreds.
    axes.set_xscale("symlog", linthresh=10)
    largest = max((abs(100 * each.mean) for each in drawn.values()), default=1)
    axes.set_xlim(-3 * max(10, largest), 3 * max(10, largest))
    ticks = [tick for tick in (-1000, -100, -10, -5, 0, 5, 10, 100, 1000) if abs(tick) <= 3 * max(10, largest)]
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.set_yticks(range(len(drawn)), list(drawn))
    axes.invert_yaxis()
    _finish(
        axes, "which has moved further from its beginning", "mean difference, points of the beginning, 95% interval"
    )


def _finish(axes: Axes, title: str, along: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(along, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False, loc="best", handlelength=1.2)


def _table(cells: Mapping[str, list[str]]) -> str:
    label_width = max(len("video"), *map(len, cells))
    widths = [max(7, len(name)) for name in METRICS]
    lines = [
        "  ".join(
            [f"{'video':{label_width}}", *(f"{name:>{width}}" for name, width in zip(METRICS, widths, strict=True))]
        )
    ]
    for label, row in cells.items():
        lines.append(
            "  ".join(
                [f"{label:{label_width}}", *(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))]
            )
        )
    return "\n".join(lines)


def _short(label: str, length: int = _LONGEST_LABEL) -> str:
    """The end of a label that is too long for its place: names of files differ there."""
    return label if len(label) <= length else "..." + label[3 - length :]


def _running_mean(values: Array, length: int) -> Array:
    return np.convolve(values, np.full(length, 1 / length), mode="valid")


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def _percent(change: float | None) -> str:
    return "-" if change is None else f"{100 * change:+.1f}%"
