"""The track `crowd`: does memory find the right one of many places that look alike?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_rag.selection import OracleSelection
from longlive_rag.small_world import crowd, world
from longlive_rag.small_world.backbone import ASSETS, load_backbone, load_codec, load_encoder
from longlive_rag.small_world.measure import Recall
from longlive_rag.small_world.policies import POLICIES, Policy, memory_config
from longlive_rag.small_world.report import Setting
from longlive_rag.small_world.tracks import crowd_report
from longlive_rag.small_world.tracks.track import Models, Outcome, Size, Track, Values

DWELL = 4  # frames of a visit, half a beat of the inhabitants' motion
LAP = DWELL * crowd.PLACES
ROUTE_SEED = 0
SHOWN_LANDSCAPE = 1  # whose four places are in the picture


def same_place(walk: world.Walk, seed: int) -> OracleSelection:
    """The oracle: frames of this very place, those nearest in beat first, then the newest."""

    def answer(start: int, batch: int) -> list[list[int]]:
        here = np.flatnonzero(walk.views[:start] == walk.views[start])
        beat = np.abs(walk.phases[here] - walk.phases[start])
        beat = np.minimum(beat, world.PHASES - beat)
        return [[int(frame) for frame in here[np.lexsort((-here, beat))]]] * batch

    return OracleSelection(answer)


CROWD_POLICIES = {name: policy for name, policy in POLICIES.items() if name != "oldest_alike"} | {
    "oracle": Policy("oracle", memory_config(), same_place)
}


class CrowdTrack(Track):
    """Cuts between sixteen places, in another order at each lap.

    `Walk.views` holds the number of the place; the prompts are those of the places.
    """

    name = "crowd"
    question = "Sixteen places, four of each landscape: does memory know them apart?"
    size, quick = Size(laps=2, videos=8), Size(laps=2, videos=2)
    policies = CROWD_POLICIES
    settings = ("given",)

    def walk(self, laps: int) -> world.Walk:
        """Every place once a lap, in another order each time.

        Each half of a lap has always the same places, so that about a lap lies between two visits. Two landscapes are
        visited at even times, two at odd ones: all visits to a place begin on the same beat, and so do those to its
        twins, so that the beat says nothing about the place.
        """
        generator = np.random.default_rng(ROUTE_SEED)
        evens, odds = np.split(np.arange(crowd.PLACES), 2)
        quarters = [np.split(generator.permutation(places), 2) for places in (evens, odds)]
        visits = []
        for _ in range(laps):
            for half in range(2):
                even, odd = (generator.permutation(halves[half]) for halves in quarters)
                visits.append(np.stack([even, odd], axis=1).ravel())
        time = np.arange(laps * LAP)
        return world.Walk(self.name, np.concatenate(visits).repeat(DWELL), time % world.PHASES, LAP)

    def models(self, training: int) -> Models:
        return Models(load_backbone(words=ASSETS / "crowd_words.safetensors"), load_codec(), load_encoder())

    def draw(self, seed: int, videos: int) -> np.ndarray:
        return crowd.draw_crowds(np.random.default_rng(seed), videos)

    def render(self, walk: world.Walk, frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return crowd.render(walk.views[frames], walk.phases[frames], truth)

    def measure(self, walk: world.Walk, truth: np.ndarray, given: bool, frames: np.ndarray) -> Outcome:
        """Who stands there at each frame of the returns, by frame of the visit [videos, DWELL]: the share of guests
        that are `right`, that are those of a `twin`, and of hosts that are right, as the prompt says; `chance`, of the
        guests of other videos.

        The place of the first frame, which the sink shows, is not judged.
        """
        found = np.stack([crowd.decode(video, walk.views) for video in frames])  # [videos, frames, spots]
        first = {place: time + DWELL - 1 for time, place in reversed([*enumerate(walk.views)]) if time % DWELL == 0}
        if not given:  # as on `cuts`: what the video's own first visit ended with
            truth = np.stack([found[:, first[place], :] for place in range(crowd.PLACES)], axis=1)
        times = np.arange(LAP, len(walk.views))
        times = times[walk.views[times] != walk.views[0]]
        place = walk.views[times]
        now, guests = found[:, times], list(crowd.GUESTS)
        right = now == truth[:, place]
        others = [place // crowd.TWINS * crowd.TWINS + (place + shift) % crowd.TWINS for shift in range(1, crowd.TWINS)]
        twin = np.stack([now == truth[:, other] for other in others]).any(axis=0) & ~right
        strangers = np.mean([now == np.roll(truth, shift, axis=0)[:, place] for shift in range(1, len(truth))], axis=0)
        answers = {"right": right, "twin": twin, "chance": strangers}
        values = {name: _by_frame(value[..., guests].mean(axis=-1)) for name, value in answers.items()}
        values["host"] = _by_frame(now[..., crowd.HOST] == place)
        ends = {view: time for time, view in enumerate(walk.views)}
        shown = range(SHOWN_LANDSCAPE * crowd.TWINS, (SHOWN_LANDSCAPE + 1) * crowd.TWINS)
        return Outcome(values, frames[0, [first[p] for p in shown] + [ends[p] for p in shown]])

    def retrieval(self, walk: world.Walk, recalls: list[Recall], videos: int) -> dict[str, np.ndarray]:
        """Also by frame of the visit [videos, DWELL], after the first lap: the share of retrieved frames that show this
        place (`precision`) or a twin (`twin_retrieved`), and of blocks that got at least one frame of this place
        (`recall`)."""
        counts = np.zeros((4, videos, DWELL))
        for recall in recalls:
            start = recall.block_start
            if start < walk.lap or walk.views[start] == walk.views[0]:
                continue
            for video, row in enumerate(recall.frames):
                place = walk.views[np.array(row, dtype=int)]
                here = place == walk.views[start]
                alike = place // crowd.TWINS == walk.views[start] // crowd.TWINS
                counts[:, video, start % DWELL] += here.mean(), (alike & ~here).mean(), here.any(), 1
        precision, twin, found, blocks = counts
        with np.errstate(invalid="ignore"):  # as in `Track.retrieval`
            by_frame = {"precision": precision / blocks, "twin_retrieved": twin / blocks, "recall": found / blocks}
        return {**super().retrieval(walk, recalls, videos), **by_frame}

    def summarise(self, walk: world.Walk, cells: Mapping[Setting, Values]) -> dict[str, Any]:
        return {setting: crowd_report.summary(values) for setting, values in cells.items()}

    def compare(self, walk: world.Walk, cells: Mapping[str, Values]) -> dict[str, Any]:
        return crowd_report.pairs(self, cells)

    def headline(self, policies: Mapping[str, Mapping[str, Any]]) -> str:
        return crowd_report.table(policies)

    def draw_picture(
        self, path: Path, facts: Mapping[str, Any], cells: Mapping[str, Values], pictures: Mapping[str, np.ndarray]
    ) -> None:
        shown = np.arange(crowd.TWINS) + SHOWN_LANDSCAPE * crowd.TWINS
        crowd_report.draw(self, path, facts, pictures, shown)


def _by_frame(values: np.ndarray) -> np.ndarray:
    """Mean over visits [videos, DWELL] of values [videos, visits * DWELL]."""
    return values.reshape(len(values), -1, DWELL).mean(axis=1)


CROWD = CrowdTrack()
