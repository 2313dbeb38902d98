"""What the track `crowd` says: tables, pairs of policies, the picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_rag import figures
from longlive_rag.small_world import crowd
from longlive_rag.small_world.report import KEPT, LOST
from longlive_rag.small_world.tracks.drift_report import interval, rounded
from longlive_rag.small_world.tracks.track import Cell, Track, Values

PAIRS = (
    ("sliding_window", "random"),
    ("sliding_window", "latest_query"),
    ("random", "latest_query"),
    ("latest_query", "retrieval"),
    ("retrieval", "oldest_alike"),
    ("retrieval", "oracle"),
)
"""What is compared: the second less the first policy."""


def summary(values: Values) -> dict[str, Any]:
    """What the JSON says of a policy in one setting; `values` [trainings, videos, frames of a visit] of
    `CrowdTrack.measure` and `retrieval`.

    `right`: guests that are themselves, over all frames of the returns, and `twin`: those that are a twin's, with their
    95% intervals over videos and trainings; `precision`: of the retrieved frames those that show this place, and
    `recall`: blocks that got at least one; `_by_frame`: of the visit.
    """
    facts: dict[str, Any] = {name: interval(values[name].mean(axis=2)) for name in ("right", "twin")}
    facts["chance"] = round(float(values["chance"].mean()), 4)
    facts["host"] = round(float(values["host"].mean()), 4)
    for name in ("precision", "recall", "twin_retrieved"):
        if name in values:
            facts[name] = interval(values[name].mean(axis=2))
    for name in ("right", "twin", "precision", "recall"):
        if name in values:
            facts[f"{name}_by_frame"] = rounded(values[name].mean(axis=(0, 1)))
    return {**facts, "videos": values["right"].shape[1], "trainings": values["right"].shape[0]}


def pairs(track: Track, cells: Mapping[str, Values]) -> dict[str, Any]:
    """How much more of the guests the second policy keeps on the same videos, of the trainings that have both."""
    facts: dict[str, Any] = {}
    for setting in track.settings:
        for first, second in PAIRS:
            differences = []
            for training in range(track.trainings):
                both = [cells.get(Cell(track.name, name, setting, training).key) for name in (first, second)]
                if both[0] is not None and both[1] is not None:
                    differences.append((both[1]["right"] - both[0]["right"]).mean(axis=1))
            if differences:
                facts.setdefault(setting, {})[f"{second} - {first}"] = interval(np.stack(differences))
    return facts


def table(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """The summaries as text."""
    heads = ("first lap given", "a twin's", "precision", "recall", "first lap generated")
    rows = [
        f"{'guests still themselves':34}  {heads[0]:>20}  {heads[1]:>8}  {heads[2]:>9}  {heads[3]:>6}  {heads[4]:>20}"
    ]
    for facts in policies.values():
        given = facts.get("given", {})
        twin, precision, recall = (
            f"{given[name]['mean']:.2f}" if name in given else "-" for name in ("twin", "precision", "recall")
        )
        cells = [_cell(facts.get(setting)) for setting in ("given", "generated")]
        rows.append(f"{facts['label']:34}  {cells[0]:>20}  {twin:>8}  {precision:>9}  {recall:>6}  {cells[1]:>20}")
    chances = [
        f"{np.mean(found):.2f}" if (found := [each[s]["chance"] for each in policies.values() if s in each]) else "-"
        for s in ("given", "generated")
    ]
    rows.append(f"{'chance':34}  {chances[0]:>20}  {'':>8}  {'':>9}  {'':>6}  {chances[1]:>20}")
    return "\n".join(rows)


def _cell(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "-"
    value = facts["right"]
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


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
        for setting, offset in (("given", 0.2), ("generated", -0.2)):
            if setting not in each:
                continue
            value, twin = each[setting]["right"], each[setting]["twin"]["mean"]
            alpha = 1.0 if setting == "given" else 0.55
            reach = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
            left.barh(row + offset, value["mean"], 0.36, color="#3b6fb6", alpha=alpha)
            left.barh(row + offset, twin, 0.36, left=value["mean"], color="#e0913a", alpha=alpha)
            other = 1 - value["mean"] - twin
            left.barh(row + offset, other, 0.36, left=value["mean"] + twin, color="#cccccc", alpha=alpha)
            left.errorbar(value["mean"], row + offset, xerr=reach, color="black", capsize=2, linewidth=1.2)
            left.plot([each[setting]["chance"]] * 2, row + offset + np.array([-0.18, 0.18]), color="black")
    left.set_yticks(rows, [each["label"] for each in policies.values()])
    left.set_xlim(0, 1)
    left.set_xlabel(
        "who stands there at the return: the right guest (blue), a twin's (orange), another (grey)\n"
        "upper bar: first lap given; lower, paler: generated; black bar: chance"
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
        right.set_title("four places of one video, first and last visit (red: another guest)", fontsize=10)
    figures.save(figure, path, dpi=120)


def _underlined(frames: np.ndarray, found: np.ndarray, truth: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Frames [N, 64, 64, 3] whose guests are underlined, green where `found` [N, spots] is as in `truth`."""
    marked = frames.copy()
    for picture, now, then, spots in zip(marked, found, truth, crowd.corners(places), strict=True):
        for guest in crowd.GUESTS:
            x, y = spots[guest]
            picture[y + 14 : y + 16, x + 1 : x + 15] = KEPT if now[guest] == then[guest] else LOST
    return marked
