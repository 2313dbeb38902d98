"""What embedding a block costs: the retrieval encoder at Wan's size, three latent frames of 16 x 60 x 104.

    python benchmarks/encoder.py --json benchmarks/results/encoder.json

The paper reports 3.96 ms a block (arXiv 2606.02553). On a GPU: eager float32, then bfloat16 with channels last, then
the same in a CUDA graph, with and without torch.compile; the goal is 0.5 ms on an H200. On a CPU, the eager rows, which
say nothing about that goal.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from longlive_rag.embedding import LatentAutoencoder
from longlive_rag.files import write_json

FRAMES, CHANNELS, HEIGHT, WIDTH = 3, 16, 60, 104
PAPER_MILLISECONDS, GOAL_MILLISECONDS = 3.96, 0.5


def encoder_flops(hidden_dims: tuple[int, ...] = (64, 128, 256), embedding_dim: int = 1024) -> int:
    """Multiplications and additions of the convolutions and the projection for one block."""
    height, width, before, total = HEIGHT, WIDTH, CHANNELS, 0
    for after in hidden_dims:
        height, width = -(-height // 2), -(-width // 2)
        total += 2 * 9 * after * (before + 2 * after) * height * width
        before = after
    return FRAMES * (total + 2 * before * embedding_dim)


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call after three warm-up calls."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def in_cuda_graph(embed: Callable[[Tensor], Tensor], latents: Tensor) -> Callable[[], None]:
    """Capture one call; what is returned replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            embed(latents)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        embed(latents)
    return graph.replay


def variants(device: torch.device) -> dict[str, Callable[[], object]]:
    """Ways to run the encoder, slowest first."""
    latents = torch.randn(FRAMES, CHANNELS, HEIGHT, WIDTH, device=device)
    plain = LatentAutoencoder().to(device).eval()
    fast = LatentAutoencoder().to(device, torch.bfloat16).eval()
    fast.to(memory_format=torch.channels_last)
    fast_latents = latents.to(torch.bfloat16, memory_format=torch.channels_last)
    runs: dict[str, Callable[[], object]] = {
        "float32": lambda: plain.embed(latents),
        "bfloat16, channels last": lambda: fast.embed(fast_latents),
    }
    if device.type == "cuda":
        runs["bfloat16, channels last, CUDA graph"] = in_cuda_graph(fast.embed, fast_latents)
        compiled = LatentAutoencoder().to(device, torch.bfloat16).eval()
        compiled.to(memory_format=torch.channels_last)
        compiled.encoder.compile()
        runs["bfloat16, channels last, compiled, CUDA graph"] = in_cuda_graph(compiled.embed, fast_latents)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    machine = (
        torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"{machine}: {encoder_flops() / 1e9:.2f} GFLOP a block")
    if not on_gpu:
        print("no GPU: these times do not compare with the paper's, nor with the goal")
    times = {}
    for name, work in variants(device).items():
        times[name] = milliseconds(work, device, options.repeats)
        print(f"{name:46} {times[name]:9.3f} ms", flush=True)
    if on_gpu:
        verdict = "reached" if min(times.values()) <= GOAL_MILLISECONDS else "missed"
        print(f"paper {PAPER_MILLISECONDS} ms, goal {GOAL_MILLISECONDS} ms: {verdict}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, {"machine": machine, "torch": torch.__version__, "milliseconds": times})


if __name__ == "__main__":
    main()
