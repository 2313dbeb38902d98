"""30 s of video at 1.3B and 480 x 832 with random weights: time per block, retrieval's share, pictures per second.

    python benchmarks/end_to_end.py latents [--json FILE]    the transformer alone; needs no more than the package
    python benchmarks/end_to_end.py video [--json FILE]      decoded and written as mp4 as well; needs diffusers and av

Random weights cost the same time as trained ones. `--size tiny` tries the program on any machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longlive_rag import RetrievalConfig, RetrievalMemory
from longlive_rag.embedding import AveragePool
from longlive_rag.files import write_json
from longlive_rag.generation.rollout import stream
from longlive_rag.models import CausalWanModel

FPS = 16.0
FACTOR = 4
"""Pictures per latent frame after the first, of Wan's VAE."""
WARM_UP_SECONDS = 1.0
"""Of video, two blocks: modules are loaded, libraries have chosen their kernels, memory has been searched."""


@dataclass(frozen=True)
class Size:
    """What is generated.

    Attributes:
        model: arguments of `CausalWanModel`, or {"size": name} for `from_size`.
        vae: arguments of diffusers' `AutoencoderKLWan`.
        height, width: of a picture.
        seconds: of video.
    """

    model: dict[str, Any]
    vae: dict[str, Any]
    height: int
    width: int
    seconds: float


SIZES = {
    "1.3B": Size({"size": "1.3B"}, {}, 480, 832, 30.0),
    "tiny": Size(
        {
            "dim": 128, "ffn_dim": 256, "freq_dim": 64, "text_dim": 32, "text_len": 8, "num_heads": 2, "num_layers": 2,
            "in_dim": 16, "out_dim": 16,
        },
        {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        32, 48, 4.0,
    ),
}  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def transformer(size: Size) -> CausalWanModel:
    """With random weights, in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device()):
            model = (
                CausalWanModel.from_size(size.model["size"]) if "size" in size.model else CausalWanModel(**size.model)
            )
            model.fuse()  # as a checkpoint is, once it is loaded
            return model.eval()
    finally:
        torch.set_default_dtype(before)


def latent_frames(seconds: float, block: int) -> int:
    """Whole blocks that make at least so much video."""
    frames = -(-round(seconds * FPS - 1) // FACTOR) + 1
    return -(-frames // block) * block


class Clock:
    """Seconds between marks, as the device sees them: what it waits for the host counts, too."""

    def __init__(self) -> None:
        self.cuda = device().type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """After the end has been reached."""
        if not self.cuda:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


@contextmanager
def marked(clock: Clock, *methods: str) -> Iterator[list[tuple[Any, Any]]]:
    """Mark the clock before and after each call of these methods of `RetrievalMemory`."""
    spans: list[tuple[Any, Any]] = []

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = clock.mark()
            try:
                return method(*arguments, **options)
            finally:
                spans.append((begin, clock.mark()))

        return timed

    originals = {name: getattr(RetrievalMemory, name) for name in methods}
    for name, method in originals.items():
        setattr(RetrievalMemory, name, wrap(method))
    try:
        yield spans
    finally:
        for name, method in originals.items():
            setattr(RetrievalMemory, name, method)


def measure_latents(size: Size) -> dict[str, Any]:
    """The transformer alone, block by block; retrieval is `begin_block` (search, tables) and `commit` (embedding)."""
    model, config = transformer(size), RetrievalConfig()
    where, block = device(), config.block_frames
    frames = latent_frames(size.seconds, block)
    prompt = torch.randn(1, model.text_len, model.text_dim, device=where).bfloat16()
    shape = (1, block, model.in_dim, size.height // 8, size.width // 8)

    def blocks(count: int) -> Iterator[Tensor]:
        noise = (torch.randn(shape, device=where).bfloat16() for _ in range(count))
        for finished in stream(model, noise, prompt, config, embedding=AveragePool()):
            yield finished.latents

    for _ in blocks(latent_frames(WARM_UP_SECONDS, block) // block):
        pass
    if where.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    begun = time.perf_counter()
    with marked(clock, "begin_block", "commit") as spans:
        marks = [clock.mark()]
        finite = torch.ones((), dtype=torch.bool, device=where)
        for latents in blocks(frames // block):
            marks.append(clock.mark())
            finite &= latents.isfinite().all()
    all_finite = bool(finite)  # waits for the device
    seconds = time.perf_counter() - begun
    each = [clock.between(begin, end) for begin, end in pairwise(marks)]
    retrieval = sum(clock.between(begin, end) for begin, end in spans)
    return {
        "seconds": seconds,
        "blocks": len(each),
        "latent_frames": frames,
        "first_block_seconds": each[0],
        "median_block_seconds": statistics.median(each),
        "last_block_seconds": each[-1],
        "longest_block_seconds": max(each),
        "retrieval_share": retrieval / sum(each),
        "pictures_per_second": (FACTOR * frames - FACTOR + 1) / seconds,
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if where.type == "cuda" else 0.0,
        "finite": all_finite,
    }


def measure_video(size: Size) -> dict[str, Any]:
    """What `longlive-rag generate` does for one video once everything is loaded, after a short video to warm up."""
    from diffusers import AutoencoderKLWan

    from longlive_rag.generation.pipeline import Pipeline
    from longlive_rag.generation.settings import VideoSettings
    from longlive_rag.generation.wan_vae import StreamingDecoder

    model = transformer(size)
    vae: Any = AutoencoderKLWan(**size.vae)
    vae = vae.to(device(), torch.bfloat16).eval().requires_grad_(False)
    prompt = torch.randn(model.text_len, model.text_dim, device=device()).bfloat16()
    facts: dict[str, Any] = {}
    taken = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds in (("warm_up", WARM_UP_SECONDS), ("video", size.seconds)):
            settings = VideoSettings(seconds=seconds, fps=FPS, height=size.height, width=size.width)
            path = Path(folder) / f"{name}.mp4"
            pipeline = Pipeline(model, StreamingDecoder(vae), AveragePool(), settings)
            begun = time.perf_counter()
            pipeline.generate(prompt, path, {})
            taken = time.perf_counter() - begun  # the file is written, so the GPU is done
            facts = json.loads(path.with_suffix(".json").read_text())
    return {
        "seconds": taken,
        "pictures": facts["frames"],
        "pictures_per_second": facts["frames"] / taken,
        "times_real_time": facts["frames"] / FPS / taken,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Video with random weights, from noise to latents or to a file.")
    parser.add_argument("what", choices=["latents", "video"])
    parser.add_argument("--size", choices=[*SIZES], default="1.3B")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        measured = (measure_latents if options.what == "latents" else measure_video)(SIZES[options.size])
    figures = {"size": options.size, "device": str(device()), **measured}
    for name, value in figures.items():
        print(f"{name:24}{value:.4g}" if isinstance(value, float) else f"{name:24}{value}")
    if options.json is not None:
        write_json(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
