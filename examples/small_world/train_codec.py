"""Train the small world's codec; a few minutes on one CPU core.

    python examples/small_world/train_codec.py --output FOLDER

leaves FOLDER/codec.safetensors.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from longlive_rag.files import atomic_path, output_folder
from longlive_rag.small_world import world
from longlive_rag.small_world.codec import Codec, to_signal

MEASURED_FRAMES, MEASURED_SEED = 400, 99


def sample_frames(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random frames and their camera positions."""
    views = generator.integers(0, world.VIEWS, count)
    phases = generator.integers(0, world.PHASES, count)
    return world.render(views, phases, world.draw_cast(generator, count)), views


def sprite_weight(views: np.ndarray, weight: float) -> torch.Tensor:
    """[N, 1, SIZE, SIZE]: `weight` where an inhabitant may stand, since they must be remembered; 1 elsewhere."""
    mask = np.ones((len(views), 1, world.SIZE, world.SIZE), np.float32)
    for index, view in enumerate(views):
        for x, y in world.SPOTS:
            left, right = x - view * world.STRIDE, x - view * world.STRIDE + world.CELL
            if right > 0 and left < world.SIZE:
                mask[index, 0, y : y + world.CELL, max(left, 0) : right] = weight
    return torch.from_numpy(mask)


def train(steps: int, batch: int, learning_rate: float, latent_noise: float, seed: int) -> Codec:
    """Train with the mean square error under latent noise, AdamW and a cosine schedule."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    codec = Codec()
    optimizer = torch.optim.AdamW(codec.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-3
    )
    for _ in (progress := tqdm(range(steps), desc="codec", mininterval=5)):
        frames, views = sample_frames(generator, batch)
        signal = to_signal(frames)
        latents = codec.encoder(signal)
        recon = codec.decoder(latents + latent_noise * torch.randn_like(latents))
        error = F.mse_loss(recon, signal, reduction="none")
        loss = (error * sprite_weight(views, 3.0)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(psnr=f"{-10 * math.log10(error.mean().item() / 4):.2f}")
    return codec.eval()


def measure(codec: Codec, noise: float) -> tuple[float, float]:
    """PSNR in dB, and the share of sprites that still decode, under latent noise of this standard deviation."""
    generator = np.random.default_rng(MEASURED_SEED)
    views = generator.integers(0, world.VIEWS, MEASURED_FRAMES)
    cast = world.draw_cast(generator, MEASURED_FRAMES)
    frames = world.render(views, generator.integers(0, world.PHASES, MEASURED_FRAMES), cast)
    latents = codec.encode(frames)
    noises = torch.randn(latents.shape, generator=torch.Generator().manual_seed(MEASURED_SEED))
    recon = codec.decode(latents + noise * noises)
    error = np.square(recon.astype(np.float64) - frames).mean()
    decoded, _ = world.decode(recon, views)
    seen = decoded >= 0
    return 10 * math.log10(255**2 / error), float((decoded[seen] == cast[seen]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights; created if missing")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--latent-noise", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    output = output_folder(options.output)
    codec = train(options.steps, options.batch, options.learning_rate, options.latent_noise, options.seed)
    for noise in (0.0, 0.1, 0.3, 0.5):
        psnr, accuracy = measure(codec, noise)
        print(f"latent noise {noise}: {psnr:.2f} dB, identity {accuracy:.4f}")
    with atomic_path(output / "codec.safetensors") as partial:
        save_file({name: value.contiguous() for name, value in codec.state_dict().items()}, partial)


if __name__ == "__main__":
    main()
