"""`longlive-rag bench-memory`: does memory help, and which? Every context policy on worlds with right answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longlive_rag.files import check_writable, output_folder


@dataclass(frozen=True)
class BenchMemory:
    """Measure every context policy on the tracks of the small world, where the right answer is known.

    Needs no GPU and no download. Every policy makes the same videos (same noise, same inhabitants), with the first lap
    given and generated, so that policies are compared in pairs; intervals are 95% bootstrap. The file of results is
    replaced after every cell: when the command is stopped, the same command goes on.

    Examples:
      longlive-rag bench-memory --quick --json quick.json --output quick
      longlive-rag bench-memory --tracks drift long --json m.json --output memory
    """

    json: Path
    """File for the results."""
    output: Path | None = None
    """Folder for one picture per track; created if it is missing."""
    tracks: tuple[str, ...] = ()
    """Tracks to measure; default all."""
    videos: int | None = None
    """Videos per cell, at least 2; default what each track's published figures have."""
    laps: int | None = None
    """Laps of the camera, at least 2; default what each track's published figures have."""
    quick: bool = False
    """Few videos and laps, one training, the first lap given only: under five minutes on two cores, with wide
    intervals."""
    workers: int | None = None
    """Processes; default one for each core, at most 4."""

    def run(self) -> int:
        from tqdm import tqdm

        from longlive_rag.small_world import bench_memory
        from longlive_rag.small_world.tracks import TRACKS
        from longlive_rag.small_world.tracks.track import Size

        for name in self.tracks:
            if name not in TRACKS:
                raise ValueError(f"--tracks must be among {', '.join(TRACKS)}, got {name!r}")
        for option, value, least in (("videos", self.videos, 2), ("laps", self.laps, 2), ("workers", self.workers, 1)):
            if value is not None and value < least:
                raise ValueError(f"--{option} must be at least {least}, got {value}")
        check_writable(self.json)
        folder = output_folder(self.output) if self.output else None
        sizes = {}
        for name in self.tracks or list(TRACKS):
            size = TRACKS[name].quick if self.quick else TRACKS[name].size
            sizes[name] = Size(self.laps or size.laps, self.videos or size.videos, brief=self.quick)
        record = bench_memory.Record(self.json, sizes, folder)
        jobs = record.missing()
        with tqdm(total=bench_memory.frames_of(jobs), unit="frame", smoothing=0.05, mininterval=1) as progress:
            for cell in bench_memory.run(record, progress.update, self.workers):
                progress.set_description(f"{cell.track} {cell.policy}")
        for name in sizes:
            policies = record.facts["tracks"][name]["policies"]
            print(f"{name}\n{TRACKS[name].headline(policies)}\n")
            if picture := record.draw(name):
                print(f"{picture}\n")
        return 0
