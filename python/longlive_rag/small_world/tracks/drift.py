"""The tracks `drift` and `long`: do copies of copies stay what they were?

Creatures with eight continuous attributes (`creatures.py`) live in the places of `cuts`. No codebook pulls an error
back to the nearest right answer, so that what is copied from copies drifts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longlive_rag.selection import OracleSelection
from longlive_rag.small_world import creatures, world
from longlive_rag.small_world.backbone import ASSETS, load_backbone, load_codec, load_encoder
from longlive_rag.small_world.policies import POLICIES, Policy, memory_config
from longlive_rag.small_world.report import Setting
from longlive_rag.small_world.tracks import drift_report
from longlive_rag.small_world.tracks.track import Models, Outcome, Size, Track, Values

DWELL = (
    6  # frames of a visit; a lap of 24 is a multiple of the 8 phases, so that each return shows the first one's beat
)
LAP = DWELL * world.PLACES
SPOTS_PER_PLACE = len(world.SPOTS) // world.PLACES
FAR_PERIOD = 42 * LAP  # `long`: between two visits of the far places, 1,008 frames
SHOWN_PLACE, SHOWN_SPOT = 2, 1  # the creature in the picture


def copies(which: Literal["oldest", "newest", "random"]) -> Callable[[world.Walk, int], OracleSelection]:
    """Makes the oracle that knows the place and takes its frames of one earlier visit, those nearest in beat first."""

    def selection(walk: world.Walk, seed: int) -> OracleSelection:
        generator = np.random.default_rng(seed)

        def answer(start: int, batch: int) -> list[list[int]]:
            frames = np.arange(start)
            beat = np.abs(walk.phases[:start] - walk.phases[start])
            beat = np.minimum(beat, world.PHASES - beat)
            here = walk.views[:start] == walk.views[start]
            laps = np.unique(frames[here & (frames < start - start % DWELL)] // LAP)

            def of(lap: int) -> list[int]:
                found = frames[here & (frames // LAP == lap)]
                return [int(frame) for frame in found[np.argsort(beat[found], kind="stable")]]

            if not len(laps):
                return [[]] * batch
            if which == "random":
                return [of(int(generator.choice(laps))) for _ in range(batch)]
            return [of(int(laps[0] if which == "oldest" else laps[-1]))] * batch

        return OracleSelection(answer)

    return selection


DRIFT_POLICIES = {
    **{name: policy for name, policy in POLICIES.items() if name != "oracle"},
    "newest_copy": Policy("oracle: newest copy", memory_config(), copies("newest")),
    "random_copy": Policy("oracle: copy of any lap", memory_config(), copies("random")),
    "oracle": Policy("oracle: oldest copy", memory_config(), copies("oldest")),
}
LONG_POLICIES = {
    name: DRIFT_POLICIES[name]
    for name in ("sliding_window", "random", "latest_query", "retrieval", "oldest_alike", "oracle")
}


def bundled_backbones() -> list[Path]:
    """Weights of every training that comes with the package."""
    return sorted(ASSETS.glob("drift_backbone_*.safetensors"))


class DriftTrack(Track):
    """Cuts between four places; errors of the returning creatures' attributes, by lap.

    Args:
        period: frames from one judged visit of a place to the next, a multiple of `LAP`; in between the camera cuts
            between the other places only.
        judged: places that are judged. The first is not among them: the sink shows it.
        trainings: bundled backbones that are measured.
        brief: policies of a brief measurement; default all.
    """

    def __init__(
        self,
        name: str,
        question: str,
        *,
        size: Size,
        quick: Size,
        policies: Mapping[str, Policy],
        settings: tuple[Setting, ...],
        period: int,
        judged: range,
        trainings: int,
        brief: tuple[str, ...] = (),
    ) -> None:
        self.name, self.question, self.size, self.quick = name, question, size, quick
        self.policies, self.settings, self.period, self.judged = policies, settings, period, judged
        self.trainings, self.brief = trainings, brief

    def walk(self, laps: int) -> world.Walk:
        time = np.arange((laps - 1) * self.period + LAP)
        place: np.ndarray = time // DWELL % world.PLACES
        between = time % self.period >= LAP
        place = np.where(between & np.isin(place, self.judged), place % self.judged.start, place)
        return world.Walk(self.name, place * world.VIEWS_PER_PLACE, time % world.PHASES, LAP)

    def models(self, training: int) -> Models:
        backbone = load_backbone(bundled_backbones()[training])
        return Models(backbone, load_codec(ASSETS / "drift_codec.safetensors"), load_encoder())

    def draw(self, seed: int, videos: int) -> np.ndarray:
        return creatures.draw_creatures(np.random.default_rng(seed), videos)

    def render(self, walk: world.Walk, frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return creatures.render(walk.views[frames], walk.phases[frames], truth)

    def measure(self, walk: world.Walk, truth: np.ndarray, given: bool, frames: np.ndarray) -> Outcome:
        """By the number of the visit, 0 the first: how far the creatures' attributes are from those of the first visit,
        at the first frame; and the mean square error of their cells against the first visit's, in all of its frames.

        The reading of a true frame errs too: visit 0 of a given lap holds this floor. A video's clock may slip by a
        beat, and everybody then stands elsewhere without having changed. So the frames are compared at the shift of
        beats that fits best; `on_beat` says how often that is none.
        """
        visits = 1 + (len(walk.views) - LAP) // self.period
        arrivals = np.array(self.judged) * DWELL
        times = np.arange(visits)[:, None] * self.period + arrivals  # [visits, judged places]
        crops = self._cells(frames, times)  # [videos, visits, places, spots, CELL, CELL, 3]
        read = self._read(crops)
        if given:
            places = truth.reshape(len(truth), world.PLACES, SPOTS_PER_PLACE, -1)
            reference = places[:, self.judged.start : self.judged.stop]
        else:  # as on `cuts`: what the video's own first visit ended with
            reference = self._read(self._cells(frames, arrivals[None] + DWELL - 1))[:, 0]
        error = creatures.attribute_error(read, reference[:, None])
        stranger = creatures.attribute_error(read[:, -1], np.roll(reference, 1, axis=0))
        square, on_beat = self._compared(frames, times)
        values = {
            "error_of_attributes": error.mean(axis=(2, 3)),  # [videos, visits, attributes]
            "chance": stranger.mean(axis=(1, 2)),  # [videos, attributes]
            "square_error": square,
            "on_beat": on_beat,
        }
        return Outcome(values, crops[0, :, SHOWN_PLACE - self.judged.start, SHOWN_SPOT])

    def _compared(self, frames: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean square error of the visits that begin at times [N, places] against the first of them, at the shift of
        beats that fits best, and the share of places where that is none: both [videos, N]."""
        whole = np.stack([self._cells(frames, times + beat) for beat in range(DWELL)], axis=3).astype(np.float32) / 255
        errors = []  # of each shift [videos, N, places]
        for shift in range(world.PHASES):
            later = (np.arange(DWELL) + shift) % world.PHASES
            shown = later < DWELL  # beats that the first visit showed: at least four of the six
            apart = whole[:, :, :, shown] - whole[:, :1][:, :, :, later[shown]]
            errors.append(np.square(apart).mean(axis=(3, 4, 5, 6, 7)))
        best = np.argmin(errors, axis=0)
        return np.min(errors, axis=0).mean(axis=2), (best == 0).mean(axis=2)

    def _cells(self, frames: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Cells [videos, N, places, spots, CELL, CELL, 3] of the judged places at times [N, places]."""
        found = []
        for column, place in enumerate(self.judged):
            spots = world.SPOTS[place * SPOTS_PER_PLACE : (place + 1) * SPOTS_PER_PLACE]
            seen = frames[:, times[:, column]]
            cuts = [seen[:, :, y : y + world.CELL, x % world.SIZE : x % world.SIZE + world.CELL] for x, y in spots]
            found.append(np.stack(cuts, axis=2))
        return np.stack(found, axis=2)

    def _read(self, crops: np.ndarray) -> np.ndarray:
        """Attributes [videos, N, places, spots, 8] of what `_cells` gives."""
        spots = np.array([place * SPOTS_PER_PLACE + spot for place in self.judged for spot in range(SPOTS_PER_PLACE)])
        spots = np.broadcast_to(spots.reshape(len(self.judged), -1), crops.shape[:4])
        found = creatures.load_reader().read(crops.reshape(-1, *crops.shape[4:]), spots.ravel())
        return found.reshape(*crops.shape[:4], -1)

    def summarise(self, walk: world.Walk, cells: Mapping[Setting, Values]) -> dict[str, Any]:
        return {setting: drift_report.summary(values) for setting, values in cells.items()}

    def compare(self, walk: world.Walk, cells: Mapping[str, Values]) -> dict[str, Any]:
        return drift_report.pairs(self, cells)

    def headline(self, policies: Mapping[str, Mapping[str, Any]]) -> str:
        return drift_report.table(policies)

    def draw_picture(
        self, path: Path, facts: Mapping[str, Any], cells: Mapping[str, Values], pictures: Mapping[str, np.ndarray]
    ) -> None:
        drift_report.draw(self, path, facts, pictures)


DRIFT = DriftTrack(
    "drift",
    "Lap after lap through four places: do those who live there stay what they were?",
    size=Size(laps=12, videos=16),
    quick=Size(laps=4, videos=2),
    policies=DRIFT_POLICIES,
    settings=("given", "generated"),
    period=LAP,
    judged=range(1, world.PLACES),
    trainings=len(bundled_backbones()),
)
LONG = DriftTrack(
    "long",
    "Two places are seen again after a thousand frames each time: does memory still find them?",
    size=Size(laps=3, videos=4),
    quick=Size(laps=2, videos=2),
    policies=LONG_POLICIES,
    settings=("given",),
    period=FAR_PERIOD,
    judged=range(2, world.PLACES),
    trainings=1,  # half an hour of a core each; copies of copies are the question of `drift`
    brief=("sliding_window", "retrieval", "oracle"),
)
