"""`longlive-rag demo`: the same long video under every context policy, made by the bundled small backbone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longlive_rag.files import output_folder, write_json

MIN_FRAMES = 120


@dataclass(frozen=True)
class Demo:
    """Generate the same long video under every context policy, and see which policy stays true to its beginning.

    Uses the bundled small backbone: no GPU, no download, a few minutes on a CPU. Writes one video per policy,
    comparison.mp4 (all of them side by side), memory.png (what was retrieved) and report.json.

    Examples:
      longlive-rag demo --output demo
      longlive-rag demo --output pans --track pans --laps 8
    """

    output: Path
    """Folder for the results; created if it is missing."""
    seed: int = 0
    """Seed of the noise and of the inhabitants."""
    laps: int = 5
    """Number of times the camera goes round the whole world: at least 2, and raised to reach 120 frames."""
    track: Literal["cuts", "pans"] = "cuts"
    """What the camera does: cut between four places, or pan across them and back."""
    videos: int = 4
    """Videos generated per policy for the report, at least 2; only the first is written to disk."""

    def run(self) -> int:
        if self.laps < 2:
            raise ValueError(f"--laps must be at least 2: the first shows what there is to remember, got {self.laps}")
        if self.videos < 2:
            raise ValueError(f"--videos must be at least 2, or there is no interval, got {self.videos}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        folder = output_folder(self.output)

        from tqdm import tqdm

        from longlive_rag.small_world import report, world
        from longlive_rag.small_world.measure import Condition, measure_all
        from longlive_rag.small_world.policies import OURS, POLICIES, SHOWN

        begun = time.monotonic()
        frames = max(MIN_FRAMES, world.lap_frames(self.track, self.laps))
        walk = world.walk(self.track, frames)
        with tqdm(total=2 * len(SHOWN) * frames, unit="frame", desc="generating", smoothing=0.05) as progress:
            results = measure_all(
                self.track, frames, policies=SHOWN, seed=self.seed, videos=self.videos, tick=progress.update
            )
        shown = {name: results[Condition(name, given=False)][1] for name in SHOWN}
        for name, videos in tqdm(shown.items(), unit="video", desc="writing"):
            report.write_video(folder / f"{name}.mp4", videos.frames[0])
        clips = {name: videos.frames[0] for name, videos in shown.items()}
        residents = {name: report.first_residents(walk, clip) for name, clip in clips.items()}
        report.write_comparison(folder / "comparison.mp4", walk, clips, residents)
        report.draw_memory(folder / "memory.png", walk, {name: shown[name] for name in ("latest_query", OURS)})
        policies = {
            name: {
                "label": POLICIES[name].label,
                **report.entry(
                    walk,
                    {"given": results[Condition(name, True)][0], "generated": results[Condition(name, False)][0]},
                ),
            }
            for name in SHOWN
        }
        facts = {
            "track": self.track,
            "frames": frames,
            "seed": self.seed,
            "seconds": round(time.monotonic() - begun, 1),
            "policies": policies,
        }
        write_json(folder / "report.json", facts)
        print(report.table(policies))
        print(f"{folder}: comparison.mp4, one video per policy, memory.png, report.json")
        return 0
