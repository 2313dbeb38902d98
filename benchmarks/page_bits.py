"""What it costs that frames come back with fewer bits, or rebuilt from their latents.

    python benchmarks/page_bits.py --json FILE [--videos 16] [--policies retrieval latest_query] [--tracks cuts pans]

Makes the small world's videos on a device with room for one context and one block, so that frames which leave the
window soon go below it and come back from there, and counts inhabitants that stay themselves. All precisions make the
same videos, so that they are compared in pairs with 16 bits; intervals are 95% bootstrap over videos. Where a policy
keeps everybody, as draft queries nearly do, that count cannot tell precisions apart; the distance of the pictures can.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import longlive_rag
from longlive_rag import Budget, RetrievalConfig
from longlive_rag.budget import Bits
from longlive_rag.files import check_writable, write_json
from longlive_rag.intervals import bootstrap_interval
from longlive_rag.models import CausalWanModel
from longlive_rag.small_world import world
from longlive_rag.small_world.backbone import load_backbone, load_codec
from longlive_rag.small_world.bench_memory import SEED
from longlive_rag.small_world.codec import LATENT_SIZE
from longlive_rag.small_world.measure import Score, Videos, measure
from longlive_rag.small_world.policies import POLICIES
from longlive_rag.small_world.tracks import TRACKS
from longlive_rag.tiers.pages import frame_bytes

PRECISIONS: dict[str, tuple[Bits, bool]] = {
    "16 bits": (16, False),
    "8 bits": (8, False),
    "4 bits": (4, False),
    "latents": (16, True),
}
"""Bits of pages below the device, and whether there are none, so that all are rebuilt."""
REFERENCE = "16 bits"
"""Pages below the device as they were on it: the same videos as without any budget."""


def tight(model: CausalWanModel, config: RetrievalConfig, size: tuple[int, int], batch: int, precision: str) -> Budget:
    """A budget under which a frame that leaves the window leaves the device."""
    bits, rebuild = PRECISIONS[precision]
    rows, columns = model.token_grid(*size)
    page = frame_bytes(
        layers=model.num_layers,
        heads=model.num_heads,
        tokens=rows * columns,
        head_dim=model.head_dim,
        dtype=model.patch_embedding.weight.dtype,
    )
    frames = config.context_frames + config.block_frames
    return Budget(device=batch * frames * page, host=0 if rebuild else None, bits=bits, rebuild=rebuild)


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean of one number a video, with its interval."""
    low, high = bootstrap_interval(values)
    return {name: round(float(value), 5) for name, value in (("mean", values.mean()), ("low", low), ("high", high))}


def compared(score: Score, videos: Videos, reference: Score, reference_videos: Videos) -> dict[str, Any]:
    """A precision beside the reference, video by video."""
    apart = (videos.frames.astype(np.float64) - reference_videos.frames) / 255
    same = [
        [float(np.mean([set(now) == set(then) for now, then in zip(a.frames, b.frames, strict=True)]))]
        for a, b in zip(videos.recalls, reference_videos.recalls, strict=True)
    ]
    return {
        "identity_accuracy": interval(score.correct.mean(axis=1)),
        "chance": round(score.chance, 4),
        "less_than_16_bits": interval(reference.correct.mean(axis=1) - score.correct.mean(axis=1)),
        "pixels_apart": interval(np.sqrt((apart**2).mean(axis=(1, 2, 3, 4)))),
        "same_frames_retrieved": round(float(np.mean(same)), 4),
    }


def in_the_world(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, codec = load_backbone(), load_codec()
    walks = {track: TRACKS[track].walk(TRACKS[track].size.laps) for track in options.tracks}
    conditions = [(track, name, given) for track in walks for name in options.policies for given in (True, False)]
    frames = sum(len(PRECISIONS) * len(walks[track].views) for track, _, _ in conditions)
    results: dict[str, Any] = {track: {name: {} for name in options.policies} for track in walks}
    with tqdm(total=frames, unit="frame", smoothing=0.05, disable=None) as progress:
        for track, name, given in conditions:
            policy = POLICIES[name]
            made = {
                precision: measure(
                    model,
                    codec,
                    policy,
                    walks[track],
                    seed=SEED,
                    videos=options.videos,
                    given=given,
                    budget=tight(model, policy.config, (LATENT_SIZE, LATENT_SIZE), options.videos, precision),
                    tick=progress.update,
                )
                for precision in PRECISIONS
            }
            lap = "given" if given else "generated"
            results[track][name][lap] = {each: compared(*made[each], *made[REFERENCE]) for each in made}
            print(f"\n{track}, {name}, first lap {lap}\n{table(results[track][name][lap])}", flush=True)
    return {"seed": SEED, "videos": options.videos, "tracks": results}


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':8}  {'inhabitants still themselves':>28}  {'less than 16 bits':>24}  {'pixels apart':>12}"]
    for name, row in rows.items():
        accuracy, less = (
            f"{row[key]['mean']:.3f} [{row[key]['low']:.3f}, {row[key]['high']:.3f}]"
            for key in ("identity_accuracy", "less_than_16_bits")
        )
        lines.append(f"{name:8}  {accuracy:>28}  {less:>24}  {row['pixels_apart']['mean']:12.4f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--videos", type=int, default=16, help="of each policy and precision; default 16")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["retrieval", "latest_query"])
    parser.add_argument("--tracks", nargs="+", choices=world.TRACKS, default=list(world.TRACKS))
    options = parser.parse_args()
    check_writable(options.json)
    facts = {"version": longlive_rag.__version__, "torch": torch.__version__}
    write_json(options.json, {**facts, **in_the_world(options)})


if __name__ == "__main__":
    main()
