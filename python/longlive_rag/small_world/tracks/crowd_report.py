"""What the track `crowd` says: tables, pairs of policies, the picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_rag import figures
from longlive_rag.small_world import crowd
from longlive_rag.small_world.report import KEPT, LOST
from longlive_rag.small_world.tracks.cells import interval, paired, rounded
from longlive_rag.small_world.tracks.track import Cell, Track, Values

PAIRS = (
    ("sliding_window", "random"),
    ("sliding_window", "latest_query"),
    ("random", "latest_query"),
    ("latest_query", "retrieval"),
    ("retrieval", "oracle"),
)
"""What is compared: the second less the first policy."""
ENDS = ("arrival", "end")  # of a visit


def summary(values: Values) -> dict[str, Any]:
    """What the JSON says of a policy in one setting; `values` [trainings, videos, frames of a visit] of
    `CrowdTrack.measure` and `retrieval`.

    `arrival` and `end`: guests that are themselves in the first and the last frame of a return, `twin`: those that are
    a twin's at the end, `precision`: of the frames retrieved on arrival those that show this place, `recall`: arrivals
    that got at least one; each with its 95% interval over videos and trainings. `_by_frame`: of the visit.
    """
    right = values["right"]
    facts: dict[str, Any] = {
        "arrival": interval(right[..., 0]),
        "end": interval(right[..., -1]),
        "twin": interval(values["twin"][..., -1]),
    }
    for name in ("precision", "recall"):
        if name in values:
            facts[name] = interval(values[name][..., 0])
    for name in ("right", "twin", "precision", "recall", "twin_retrieved"):
        if name in values:
            facts[f"{name}_by_frame"] = rounded(values[name].mean(axis=(0, 1)))
    for name in ("chance", "host"):
        facts[name] = round(float(values[name].mean()), 4)
    return {**facts, "videos": right.shape[1], "trainings": right.shape[0]}


def pairs(track: Track, cells: Mapping[str, Values]) -> dict[str, Any]:
    """How much more of the guests the second policy keeps on the same videos, of the trainings that have both."""
    facts: dict[str, Any] = {}
    for setting in track.settings:
        for first, second in PAIRS:
            both = paired(track, cells, setting, first, second)
            if both:
                more = np.stack([other["right"] - one["right"] for one, other in both])
                facts.setdefault(setting, {})[f"{second} - {first}"] = {
                    "arrival": interval(more[..., 0]),
                    "end": interval(more[..., -1]),
                }
    return facts


def table(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """The summaries as text."""
    rows = [
        f"{'guests still themselves':30}  {'on arrival':>18}  {'end of the visit':>18}  {'a twin':>6}  {'found':>6}  "
        f"{'precision':>9}"
    ]
    measured = [each for each in policies.values() if "given" in each]
    for each in measured:
        given = each["given"]
        ends = [f"{given[name]['mean']:.2f} [{given[name]['low']:.2f}, {given[name]['high']:.2f}]" for name in ENDS]
        means = [f"{given[name]['mean']:.2f}" if name in given else "-" for name in ("twin", "recall", "precision")]
        rows.append(f"{each['label']:30}  {ends[0]:>18}  {ends[1]:>18}  {means[0]:>6}  {means[1]:>6}  {means[2]:>9}")
    if measured:
        rows.append(f"{'chance':30}  {np.mean([each['given']['chance'] for each in measured]):>18.2f}")
    return "\n".join(rows)


def draw(
    track: Track, path: Path, facts: Mapping[str, Any], pictures: Mapping[str, np.ndarray], places: np.ndarray
) -> None:
    """Who stands there: the right guest, a twin's or another; and the last visits to four twins, guests underlined.

    pictures: of a cell the first visits to `places`, then the last ones.
    """
    policies = {name: each for name, each in facts["policies"].items() if "given" in each}
    strips = {name: pictures[key] for name in policies if (key := Cell(track.name, name, "given", 0).key) in pictures}
    figure = figures.figure(14 if strips else 8, 7.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1)) if strips else (figure.subplots(), None)
    figure.suptitle(track.question)
    rows = np.arange(len(policies))[::-1]
    for row, each in zip(rows, policies.values(), strict=True):
        for name, frame, offset, alpha in (("arrival", 0, 0.2, 0.55), ("end", -1, -0.2, 1.0)):
            value, twin = each["given"][name], each["given"]["twin_by_frame"][frame]
            reach = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
            other = 1 - value["mean"] - twin
            left.barh(row + offset, value["mean"], 0.36, color="#3b6fb6", alpha=alpha)
            left.barh(row + offset, twin, 0.36, left=value["mean"], color="#e0913a", alpha=alpha)
            left.barh(row + offset, other, 0.36, left=value["mean"] + twin, color="#cccccc", alpha=alpha)
            left.errorbar(value["mean"], row + offset, xerr=reach, color="black", capsize=2, linewidth=1.2)
        left.plot([each["given"]["chance"]] * 2, row + np.array([-0.38, 0.38]), color="black")
    left.set_yticks(rows, [each["label"] for each in policies.values()])
    left.set_xlim(0, 1)
    left.set_xlabel(
        "who stands there at the return: the right guest (blue), a twin's (orange), another (grey)\n"
        "upper, paler bar: on arrival; lower: at the end of the visit; black line: chance"
    )
    if right is not None:
        first = next(iter(strips.values()))[: len(places)]
        truth = crowd.decode(first, places)
        shown = [np.concatenate(list(first), axis=1)]
        for strip in strips.values():
            last = strip[len(places) :]
            shown.append(np.concatenate(list(_underlined(last, crowd.decode(last, places), truth, places)), axis=1))
        right.imshow(np.concatenate(shown), interpolation="nearest")
        side = first.shape[1]
        right.set_yticks(
            np.arange(len(shown)) * side + side / 2,
            ["first visit", *(policies[name]["label"] for name in strips)],
            fontsize=8,
        )
        right.set_xticks([])
        right.set_title(
            "four twins of one video at the last visit\n(guests underlined: green as at the first, red another)",
            fontsize=10,
        )
    figures.save(figure, path, dpi=120)


def _underlined(frames: np.ndarray, found: np.ndarray, truth: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Frames [N, 64, 64, 3] whose guests are underlined, green where `found` [N, spots] is as in `truth`."""
    marked = frames.copy()
    for picture, now, then, spots in zip(marked, found, truth, crowd.corners(places), strict=True):
        for guest in crowd.GUESTS:
            x, y = spots[guest]
            picture[y + 14 : y + 16, x + 1 : x + 15] = KEPT if now[guest] == then[guest] else LOST
    return marked
