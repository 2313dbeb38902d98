"""The memory benchmark: every policy on every track, cell by cell, into one file that says how far it has come."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import longlive_rag
from longlive_rag.files import atomic_path
from longlive_rag.small_world import measure
from longlive_rag.small_world.report import Setting
from longlive_rag.small_world.tracks import TRACKS
from longlive_rag.small_world.tracks.track import Cell, Models, Outcome, Size, Values
from longlive_rag.small_world.workers import Tick, in_processes

SEED = 20_000  # tuning used 5000 to 5010


@dataclass(frozen=True)
class Job:
    """A cell and how much of it."""

    cell: Cell
    size: Size
    seed: int


@dataclass
class _Loaded:
    """The models of the training that this process used last."""

    key: tuple[str, int] | None = None
    models: Models | None = None


_loaded = _Loaded()


def do(job: Job, tick: Tick = lambda frames: None) -> tuple[Outcome, float]:
    """Generate and measure one cell; also its seconds."""
    cell, track = job.cell, TRACKS[job.cell.track]
    if _loaded.key != (cell.track, cell.training):
        _loaded.key, _loaded.models = (cell.track, cell.training), track.models(cell.training)
    assert _loaded.models is not None
    backbone, codec, encoder = _loaded.models
    walk, policy, given = track.walk(job.size.laps), track.policies[cell.policy], cell.setting == "given"
    truth = track.draw(job.seed, job.size.videos)
    begun = time.monotonic()
    blocks = measure.generate(
        backbone,
        policy,
        walk,
        seed=job.seed,
        videos=job.size.videos,
        given=track.first_lap(codec, walk, truth) if given else None,
        embedding=policy.embedding() if policy.embedding else encoder,
        prompts=track.prompts(backbone, walk),
    )
    videos = measure.collect(codec, track.daylight(blocks), tick)
    seconds = time.monotonic() - begun
    found = track.measure(walk, truth, given, videos.frames)
    retrieval = track.retrieval(walk, videos.recalls, job.size.videos) if videos.recalls else {}
    return Outcome({**found.values, **retrieval}, found.pictures), seconds


def cells_of(name: str, brief: bool = False) -> list[Cell]:
    """Every cell of a track, so that each stage of the work is a comparison of all policies."""
    track = TRACKS[name]
    return [
        Cell(name, policy, setting, training)
        for setting in track.settings[: 1 if brief else None]
        for training in range(1 if brief else track.trainings)
        for policy in (track.brief if brief and track.brief else track.policies)
    ]


class Record:
    """The file of results.

    Args:
        path: JSON; what it holds of the same sizes is kept.
        sizes: of the tracks to measure.
        output: folder for pictures, or None.

    Raises:
        ValueError: the file holds something else, or results of other sizes.
    """

    def __init__(self, path: Path, sizes: Mapping[str, Size], output: Path | None) -> None:
        self.path, self.sizes, self.output = path, sizes, output
        self.facts: dict[str, Any] = {
            "version": longlive_rag.__version__,
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "seed": SEED,
            "tracks": {},
        }
        if path.exists():
            self.facts.update(self._read())
        for name, size in sizes.items():
            about = {"question": TRACKS[name].question, "laps": size.laps, "videos": size.videos}
            held = self.facts["tracks"].setdefault(name, {**about, "policies": {}, "cells": {}})
            for key in ("laps", "videos"):
                if held[key] != about[key]:
                    raise ValueError(
                        f"{path} holds {name} with {key} = {held[key]}, but {about[key]} are asked for; name another "
                        "file with --json"
                    )

    def _read(self) -> dict[str, Any]:
        try:
            facts = json.loads(self.path.read_text(encoding="utf-8"))
            if facts["seed"] == SEED and isinstance(facts["tracks"], dict):
                return dict(facts)
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(f"{self.path} exists, but is no result of this benchmark; name another file with --json")

    def missing(self) -> list[Job]:
        """What is still to be done."""
        return [
            Job(cell, size, SEED)
            for name, size in self.sizes.items()
            for cell in cells_of(name, size.brief)
            if cell.key not in self.facts["tracks"][name]["cells"]
        ]

    def values(self, name: str) -> dict[str, Values]:
        """By `Cell.key`."""
        return {
            key: {field: np.array(value, dtype=float) for field, value in cell["values"].items()}
            for key, cell in self.facts["tracks"][name]["cells"].items()
        }

    def add(self, cell: Cell, outcome: Outcome, seconds: float) -> None:
        """Note a finished cell, summarise its track again, and replace the file."""
        held = self.facts["tracks"][cell.track]
        listed = {name: _listed(value) for name, value in outcome.values.items()}
        held["cells"][cell.key] = {"seconds": round(seconds, 1), "values": listed}
        if self.output is not None and len(outcome.pictures):
            self._save_pictures(cell, outcome.pictures)
        self.summarise(cell.track)
        with atomic_path(self.path) as partial:
            partial.write_text(_compact(self.facts), encoding="utf-8")

    def summarise(self, name: str) -> None:
        track, held = TRACKS[name], self.facts["tracks"][name]
        walk, everything = track.walk(held["laps"]), self.values(name)
        held["frames"] = len(walk.views)
        held["policies"] = {}
        for policy, about in track.policies.items():
            cells: dict[Setting, Values] = {}
            for setting in track.settings:
                found = [
                    everything[key]
                    for training in range(track.trainings)
                    if (key := Cell(name, policy, setting, training).key) in everything
                ]
                if found:
                    cells[setting] = {field: np.stack([each[field] for each in found]) for field in found[0]}
            if cells:
                held["policies"][policy] = {"label": about.label, **track.summarise(walk, cells), **_common(cells)}
        held["pairs"] = track.compare(walk, everything)

    def draw(self, name: str) -> Path | None:
        """Draw a track's picture into the output folder, if there is one."""
        if self.output is None or not self.facts["tracks"][name]["policies"]:
            return None
        path = self.output / f"{name}.png"
        pictures = {cell.key: _load_strip(self._strip(cell)) for cell in cells_of(name) if self._strip(cell).is_file()}
        TRACKS[name].draw_picture(path, self.facts["tracks"][name], self.values(name), pictures)
        return path

    def _strip(self, cell: Cell) -> Path:
        assert self.output is not None
        return self.output / "cells" / cell.track / f"{cell.policy}-{cell.setting}-{cell.training}.png"

    def _save_pictures(self, cell: Cell, pictures: np.ndarray) -> None:
        from PIL import Image

        path = self._strip(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            Image.fromarray(np.concatenate(list(pictures), axis=1)).save(partial)


def run(record: Record, tick: Tick, workers: int | None = None) -> Iterator[Cell]:
    """Do what is missing; yields every cell once it is in the file."""
    for job, (outcome, seconds) in in_processes(do, record.missing(), tick, workers):
        record.add(job.cell, outcome, seconds)
        yield job.cell


def frames_of(jobs: Sequence[Job]) -> int:
    """Frames along the videos of these jobs: the unit of progress."""
    return sum(len(TRACKS[job.cell.track].walk(job.size.laps).views) for job in jobs)


def _common(cells: Mapping[Setting, Values]) -> dict[str, Any]:
    """What is said of every policy that retrieves: the share of right frames where the camera arrives, of the first lap
    among these."""
    facts = {}
    for name in ("retrieved_right", "retrieved_from_first_lap"):
        found = {s: v[name] for s, v in cells.items() if name in v and not np.isnan(v[name]).all()}
        if found:
            facts[name] = {setting: round(float(np.nanmean(value)), 4) for setting, value in found.items()}
    return facts


def _listed(value: np.ndarray) -> Any:
    """Numbers for JSON, five digits of them; NaN becomes null."""
    value = np.asarray(value)
    if value.ndim == 0 or value.ndim > 1:
        return [_listed(each) for each in value] if value.ndim else _listed(value[None])[0]
    if value.dtype.kind in "biu":
        return [int(each) for each in value]
    return [None if np.isnan(each) else float(f"{each:.5g}") for each in value]


def _compact(facts: Any) -> str:
    """Indented JSON with every list of numbers on one line."""
    text = json.dumps(facts, indent=2, allow_nan=False)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: " ".join(found.group().split()), text) + "\n"


def _load_strip(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        strip = np.asarray(image.convert("RGB"))
    return np.stack(np.split(strip, strip.shape[1] // strip.shape[0], axis=1))
