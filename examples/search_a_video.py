"""Search a finished video's memory for a picture.

    python examples/search_a_video.py --output found.png
    python examples/search_a_video.py --picture seaside.png --output found.png

A video of the bundled small world is made, and its memory saved to one file. That file and the encoder are all that a
search needs, days later and on another machine. The picture asked for by default shows the same landscape in another
video: its inhabitants were never in this one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longlive_rag import RetrievalMemory
from longlive_rag.small_world import measure, world
from longlive_rag.small_world.backbone import load_backbone, load_codec, load_encoder
from longlive_rag.small_world.policies import POLICIES

PLACES = ("meadow", "seaside", "desert", "winter forest")
FRAMES, HITS = 40, 5
WALK = world.walk("cuts", FRAMES)  # twice round the four places, five frames in each
CODEC = load_codec()


@torch.no_grad()
def film(path: Path) -> Tensor:
    """Make a video, and save its memory to `path`: latents [1, FRAMES, 16, 8, 8]."""
    model, policy = load_backbone(), POLICIES["retrieval"]
    cast = world.draw_cast(np.random.default_rng(1), videos=1)
    blocks = measure.generate(model, policy, WALK, seed=0, videos=1, given=measure.first_lap(CODEC, WALK, cast))
    latents = torch.cat([block.latents for block in blocks], dim=1)
    # One clean pass over each frame gives the memory of a finished video, whatever made it.
    with RetrievalMemory.for_model(model, latents.shape, policy.config, embedding=load_encoder()) as memory:
        for start, frame in enumerate(latents.split(1, dim=1)):
            memory.begin_block(start, 1)
            prompt = model.prepare_prompt(model.prompts[int(WALK.views[start])][None])
            model(frame, torch.zeros(1, 1), prompt, memory)
            memory.commit(frame)
        memory.save(path)
    return latents


def search(path: Path, picture: np.ndarray) -> tuple[list[int], list[float]]:
    """The frames most like a picture [64, 64, 3] uint8, and their similarity."""
    with RetrievalMemory.load(path, embedding=load_encoder()) as memory:
        query = memory.embedding.embed(CODEC.encode(picture[None]))
        frames, similarity = memory.index.search(query, 0, memory.committed, HITS)
    return frames[0].tolist(), similarity[0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="what to look for; default the seaside")
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw the picture, and beside it what was found")
    arguments = parser.parse_args()

    if arguments.picture:
        picture = np.array(Image.open(arguments.picture).convert("RGB").resize((world.SIZE, world.SIZE)))
    else:
        strangers = world.draw_cast(np.random.default_rng(2), videos=1)
        picture = world.render(np.array([world.VIEWS_PER_PLACE]), np.array([3]), strangers)[0]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        latents = film(path)
        print(f"the memory of {FRAMES} frames: {path.stat().st_size / 1e6:.1f} MB")
        frames, similarity = search(path, picture)
    for frame, value in zip(frames, similarity, strict=True):
        print(f"frame {frame:2d}, similarity {value:.3f}: the {PLACES[WALK.views[frame] // world.VIEWS_PER_PLACE]}")

    if arguments.output:
        found = CODEC.decode(latents[0, frames])
        strip = np.concatenate([picture, *found], axis=1)
        Image.fromarray(strip).resize((4 * strip.shape[1], 4 * strip.shape[0]), Image.Resampling.NEAREST).save(
            arguments.output
        )
        print(f"{arguments.output}: the picture, then what was found")


if __name__ == "__main__":
    main()
