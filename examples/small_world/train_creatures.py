"""Fit the small world's codec to creatures, and train their reader; a few minutes on one CPU core each.

    python examples/small_world/train_creatures.py codec --output FOLDER
    python examples/small_world/train_creatures.py reader --output FOLDER

leave FOLDER/drift_codec.safetensors, FOLDER/drift_reader.safetensors. The codec starts from the bundled one and keeps
its latents of the landscape, so that the bundled backbone and retrieval encoder still know it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from creature_data import SPOTS_PER_PLACE, CreatureWorld
from longlive_rag.files import atomic_path, output_folder
from longlive_rag.small_world import creatures, world
from longlive_rag.small_world.backbone import load_codec
from longlive_rag.small_world.codec import Codec, to_signal
from train_codec import sprite_weight

ANCHOR = 10.0  # weight of the landscape's latents staying what they were
SIGHTINGS = 4
READ_NOISE = 0.3  # what generated latents have and more
MEASURED_FRAMES, MEASURED_SEED = 200, 99


def sample_frames(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random frames, their camera positions and their worlds [count, spots, 8]."""
    views, phases = generator.integers(0, world.VIEWS, count), generator.integers(0, world.PHASES, count)
    worlds = creatures.draw_creatures(generator, count)
    frames = [creatures.render(views[i : i + 1], phases[i : i + 1], worlds[i]) for i in range(count)]
    return np.concatenate(frames), views, worlds


def step(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One step of the optimiser."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def rate(done: float) -> float:
    """Factor of the learning rate when this share of the steps is done: a short warm-up, then a cosine."""
    return min(1.0, 20 * done) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-3


def fit_reader(codec: Codec, steps: int, batch: int, learning_rate: float, seed: int) -> creatures.Reader:
    """Train on true crops and on what the codec makes of them under latent noise up to `READ_NOISE`."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    reader, latent_world = creatures.Reader(), CreatureWorld(codec)
    optimizer = torch.optim.AdamW(reader.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=1e-3)
    for done in (progress := tqdm(range(steps), desc="reader", mininterval=20)):
        crops, spots, true = sample_crops(latent_world, generator, batch, READ_NOISE * float(generator.random()))
        wanted = torch.from_numpy(creatures.coordinates(true))
        loss = F.mse_loss(reader(torch.from_numpy(crops).float(), torch.from_numpy(spots)), wanted)
        step(reader, optimizer, loss, learning_rate * rate(done / steps))
        progress.set_postfix(loss=f"{loss.item():.5f}")
    return reader.eval().requires_grad_(False)


def sample_crops(
    latent_world: CreatureWorld, generator: np.random.Generator, count: int, noise: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crops [N, CELL, CELL, 3] as the codec gives them back, their spots, and their creatures [N, 8].

    N is `count` times `SIGHTINGS` times the spots of a place: every creature is shown that often, elsewhere each time.
    """
    worlds = generator.random((count, SPOTS_PER_PLACE, len(creatures.ATTRIBUTES)))
    pictures = creatures.paint(worlds.reshape(-1, worlds.shape[-1]))
    pictures = pictures.reshape(count, SPOTS_PER_PLACE, *pictures.shape[1:]).repeat(SIGHTINGS, axis=0)
    places = generator.integers(0, world.PLACES, len(pictures))
    phases = generator.integers(0, world.PHASES, len(pictures))
    latents = latent_world.frames(places, latent_world.cells(places, phases, pictures))
    frames = latent_world.codec.decode(latents + noise * torch.randn(latents.shape))
    spots = latent_world.spots[places]
    crops = np.empty((*spots.shape, world.CELL, world.CELL, 3), np.uint8)
    for frame, here, cut in zip(frames, spots, crops, strict=True):
        for spot, crop in zip(here, cut, strict=True):
            x, y = world.SPOTS[spot][0] % world.SIZE, world.SPOTS[spot][1]
            crop[:] = frame[y : y + world.CELL, x : x + world.CELL]
    return (
        crops.reshape(-1, *crops.shape[2:]),
        spots.ravel(),
        worlds.repeat(SIGHTINGS, axis=0).reshape(crops.shape[0] * SPOTS_PER_PLACE, -1),
    )


def fit_codec(steps: int, batch: int, learning_rate: float, latent_noise: float, seed: int) -> Codec:
    """Fine-tune both halves of the bundled codec. Its normalisation stays as it is."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    codec = load_codec().requires_grad_(True)
    scene = to_signal(world.landscape()[None])
    with torch.no_grad():
        before = codec.encoder(scene)
    optimizer = torch.optim.AdamW(codec.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    for done in (progress := tqdm(range(steps), desc="codec", mininterval=20)):
        frames, views, _ = sample_frames(generator, batch)
        signal = to_signal(frames)
        latents = codec.encoder(signal)
        recon = codec.decoder(latents + latent_noise * torch.randn_like(latents))
        error = F.mse_loss(recon, signal, reduction="none")
        loss = (error * sprite_weight(views, 3.0)).mean() + ANCHOR * F.mse_loss(codec.encoder(scene), before)
        step(codec, optimizer, loss, learning_rate * rate(done / steps))
        progress.set_postfix(psnr=f"{-10 * math.log10(error.mean().item() / 4):.2f}", loss=f"{loss.item():.4f}")
    return codec.eval().requires_grad_(False)


def save(module: nn.Module, path: Path) -> None:
    """Write the weights in half precision."""
    with atomic_path(path) as partial:
        save_file({name: half(value).contiguous() for name, value in module.state_dict().items()}, partial)


def half(value: Tensor) -> Tensor:
    """Half precision, but for the counters of a normalisation."""
    return value.half() if value.is_floating_point() else value


def measure_codec(codec: Codec) -> None:
    """Print the PSNR under latent noise, and how far the landscape's latents have moved."""
    frames, _, _ = sample_frames(np.random.default_rng(MEASURED_SEED), MEASURED_FRAMES)
    for noise in (0.0, 0.1, 0.3):
        latents = codec.encode(frames)
        recon = codec.decode(latents + noise * torch.randn(latents.shape))
        error = np.square(recon.astype(np.float64) - frames).mean()
        print(f"latent noise {noise}: {10 * math.log10(255**2 / error):.2f} dB")
    scene = world.landscape()[None]
    moved = (codec.encode(scene) - load_codec().encode(scene)).square().mean()
    print(f"the landscape's latents moved by {moved.sqrt():.5f} (root mean square)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["codec", "reader"])
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights; created if missing")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--latent-noise", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    output = output_folder(options.output)
    path = output / "drift_codec.safetensors"
    if options.what == "codec":
        codec = fit_codec(options.steps, options.batch, options.learning_rate, options.latent_noise, options.seed)
        save(codec, path)
        measure_codec(codec)
        return
    codec = load_codec(path)
    reader = fit_reader(codec, options.steps, options.batch, options.learning_rate, options.seed)
    save(reader, output / "drift_reader.safetensors")
    for noise in (0.0, 0.1, 0.3):
        crops, spots, true = sample_crops(
            CreatureWorld(codec), np.random.default_rng(MEASURED_SEED), MEASURED_FRAMES, noise
        )
        error = creatures.attribute_error(reader.read(crops, spots), true).mean(axis=0)
        each = ", ".join(f"{name} {value:.4f}" for name, value in zip(creatures.ATTRIBUTES, error, strict=True))
        print(f"latent noise {noise}: error {error.mean():.4f} ({each})")


if __name__ == "__main__":
    main()
