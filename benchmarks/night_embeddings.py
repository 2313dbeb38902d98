"""What each embedding of the track `night` finds on true frames, without generating: a minute on one core.

    python benchmarks/night_embeddings.py --json benchmarks/results/night_embeddings.json

Memory holds true frames in their light; the query is a draft of the same place in its own light with somebody else in
it, since a draft does not know yet who lives there. Both have noise, since generated latents are not exact. Candidates
and K are those of the track.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from longlive_rag.context import ContextPlan
from longlive_rag.files import write_json
from longlive_rag.small_world import light, world
from longlive_rag.small_world.backbone import load_codec
from longlive_rag.small_world.bench_memory import SEED
from longlive_rag.small_world.tracks.cells import interval
from longlive_rag.small_world.tracks.night import NIGHT, arrivals, load_night_encoder
from longlive_rag.small_world.tracks.night_report import by_hour

MEMORY_NOISE, DRAFT_NOISE = 0.15, 0.3  # standard deviations, before the light; that of the latents is 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--videos", type=int, default=24)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    codec, lights, walk = load_codec(), light.lights(), NIGHT.walk(NIGHT.size.laps)
    casts = NIGHT.draw(SEED, 2 * options.videos)

    def seen(cast: np.ndarray, noise: float) -> torch.Tensor:
        latents = codec.encode(world.render(walk.views, walk.phases, cast))
        return lights.cast(latents + noise * torch.randn(latents.shape))

    memories = [seen(cast, MEMORY_NOISE) for cast in casts[: options.videos]]
    drafts = [seen(cast, DRAFT_NOISE) for cast in casts[options.videos :]]
    when = arrivals(walk)
    report = {}
    for policy in NIGHT.policies.values():
        if policy.config.query != "draft":
            continue
        embedding = policy.embedding() if policy.embedding else load_night_encoder("full")
        found = np.zeros((options.videos, len(when)))
        for video, (memory, draft) in enumerate(zip(memories, drafts, strict=True)):
            held, asked = (torch.nn.functional.normalize(embedding.embed(x), dim=-1) for x in (memory, draft))
            for column, start in enumerate(when):
                candidates = ContextPlan(policy.config, int(start), 1).candidates
                similarity = held[candidates.start : candidates.stop] @ asked[start]
                top = similarity.topk(policy.config.memory_frames).indices.numpy() + candidates.start
                found[video, column] = (walk.views[top] == walk.views[start]).mean()
        report[policy.label] = {"found": interval(found.mean(axis=1)[None]), "found_by_hour": by_hour(found, when)}
        value = report[policy.label]["found"]
        print(f"{policy.label:48} {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]", flush=True)
    write_json(options.json, {"videos": options.videos, "laps": NIGHT.size.laps, "seed": SEED, "embeddings": report})


if __name__ == "__main__":
    main()
