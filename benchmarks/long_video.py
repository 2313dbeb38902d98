"""Ten minutes of video by a tiny model in a small budget, on each tier: what is retrieved, and what memory it takes.

    python benchmarks/long_video.py --json FILE [--frames 2400] [--tiers host disk "8 bits" latents]

The weights are random, so the video shows nothing; keys and values come and go as those of a real one. Each tier makes
the video that the device alone makes, from the same noise: bit by bit the same one as long as pages come back as they
were. With packed or rebuilt pages it is another one, whose memory then finds other frames; so these two also go over
the latents of the first video, and there it must find the same. All three comparisons are in the results.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import longlive_rag
from longlive_rag import Budget, RetrievalConfig
from longlive_rag.bank import Usage
from longlive_rag.files import check_writable, write_json
from longlive_rag.generation.rollout import stream
from longlive_rag.generation.sampling import Sampling
from longlive_rag.models import CausalWanModel
from longlive_rag.tiers.pages import frame_bytes

CONFIG = RetrievalConfig(context_frames=12, sink_frames=3, memory_frames=3, recency_guard=0, block_frames=3)
CHANNELS, SIZE, WIDTH, LAYERS, HEADS = 4, 8, 32, 2, 2
PAGE = frame_bytes(layers=LAYERS, heads=HEADS, tokens=SIZE**2 // 4, head_dim=WIDTH // HEADS, dtype=torch.float32)
DEVICE = (CONFIG.context_frames + CONFIG.block_frames) * PAGE
"""Room for one context and one block."""
EXACT, OTHERWISE = ("host", "disk"), ("8 bits", "latents")
"""Tiers whose pages come back as they were, and the others."""


def budget(tier: str, frames: int) -> Budget:
    """As small as all frames allow: in host memory, or on disk behind 6 frames in host memory, or in latents."""
    sizes: dict[str, dict[str, Any]] = {
        "host": {"host": frames * PAGE},
        "disk": {"host": 6 * PAGE, "disk": frames * PAGE},
        "8 bits": {"host": 6 * PAGE, "disk": frames * PAGE, "bits": 8},
        "latents": {"host": 0, "rebuild": True},
    }
    return Budget(device=DEVICE, **sizes[tier])


@dataclass
class Video:
    """What a run made and took."""

    latents: Tensor
    retrieved: list[list[list[int]]]
    usages: list[Usage]
    seconds: float
    resident: list[int]
    """Bytes of the process after each block."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(model: CausalWanModel, frames: int, sizes: Budget, name: str, given: Tensor | None = None) -> Video:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 4, model.text_dim, generator=generator)
    shape = (1, CONFIG.block_frames, CHANNELS, SIZE, SIZE)
    count = frames // CONFIG.block_frames

    def noise() -> Iterator[Tensor]:
        for _ in range(count):
            yield torch.randn(shape, generator=generator)

    latents, retrieved, usages, resident = [], [], [], []
    began = time.process_time()
    blocks = stream(model, noise(), prompt, CONFIG, sampling=Sampling((1000,)), budget=sizes, given=given)
    for block in tqdm(blocks, desc=name, total=count, unit="block", disable=None):
        latents.append(block.latents)
        usages.append(block.usage)
        resident.append(resident_bytes())
        if block.retrieval is not None:
            retrieved.append(block.retrieval.frames)
    return Video(torch.cat(latents, dim=1), retrieved, usages, time.process_time() - began, resident)


def same_retrieved(video: Video, reference: Video) -> float:
    """Share of blocks that retrieved the same frames."""
    pairs = list(zip(video.retrieved, reference.retrieved, strict=True))
    return round(sum(sorted(a[0]) == sorted(b[0]) for a, b in pairs) / len(pairs), 4)


def memory_used(video: Video) -> dict[str, Any]:
    """By tier the bytes after a quarter of the blocks, at most, and in the end; and the frames in the end."""
    quarter, last = len(video.usages) // 4, video.usages[-1]
    tiers = {
        name: {
            "frames": getattr(last, name).frames,
            "bytes_after_a_quarter": getattr(video.usages[quarter], name).bytes,
            "bytes_at_most": max(getattr(usage, name).bytes for usage in video.usages),
            "bytes_in_the_end": getattr(last, name).bytes,
        }
        for name in ("device", "host", "disk", "latents")
    }
    growth = video.resident[-1] - video.resident[quarter]
    return {**tiers, "forgotten": last.forgotten, "growth_of_the_process_after_a_quarter": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--frames", type=int, default=2400, help="latent frames; default 10 minutes at 16 a second")
    parser.add_argument("--tiers", nargs="+", choices=EXACT + OTHERWISE, default=EXACT + OTHERWISE)
    options = parser.parse_args()
    check_writable(options.json)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": WIDTH, "ffn_dim": WIDTH, "num_layers": LAYERS, "num_heads": HEADS}
    text: dict[str, Any] = {"freq_dim": 16, "text_dim": 8, "text_len": 4}
    model = CausalWanModel(**sizes, **text, in_dim=CHANNELS, out_dim=CHANNELS).eval()
    reference = run(model, options.frames, Budget(), "device")
    tiers: dict[str, Any] = {
        "device": {"memory": memory_used(reference), "seconds_of_cpu": round(reference.seconds, 1)}
    }
    for tier in options.tiers:
        video = run(model, options.frames, budget(tier, options.frames), tier)
        apart = video.latents - reference.latents
        tiers[tier] = {
            "same_video": torch.equal(video.latents, reference.latents),
            "latents_apart": round(float(apart.square().mean().sqrt() / reference.latents.std()), 6),
            "same_frames_retrieved": same_retrieved(video, reference),
            "memory": memory_used(video),
            "seconds_of_cpu": round(video.seconds, 1),
        }
        if tier in OTHERWISE:
            again = run(model, options.frames, budget(tier, options.frames), f"{tier}, given", reference.latents)
            tiers[tier]["same_frames_retrieved_over_the_same_latents"] = same_retrieved(again, reference)
        print(tier, {name: value for name, value in tiers[tier].items() if name != "memory"}, flush=True)
        facts = {"version": longlive_rag.__version__, "torch": torch.__version__, "page_bytes": PAGE}
        write_json(options.json, {**facts, "frames": options.frames, "tiers": tiers})


if __name__ == "__main__":
    main()
