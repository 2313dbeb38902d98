"""Does memory help? The bundled backbone under every context policy, on videos never used in training or tuning.

    python -m longlive_rag.small_world.benchmark --json benchmarks/results/memory_small_world.json

Every policy makes the same videos (same noise, same inhabitants), so that they are compared in pairs; intervals are 95%
bootstrap over videos. It takes about a quarter of an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import longlive_rag
from longlive_rag import figures
from longlive_rag.files import check_writable, write_json
from longlive_rag.intervals import bootstrap_interval
from longlive_rag.small_world import report, world
from longlive_rag.small_world.measure import Condition, Score, measure_all
from longlive_rag.small_world.policies import POLICIES

SEED = 20_000  # tuning used 5000
LAPS = {"cuts": 4, "pans": 4}


def advantage(ours: Score, theirs: Score) -> dict[str, float]:
    """How much more of the inhabitants one policy keeps than another on the same videos, with its interval."""
    each = ours.correct.mean(axis=1) - theirs.correct.mean(axis=1)
    low, high = bootstrap_interval(each)
    return {"mean": round(float(each.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def measure_track(track: str, videos: int, workers: int | None) -> dict[str, Any]:
    frames = world.lap_frames(track, LAPS[track])
    walk = world.walk(track, frames)
    with tqdm(total=2 * len(POLICIES) * frames, unit="frame", desc=track, smoothing=0.05) as progress:
        results = measure_all(
            track, frames, policies=list(POLICIES), seed=SEED, videos=videos, tick=progress.update, workers=workers
        )
    scores = {condition: score for condition, (score, _) in results.items()}
    policies = {
        name: {
            "label": policy.label,
            **report.entry(walk, scores[Condition(name, True)], scores[Condition(name, False)]),
        }
        for name, policy in POLICIES.items()
    }
    behind_oracle = {
        setting: advantage(scores[Condition("oracle", given)], scores[Condition("retrieval", given)])
        for setting, given in (("given", True), ("generated", False))
    }
    return {"frames": frames, "oracle_less_retrieval": behind_oracle, "policies": policies}


def draw(path: Path, tracks: dict[str, Any]) -> None:
    """Bars with intervals: every policy, both tracks, first lap given and generated."""
    figure = figures.figure(11, 4.6)
    for axis, (track, facts) in zip(figure.subplots(1, len(tracks), sharey=True), tracks.items(), strict=True):
        rows = np.arange(len(facts["policies"]))[::-1]
        for offset, key, colour, label in (
            (0.19, "identity_accuracy", "#3b6fb6", "first lap given"),
            (-0.19, "identity_accuracy_generated", "#e0913a", "first lap generated"),
        ):
            values = [policy[key] for policy in facts["policies"].values()]
            means = np.array([value["mean"] for value in values])
            reach = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
            axis.barh(rows + offset, means, 0.36, xerr=reach, color=colour, label=label, error_kw={"elinewidth": 1})
            axis.scatter([v["chance"] for v in values], rows + offset, marker="|", color="black", s=60, zorder=3)
        axis.set_yticks(rows, [policy["label"] for policy in facts["policies"].values()])
        axis.set_xlim(0, 1.02)
        axis.set_title(f"{track}, {facts['frames']} frames")
    figure.supxlabel(
        "share of inhabitants that are still themselves when they come back (black bar: chance)", fontsize=10
    )
    figure.axes[0].legend(loc="upper right", fontsize=9)
    figures.save(figure, path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--picture", type=Path, help="file for bars of the results")
    parser.add_argument("--videos", type=int, default=32, help="videos per policy; default 32")
    parser.add_argument("--workers", type=int, help="processes; default one per core, at most 4")
    options = parser.parse_args()
    for path in filter(None, (options.json, options.picture)):
        check_writable(path)
    tracks = {track: measure_track(track, options.videos, options.workers) for track in world.TRACKS}
    facts = {
        "version": longlive_rag.__version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "seed": SEED,
        "videos": options.videos,
        "tracks": tracks,
    }
    write_json(options.json, facts)
    if options.picture:
        draw(options.picture, tracks)
    for track, measured in tracks.items():
        print(f"\n{track}\n{report.table(measured['policies'])}")


if __name__ == "__main__":
    main()
