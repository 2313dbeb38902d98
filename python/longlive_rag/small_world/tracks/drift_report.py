"""What the tracks of creatures say: tables, pairs of policies, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_rag import figures
from longlive_rag.intervals import crossed_interval
from longlive_rag.small_world import creatures
from longlive_rag.small_world.tracks.track import Cell, Track, Values

PAIRS = (
    ("sliding_window", "latest_query"),
    ("latest_query", "retrieval"),
    ("newest_copy", "retrieval"),
    ("newest_copy", "oracle"),
    ("retrieval", "random_copy"),
    ("retrieval", "oldest_alike"),
    ("retrieval", "oracle"),
    ("oldest_alike", "oracle"),
)
"""What is compared: the first minus the second policy."""
DRAWN_VISITS = 6  # pictures of a creature in a row


def summary(values: Values) -> dict[str, Any]:
    """What the JSON says of a policy in one setting; `values` [trainings, videos, ...] of `DriftTrack.measure`.

    `error`: of the last visit, on a scale where chance is about .29, less what the reading itself errs on true frames
    is `excess`; `slope`: of the error per visit, from the first return on; each with its 95% interval over videos and
    trainings.
    """
    error = values["error"]
    visits = np.arange(error.shape[2])
    facts: dict[str, Any] = {
        "error": interval(error[:, :, -1]),
        "excess": interval(error[:, :, -1] - error[:, :, 0]),
        "chance": round(float(values["chance"].mean()), 4),
        "error_by_visit": rounded(error.mean(axis=(0, 1))),
        "error_by_training": rounded(error[:, :, -1].mean(axis=1)),
        "error_of_attributes": dict(
            zip(creatures.ATTRIBUTES, rounded(values["error_of_attributes"].mean(axis=(0, 1))), strict=True)
        ),
        "psnr_by_visit": rounded(-10 * np.log10(values["square_error"].mean(axis=(0, 1))[1:]), 2),
        "videos": error.shape[1],
        "trainings": error.shape[0],
    }
    if len(visits) > 2:
        slope = np.polyfit(visits[1:], error[:, :, 1:].reshape(-1, len(visits) - 1).T, 1)[0]
        facts["slope"] = interval(slope.reshape(error.shape[:2]), digits=5)
    return facts


def interval(values: np.ndarray, digits: int = 4) -> dict[str, float]:
    """Mean of [trainings, videos] with its 95% interval over both."""
    low, high = crossed_interval(values)
    numbers = {"mean": values.mean(), "low": low, "high": high}
    return {name: round(float(value), digits) for name, value in numbers.items()}


def rounded(values: np.ndarray, digits: int = 4) -> list[float]:
    return [round(float(value), digits) for value in values]


def pairs(track: Track, cells: Mapping[str, Values]) -> dict[str, Any]:
    """Differences of the last visit's error on the same videos, of the trainings that have both policies."""
    facts: dict[str, Any] = {}
    for setting in track.settings:
        for first, second in PAIRS:
            differences = []
            for training in range(track.trainings):
                both = [cells.get(Cell(track.name, name, setting, training).key) for name in (first, second)]
                if both[0] is not None and both[1] is not None:
                    differences.append(both[0]["error"][:, -1] - both[1]["error"][:, -1])
            if differences:
                facts.setdefault(setting, {})[f"{first} - {second}"] = interval(np.stack(differences))
    return facts


def table(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """The summaries as text."""
    rows = [f"{'error of the last visit':34}  {'first lap given':>22}  {'PSNR':>5}  {'first lap generated':>22}"]
    for facts in policies.values():
        cells = [_cell(facts.get("given")), _cell(facts.get("generated"))]
        psnr = f"{facts['given']['psnr_by_visit'][-1]:.1f}" if "given" in facts else "-"
        rows.append(f"{facts['label']:34}  {cells[0]:>22}  {psnr:>5}  {cells[1]:>22}")
    given = [facts["given"] for facts in policies.values() if "given" in facts]
    if given:
        rows.append(f"{'reading of a true frame':34}  {given[0]['error_by_visit'][0]:>22.3f}")
        rows.append(f"{'chance':34}  {np.mean([each['chance'] for each in given]):>22.3f}")
    return "\n".join(rows)


def _cell(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "-"
    value = facts["error"]
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def draw(track: Track, path: Path, facts: Mapping[str, Any], pictures: Mapping[str, np.ndarray]) -> None:
    """The error by visit, one line a policy, and the same creature at each of its returns."""
    policies = {name: each for name, each in facts["policies"].items() if "given" in each}
    strips = {name: pictures[key] for name in policies if (key := Cell(track.name, name, "given", 0).key) in pictures}
    figure = figures.figure(14 if strips else 8, 6.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1)) if strips else (figure.subplots(), None)
    figure.suptitle(track.question)
    visits = np.arange(len(next(iter(policies.values()))["given"]["error_by_visit"]))
    for index, (name, each) in enumerate(policies.items()):
        oracle = each["label"].startswith("oracle")
        dashes, width = "--" if oracle else "-", 2.5 if name == "oldest_alike" else 1.4
        curve = each["given"]["error_by_visit"]
        left.plot(
            visits[1:], curve[1:], dashes, label=each["label"], color=f"C{index % 10}", marker=".", linewidth=width
        )
    given = [each["given"] for each in policies.values()]
    floor, chance = given[0]["error_by_visit"][0], float(np.mean([each["chance"] for each in given]))
    for height, words in ((floor, "reading of a true frame"), (chance, "another creature")):
        left.axhline(height, color="black", linewidth=0.8, linestyle=":")
        left.text(visits[-1], height, words, ha="right", va="bottom", fontsize=8)
    left.set_yscale("log")
    left.set_xlabel("return to the place")
    left.set_ylabel("error of the attributes (0: the same creature)")
    left.legend(fontsize=8)
    left.grid(alpha=0.25)
    if right is not None:
        shown = np.unique(np.linspace(0, len(visits) - 1, DRAWN_VISITS).round().astype(int))
        rows = [np.concatenate(list(strip[shown]), axis=1) for strip in strips.values()]
        right.imshow(np.concatenate(rows), interpolation="nearest")
        side = next(iter(strips.values())).shape[1]
        right.set_yticks(
            np.arange(len(rows)) * side + side / 2, [policies[name]["label"] for name in strips], fontsize=8
        )
        right.set_xticks(np.arange(len(shown)) * side + side / 2, ["first visit", *map(str, shown[1:])], fontsize=8)
        right.set_title("one creature of the first video, at its returns", fontsize=10)
    figures.save(figure, path, dpi=120)
