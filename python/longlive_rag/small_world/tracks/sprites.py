"""The tracks `cuts` and `pans`: who of the codebook comes back? The world and the figures of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from longlive_rag import figures
from longlive_rag.intervals import bootstrap_interval
from longlive_rag.small_world import measure, report, world
from longlive_rag.small_world.backbone import load_backbone, load_codec, load_encoder
from longlive_rag.small_world.policies import POLICIES
from longlive_rag.small_world.report import Setting
from longlive_rag.small_world.tracks.cells import paired
from longlive_rag.small_world.tracks.track import Models, Outcome, Size, Track, Values

PAIRS = (("oracle", "retrieval"), ("oldest_alike", "retrieval"))


class SpriteTrack(Track):
    """One of the two walks of the demo's world."""

    size, quick = Size(laps=4, videos=32), Size(laps=2, videos=3)
    policies = POLICIES

    def __init__(self, name: str, question: str) -> None:
        self.name, self.question = name, question

    def walk(self, laps: int) -> world.Walk:
        return world.walk(self.name, world.lap_frames(self.name, laps))

    def models(self, training: int) -> Models:
        return _bundled()

    def draw(self, seed: int, videos: int) -> np.ndarray:
        return world.draw_cast(np.random.default_rng(seed), videos)

    def render(self, walk: world.Walk, frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return world.render(walk.views[frames], walk.phases[frames], truth)

    def measure(self, walk: world.Walk, truth: np.ndarray, given: bool, frames: np.ndarray) -> Outcome:
        first, now, error = measure.answers(walk, frames)
        if given:
            first = truth[:, [event.spot for event in measure.revisits(walk)]]
        return Outcome({"truth": first, "now": now, "error": error})

    def summarise(self, walk: world.Walk, cells: Mapping[Setting, Values]) -> dict[str, Any]:
        scores = {
            setting: measure.score(*(values[name][0] for name in ("truth", "now", "error")))
            for setting, values in cells.items()
        }
        return report.entry(walk, scores)

    def compare(self, walk: world.Walk, cells: Mapping[str, Values]) -> dict[str, Any]:
        """How much more of the inhabitants the first of two policies keeps, with its interval."""
        facts: dict[str, Any] = {}
        for first, second in PAIRS:
            pair = facts.setdefault(f"{first}_less_{second}", {})
            for setting in self.settings:
                for both in paired(self, cells, setting, first, second):
                    one, other = ((each["now"] == each["truth"]).mean(axis=1) for each in both)
                    low, high = bootstrap_interval(one - other)
                    numbers = {"mean": (one - other).mean(), "low": low, "high": high}
                    pair[setting] = {name: round(float(value), 4) for name, value in numbers.items()}
        return facts

    def headline(self, policies: Mapping[str, Mapping[str, Any]]) -> str:
        return report.table(policies)

    def draw_picture(
        self, path: Path, facts: Mapping[str, Any], cells: Mapping[str, Values], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """Bars with intervals, first lap given and generated."""
        policies = facts["policies"]
        figure = figures.figure(8, 4.6)
        axis = figure.subplots()
        rows = np.arange(len(policies))[::-1]
        for offset, key, colour, label in (
            (0.19, "identity_accuracy", "#3b6fb6", "first lap given"),
            (-0.19, "identity_accuracy_generated", "#e0913a", "first lap generated"),
        ):
            shown = [(row, policy[key]) for row, policy in zip(rows, policies.values(), strict=True) if key in policy]
            if not shown:
                continue
            at, values = np.array([row for row, _ in shown]) + offset, [value for _, value in shown]
            reach = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
            axis.barh(at, [v["mean"] for v in values], 0.36, xerr=reach, color=colour, label=label)
            axis.scatter([v["chance"] for v in values], at, marker="|", color="black", s=60, zorder=3)
        axis.set_yticks(rows, [policy["label"] for policy in policies.values()])
        axis.set_xlim(0, 1.02)
        axis.set_title(self.question, fontsize=11)
        axis.set_xlabel("share of inhabitants that are still themselves when they come back (black bar: chance)")
        axis.legend(loc="lower right", fontsize=9)
        figures.save(figure, path, dpi=120)


@cache
def _bundled() -> Models:
    return Models(load_backbone(), load_codec(), load_encoder())


CUTS = SpriteTrack("cuts", "The camera cuts between four places: who is there when it comes back?")
PANS = SpriteTrack("pans", "The camera glides over four places and back: who is there when it returns?")
