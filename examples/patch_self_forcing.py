"""Retrieval memory for Self-Forcing's own pipeline, whose code and files stay as they are.

    python examples/patch_self_forcing.py ~/Self-Forcing      # a checkout, or one of its relatives'
    python examples/patch_self_forcing.py                     # without: a double of its interface

Neither needs a GPU or weights: the model is tiny and its weights are random. A script of yours, with the real ones,
needs the line with `patch` alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longlive_rag import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
FRAMES, BLOCK, TOKENS = 30, 3, 8

Pipeline = tuple[Any, Callable[[], Tensor]]
"""A pipeline, and what makes a video [B, F, C, H, W] with it."""


def of_checkout(root: Path) -> Pipeline:
    """The repository's own model and pipeline, made small and put on a CPU, as the tests of this project run them."""
    from backbones.checkouts.driver import Video
    from backbones.checkouts.foreign import Sizes, enter
    from backbones.checkouts.repositories import fill, recognised

    sizes = Sizes()
    enter(root, sizes)
    driver = recognised(root)(root, sizes, fill)
    pipeline = driver.build({"model_kwargs": {"local_attn_size": 12, "sink_size": 1}})

    def inference() -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints each timestep
            return driver.generate(pipeline, Video(FRAMES))

    return driver.target(pipeline), inference


def double() -> Pipeline:
    """Attention with Self-Forcing's arguments, driven as its pipeline does: two steps, then a pass on clean latents."""
    from support.causal_doubles import Pipeline as Double

    pipeline = Double(
        "Self-Forcing", dim=64, ffn_dim=64, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=2
    )
    noise, prompt = torch.randn(1, FRAMES, 16, 4, 8), torch.randn(1, 4, 8)

    @torch.no_grad()
    def inference() -> Tensor:
        cache = pipeline.cache(batch=1, tokens=12 * TOKENS)
        video = []
        for start in range(0, FRAMES, BLOCK):
            latents = noise[:, start : start + BLOCK]
            for level in (1000.0, 500.0, 0.0):
                time = torch.full((1, BLOCK), level)
                flow = pipeline.generator(latents, prompt, time, kv_cache=cache, current_start=start * TOKENS)
                latents = latents - level / 1000 * flow
            video.append(latents)
        return torch.cat(video, dim=1)

    return pipeline, inference


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("checkout", nargs="?", type=Path, metavar="DIR", help="checkout of Self-Forcing")
    root = arguments.parse_args().checkout
    torch.manual_seed(0)
    pipeline, inference = of_checkout(root.resolve()) if root else double()

    if root:  # the double has no attention of its own
        own = inference()
        with patch(pipeline, "native"):
            same = inference()
        print(f"patched, no memory: relative difference from its own video {(same - own).norm() / own.norm():.1e}")

    with patch(pipeline) as patched:
        inference()
    config = patched.config
    print(
        f"patched as {patched.family}: a context of {config.context_frames} frames, {config.sink_frames} of them the "
        f"first, up to {config.memory_frames} from memory; what came back:"
    )
    for entry in patched.retrieved:
        print(f"  frames {entry.block_start} to {entry.block_start + BLOCK - 1} saw {entry.frames[0]} again")


if __name__ == "__main__":
    main()
