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
from torch import nn
from tqdm import tqdm

from longlive_rag.files import atomic_path, output_folder
from longlive_rag.small_world import creatures, world
from longlive_rag.small_world.backbone import load_codec
from longlive_rag.small_world.codec import Codec, to_signal
from train_codec import sprite_weight

ANCHOR = 10.0  # weight of the landscape's latents staying what they were
MEASURED_FRAMES, MEASURED_SEED = 200, 99


def sample_frames(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random frames, their camera positions and their worlds [count, spots, 8]."""
    views, phases = generator.integers(0, world.VIEWS, count), generator.integers(0, world.PHASES, count)
    worlds = creatures.draw_creatures(generator, count)
    frames = [creatures.render(views[i : i + 1], phases[i : i + 1], worlds[i]) for i in range(count)]
    return np.concatenate(frames), views, worlds


def optimise(module: nn.Module, steps: int, learning_rate: float, name: str):
    """Yields an index per step; the caller sets `loss` with send."""
    optimizer = torch.optim.AdamW(module.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-3
    )
    for _ in (progress := tqdm(range(steps), desc=name, mininterval=20)):
        loss = yield
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")


def fit_codec(steps: int, batch: int, learning_rate: float, latent_noise: float, seed: int) -> Codec:
    """Fine-tune both halves of the bundled codec. Its normalisation stays as it is."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    codec = load_codec().requires_grad_(True)
    scene = to_signal(world.landscape()[None])
    with torch.no_grad():
        before = codec.encoder(scene)
    optimizer = torch.optim.AdamW(codec.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-3
    )
    for _ in (progress := tqdm(range(steps), desc="codec", mininterval=20)):
        frames, views, _ = sample_frames(generator, batch)
        signal = to_signal(frames)
        latents = codec.encoder(signal)
        recon = codec.decoder(latents + latent_noise * torch.randn_like(latents))
        error = F.mse_loss(recon, signal, reduction="none")
        loss = (error * sprite_weight(views, 3.0)).mean() + ANCHOR * F.mse_loss(codec.encoder(scene), before)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(psnr=f"{-10 * math.log10(error.mean().item() / 4):.2f}", loss=f"{loss.item():.4f}")
    return codec.eval().requires_grad_(False)


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
    codec = fit_codec(options.steps, options.batch, options.learning_rate, options.latent_noise, options.seed)
    with atomic_path(output / "drift_codec.safetensors") as partial:
        save_file({name: value.contiguous() for name, value in codec.state_dict().items()}, partial)
    generator = np.random.default_rng(MEASURED_SEED)
    frames, _, _ = sample_frames(generator, MEASURED_FRAMES)
    for noise in (0.0, 0.1, 0.3):
        latents = codec.encode(frames)
        recon = codec.decode(latents + noise * torch.randn(latents.shape))
        error = np.square(recon.astype(np.float64) - frames).mean()
        print(f"latent noise {noise}: {10 * math.log10(255**2 / error):.2f} dB")
    scene = to_signal(world.landscape()[None])
    print("landscape latents moved", (codec.encoder(scene) - load_codec().encoder(scene)).square().mean().item())


if __name__ == "__main__":
    main()
