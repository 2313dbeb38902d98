"""What `night` says: tables, pairs of policies, the picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_rag import figures
from longlive_rag.small_world import light, measure, world
from longlive_rag.small_world.tracks.cells import interval, paired, rounded
from longlive_rag.small_world.tracks.track import Cell, Track, Values

PAIRS = (
    ("random", "latest_query"),
    ("retrieval", "latest_query"),
    ("retrieval", "random"),
    ("grid", "average_pool"),
    ("reconstruction", "grid"),
    ("delta", "reconstruction"),
    ("smoothing", "reconstruction"),
    ("retrieval", "reconstruction"),
    ("layout", "grid"),
    ("layout", "retrieval"),
    ("oracle", "layout"),
)
"""What is compared: the first minus the second policy."""
DRAWN = ("average_pool", "retrieval", "layout", "oracle")
"""Policies whose frames are in the picture."""


def hours(frames: np.ndarray) -> list[str]:
    """The name of the nearest entry of `light.DAY` for each frame of a walk."""
    return [
        light.DAY[round(frame % light.CYCLE * len(light.DAY) / light.CYCLE) % len(light.DAY)].name for frame in frames
    ]


def summary(walk: world.Walk, values: Values, returned: np.ndarray, arrived: np.ndarray) -> dict[str, Any]:
    """What the JSON says of a policy in one setting; `values` [trainings, videos, ...] of `NightTrack.measure`.

    `kept`: share of inhabitants that are still themselves when they come back; `found`: share of right frames among
    those retrieved for it; each with its 95% interval over videos, and by the hour of the return.

    Args:
        returned: frames of the returns, [returns].
        arrived: frames in which anybody returns, [arrivals].
    """
    kept = values["now"] == values["truth"]
    scores = [measure.score(*(values[name][i] for name in ("truth", "now", "error"))) for i in range(len(kept))]
    facts: dict[str, Any] = {
        "kept": interval(kept.mean(axis=2)),
        "chance": round(float(np.mean([score.chance for score in scores])), 4),
        "kept_by_hour": by_hour(kept, returned),
        "kept_by_lap": rounded(
            np.array([kept[:, :, returned // walk.lap == lap].mean() for lap in np.unique(returned // walk.lap)])
        ),
        "sprite_error": round(float(values["error"].mean()), 4),
        "videos": kept.shape[1],
    }
    if "found" in values:
        facts["found"] = interval(values["found"].mean(axis=2))
        facts["found_by_hour"] = by_hour(values["found"], arrived)
    return facts


def by_hour(values: np.ndarray, frames: np.ndarray) -> dict[str, float]:
    """Means of values [..., frames] by the hour of their frame, in the order of the day."""
    names = np.array(hours(frames))
    return {
        hour.name: round(float(values[..., names == hour.name].mean()), 4) for hour in light.DAY if hour.name in names
    }


def pairs(track: Track, cells: Mapping[str, Values]) -> dict[str, Any]:
    """Differences on the same videos, of what is kept and of what is found."""
    facts: dict[str, Any] = {}
    for setting in track.settings:
        for first, second in PAIRS:
            both = paired(track, cells, setting, first, second)
            if both:
                facts.setdefault(setting, {})[f"{first} - {second}"] = {
                    name: interval(np.stack([_means(one, name) - _means(other, name) for one, other in both]))
                    for name in ("kept", "found")
                }
    return facts


def _means(values: Values, name: str) -> np.ndarray:
    """Of each video."""
    return (values["now"] == values["truth"] if name == "kept" else values["found"]).mean(axis=1)


def table(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """The summaries as text."""
    columns = (("given", "kept"), ("generated", "kept"), ("given", "found"))
    rows = [f"{'':48}  {'kept, first lap given':>22}  {'kept, generated':>22}  {'right frames, given':>22}"]
    for facts in policies.values():
        cells = [_cell(facts.get(setting, {}).get(name)) for setting, name in columns]
        rows.append(f"{facts['label']:48}  " + "  ".join(f"{cell:>22}" for cell in cells))
    chance = [
        f"{np.mean([f[s]['chance'] for f in policies.values() if s in f]):.3f}"
        if any(s in f for f in policies.values())
        else "-"
        for s in ("given", "generated")
    ]
    rows.append(f"{'chance':48}  {chance[0]:>22}  {chance[1]:>22}")
    return "\n".join(rows)


def _cell(value: Mapping[str, float] | None) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" if value else "-"


def draw(track: Track, path: Path, facts: Mapping[str, Any], pictures: Mapping[str, np.ndarray]) -> None:
    """One place at each of its visits under four policies; what every policy keeps; what each finds at which hour."""
    policies = {name: each for name, each in facts["policies"].items() if "given" in each}
    strips = {name: pictures[key] for name in DRAWN if (key := Cell(track.name, name, "given", 0).key) in pictures}
    figure = figures.figure(14, 11 if strips else 6)
    figure.suptitle(track.question)
    grid = figure.add_gridspec(2 if strips else 1, 1, height_ratios=(1.25, 1) if strips else None)
    if strips:
        _draw_strips(figure.add_subplot(grid[0]), track, facts, policies, strips)
    below = grid[-1].subgridspec(1, 2, wspace=0.06)
    bars, heat = (figure.add_subplot(below[column]) for column in range(2))
    rows = np.arange(len(policies))
    values = [each["given"]["kept"] for each in policies.values()]
    reach = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
    bars.barh(rows, [v["mean"] for v in values], 0.6, xerr=reach, color="#3b6fb6")
    bars.axvline(np.mean([each["given"]["chance"] for each in policies.values()]), color="black", linestyle=":")
    bars.set_yticks(rows, [each["label"] for each in policies.values()], fontsize=8)
    bars.invert_yaxis()
    bars.set_xlim(0, 1.02)
    bars.set_title("inhabitants that are still themselves when they come back (dotted: chance)", fontsize=9)
    names = list(next(iter(policies.values()))["given"]["kept_by_hour"])
    found = np.array(
        [[each["given"].get("found_by_hour", {}).get(n, np.nan) for n in names] for each in policies.values()]
    )
    heat.imshow(found, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for row, column in zip(*np.nonzero(~np.isnan(found)), strict=True):
        heat.text(column, row, f"{found[row, column]:.2f}", ha="center", va="center", fontsize=8)
    heat.set_xticks(range(len(names)), names, fontsize=8)
    heat.set_yticks([])
    heat.set_title("frames of the right place among those retrieved, by the hour of the return", fontsize=9)
    figures.save(figure, path, dpi=110)


def _draw_strips(
    axis: Any, track: Track, facts: Mapping[str, Any], policies: Mapping[str, Any], strips: Mapping[str, np.ndarray]
) -> None:
    walk = track.walk(facts["laps"])
    side, visits = world.SIZE, len(next(iter(strips.values())))
    axis.imshow(
        np.concatenate([np.concatenate(list(strip), axis=1) for strip in strips.values()]), interpolation="nearest"
    )
    place = np.flatnonzero(walk.views == world.VIEWS_PER_PLACE)[:: world.DWELL]
    when = [f"{'first visit' if not visit else f'return {visit}'}: {name}" for visit, name in enumerate(hours(place))]
    axis.set_xticks(np.arange(visits) * side + side / 2, when, fontsize=9)
    axis.xaxis.tick_top()
    axis.set_yticks(np.arange(len(strips)) * side + side / 2, [policies[name]["label"] for name in strips], fontsize=9)
    axis.set_title(
        "the same place in one video; green line: still the one who lives there, red: somebody else", fontsize=9
    )
