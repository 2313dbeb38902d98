"""What the tracks of creatures say: tables, pairs of policies, pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_rag import figures
from longlive_rag.small_world import creatures
from longlive_rag.small_world.tracks.cells import interval, paired, rounded
from longlive_rag.small_world.tracks.track import Cell, Track, Values

LEAST_ERROR = 1e-7  # 70 dB: equal pictures have no PSNR

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
COPIED = [creatures.ATTRIBUTES.index(name) for name in ("hue", "size", "ear length")]
"""What a copy keeps. The other attributes are near chance after the first copy already, with the oracle too (tuning
seed, first training), so that they cannot drift: they only blur the mean."""


def summary(values: Values) -> dict[str, Any]:
    """What the JSON says of a policy in one setting; `values` [trainings, videos, ...] of `DriftTrack.measure`.

    `error`: of the last visit, over all attributes, and `copied_error` over those that copies keep; what is more than
    the reading itself errs on true frames is `excess`; `slope`: of the error per visit, from the first return on; each
    with its 95% interval over videos and trainings. `psnr`: of the last visit against the first, in dB.
    """
    attributes = values["error_of_attributes"].mean(axis=(0, 1))
    facts: dict[str, Any] = {}
    for prefix, chosen in (("", slice(None)), ("copied_", COPIED)):
        error = values["error_of_attributes"][..., chosen].mean(axis=-1)
        facts[f"{prefix}error"] = interval(error[:, :, -1])
        facts[f"{prefix}excess"] = interval(error[:, :, -1] - error[:, :, 0])
        facts[f"{prefix}chance"] = round(float(values["chance"][..., chosen].mean()), 4)
        facts[f"{prefix}error_by_visit"] = rounded(error.mean(axis=(0, 1)))
        facts[f"{prefix}error_by_training"] = rounded(error[:, :, -1].mean(axis=1))
        visits = np.arange(1, error.shape[2])
        if len(visits) > 1:
            slope = np.polyfit(visits, error[:, :, 1:].reshape(-1, len(visits)).T, 1)[0]
            facts[f"{prefix}slope"] = interval(slope.reshape(error.shape[:2]), digits=5)
    facts["error_of_attributes"] = {
        name: rounded(attributes[[0, 1, -1], index]) for index, name in enumerate(creatures.ATTRIBUTES)
    }
    facts["psnr"] = interval(decibels(values)[:, :, -1], digits=2)
    facts["psnr_by_visit"] = rounded(decibels(values).mean(axis=(0, 1)), 2)
    facts["on_beat_by_visit"] = rounded(values["on_beat"].mean(axis=(0, 1))[1:], 3)
    facts["videos"], facts["trainings"] = values["on_beat"].shape[1], values["on_beat"].shape[0]
    return facts


def decibels(values: Values) -> np.ndarray:
    """PSNR of each return against the first visit, [..., returns]."""
    found: np.ndarray = -10 * np.log10(np.maximum(values["square_error"][..., 1:], LEAST_ERROR))
    return found


def pairs(track: Track, cells: Mapping[str, Values]) -> dict[str, Any]:
    """Differences at the last visit on the same videos, of the trainings that have both policies: the error over all
    attributes, over those that copies keep, and the PSNR in dB."""
    measures: dict[str, Callable[[Values], np.ndarray]] = {
        "error": lambda values: values["error_of_attributes"][:, -1].mean(axis=-1),
        "copied_error": lambda values: values["error_of_attributes"][:, -1, COPIED].mean(axis=-1),
        "psnr": lambda values: decibels(values)[:, -1],
    }
    facts: dict[str, Any] = {}
    for setting in track.settings:
        for first, second in PAIRS:
            both = paired(track, cells, setting, first, second)
            if both:
                facts.setdefault(setting, {})[f"{first} - {second}"] = {
                    name: interval(np.stack([measure(one) - measure(other) for one, other in both]))
                    for name, measure in measures.items()
                }
    return facts


def table(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """The summaries as text."""
    rows = [
        f"{'the last visit':34}  {'first lap given: error':>22}  {'of what copies keep':>22}  {'PSNR':>5}  "
        f"{'generated: error':>22}"
    ]
    for facts in policies.values():
        given, generated = facts.get("given"), facts.get("generated")
        psnr = f"{given['psnr']['mean']:.1f}" if given else "-"
        rows.append(
            f"{facts['label']:34}  {_cell(given, 'error'):>22}  {_cell(given, 'copied_error'):>22}  {psnr:>5}  "
            f"{_cell(generated, 'error'):>22}"
        )
    given = [facts["given"] for facts in policies.values() if "given" in facts]
    if given:
        floor, copied_floor = (given[0][f"{prefix}error_by_visit"][0] for prefix in ("", "copied_"))
        rows.append(f"{'reading of a true frame':34}  {floor:>22.3f}  {copied_floor:>22.3f}")
        chance, copied_chance = (np.mean([each[f"{prefix}chance"] for each in given]) for prefix in ("", "copied_"))
        rows.append(f"{'chance':34}  {chance:>22.3f}  {copied_chance:>22.3f}")
    return "\n".join(rows)


def _cell(facts: Mapping[str, Any] | None, name: str) -> str:
    if facts is None:
        return "-"
    value = facts[name]
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def draw(track: Track, path: Path, facts: Mapping[str, Any], pictures: Mapping[str, np.ndarray]) -> None:
    """Error and PSNR by visit, one line a policy, and the same creature at each of its returns."""
    policies = {name: each for name, each in facts["policies"].items() if "given" in each}
    if not policies:
        return
    strips = {name: pictures[key] for name in policies if (key := Cell(track.name, name, "given", 0).key) in pictures}
    figure = figures.figure(14 if strips else 8, 8)
    grid = figure.add_gridspec(2, 2 if strips else 1, width_ratios=(1.15, 1) if strips else (1,))
    upper, lower = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    given = [each["given"] for each in policies.values()]
    counts = sorted({each["trainings"] for each in given})
    trainings = f"trainings: {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")
    figure.suptitle(f"{track.question}\n{facts['laps']} laps, {facts['videos']} videos, {trainings}")
    returns = np.arange(1, len(given[0]["psnr_by_visit"]) + 1)
    for index, (name, each) in enumerate(policies.items()):
        style: dict[str, Any] = {
            "linestyle": "--" if each["label"].startswith("oracle") else "-",
            "linewidth": 2.5 if name == "oldest_alike" else 1.4,
            "color": f"C{index % 10}" if index < 10 else "black",
            "marker": ".",
        }
        upper.plot(returns, each["given"]["copied_error_by_visit"][1:], label=each["label"], **style)
        lower.plot(returns, each["given"]["psnr_by_visit"], **style)
    floor = given[0]["copied_error_by_visit"][0]
    chance = float(np.mean([each["copied_chance"] for each in given]))
    for height, words in ((floor, "reading of a true frame"), (chance, "another creature")):
        upper.axhline(height, color="black", linewidth=0.8, linestyle=":")
        upper.text(returns[-1], height, words, ha="right", va="bottom", fontsize=8)
    upper.set_ylim(bottom=0)
    upper.set_ylabel("error of hue, size and ears\n(0: the same creature)")
    upper.legend(fontsize=7, ncols=2)
    lower.set_ylabel("likeness to the first visit (PSNR, dB)")
    lower.set_xlabel("return to the place")
    for axis in (upper, lower):
        axis.grid(alpha=0.25)
        axis.set_xticks(returns[:: 1 + len(returns) // 16])
    if strips:
        right = figure.add_subplot(grid[:, 1])
        count = len(next(iter(strips.values())))
        shown = np.unique(np.linspace(0, count - 1, DRAWN_VISITS).round().astype(int))
        rows = [np.concatenate(list(strip[shown]), axis=1) for strip in strips.values()]
        right.imshow(np.concatenate(rows), interpolation="nearest")
        side = next(iter(strips.values())).shape[1]
        right.set_yticks(
            np.arange(len(rows)) * side + side / 2, [policies[name]["label"] for name in strips], fontsize=8
        )
        right.set_xticks(np.arange(len(shown)) * side + side / 2, ["first visit", *map(str, shown[1:])], fontsize=8)
        right.set_title("one creature of the first video, at its returns", fontsize=10)
    figures.save(figure, path, dpi=100)
