"""Train the small world's backbone; about an hour on one CPU core.

    python examples/small_world/train_backbone.py --output FOLDER
    python examples/small_world/train_backbone.py --output FOLDER --inhabitants creatures \\
        --start python/longlive_rag/small_world/assets/backbone.safetensors --codec FOLDER/drift_codec.safetensors

leaves FOLDER/backbone.safetensors, and FOLDER/backbone.state for --resume. Teacher forcing over chunks of 16 frames:
each frame has one clean stream (timestep 0) and two noisy ones, and all of them attend to exactly what the frame would
find in a cached roll-out (`JointAttention`).
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import creature_data
import crowd_data
import training_data
from joint_attention import JointAttention
from longlive_rag import rotary
from longlive_rag.files import atomic_path, load_checkpoint, output_folder
from longlive_rag.small_world.backbone import ASSETS, SmallBackbone, load_backbone, load_codec
from longlive_rag.small_world.codec import Codec
from training_data import Batch

SAVE_EVERY = 120  # seconds
EMA_DECAY = 0.998
WORDS = ("prompts", "text_embedding.")  # beside the cross-attention
WORLDS: dict[str, tuple[Callable[[Codec], Any], Callable[[Any, np.random.Generator, int], Batch]]] = {
    "sprites": (training_data.LatentWorld, training_data.draw_batch),
    "creatures": (creature_data.CreatureWorld, creature_data.draw_batch),
    "crowd": (training_data.LatentWorld, crowd_data.draw_batch),
}
START_PROMPTS: dict[str, Callable[[Tensor], Tensor]] = {"crowd": crowd_data.start_prompts}
"""What a world makes of the prompts that it starts from; default the same."""


class BackboneTrainer:
    """The model, its moving average and its optimiser.

    Args:
        steps: of the whole training, along which the learning rate falls.
        warm_up: steps until the learning rate is reached.
        start: weights to begin with; default random ones.
        words_only: train, average and save only how prompts are read: prompts, text embedding and cross-attention.
        prompts: makes the prompts to begin with of those of `start`; default the same.
    """

    def __init__(
        self,
        steps: int,
        learning_rate: float,
        seed: int,
        *,
        warm_up: int = 100,
        start: Path | None = None,
        words_only: bool = False,
        prompts: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.steps, self.learning_rate, self.seed, self.warm_up = steps, learning_rate, seed, warm_up
        self.step = 0
        self.model = load_backbone(start).requires_grad_(True).train() if start else SmallBackbone()
        if prompts:
            with torch.no_grad():
                self.model.prompts.copy_(prompts(self.model.prompts))
        if words_only:
            for name, value in self.model.named_parameters():
                value.requires_grad_(name.startswith(WORDS) or ".cross_attn." in name)
        named = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.average = {name: value.detach().clone() for name, value in named.items()}
        decayed = [name for name, value in named.items() if value.ndim >= 2 and name != "prompts"]
        groups = [
            {"params": [named[name] for name in decayed], "weight_decay": 0.01},
            {"params": [value for name, value in named.items() if name not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.98))
        head_dim = self.model.head_dim
        self.spatial = rotary.spatial_rotation(*self.model.token_grid(8, 8), head_dim)
        self.frequencies = rotary.temporal_frequencies(head_dim)
        self.compiled_loss = torch.compile(self.loss, dynamic=False)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weighted mean square error of the clean prediction, and the error of each noisy frame."""
        attention = JointAttention(batch.context, batch.distance, batch.used, self.spatial, self.frequencies)
        prompt = [(k[batch.views], v[batch.views]) for k, v in self.model.prepare_prompt(self.model.prompts)]
        clean = self.model.predict_clean(batch.latents, batch.timestep, prompt, attention)
        chunks, noisy, frames = batch.target.shape[:3]
        clean = clean.view(chunks, 1 + noisy, frames, *batch.target.shape[3:])[:, 1:]
        error = (clean - batch.target).square() * batch.weight
        return error.mean(), error.detach().mean(dim=(3, 4, 5))

    def rate(self) -> float:
        """Factor of the learning rate: linear warm-up, then a cosine over `steps`."""
        part = min(1.0, self.step / self.steps)
        return min(1.0, (self.step + 1) / self.warm_up) * (0.5 + 0.5 * math.cos(math.pi * part)) + 0.005

    def train_step(self, batch: Batch) -> tuple[float, Tensor]:
        loss, errors = self.compiled_loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self.rate()
        self.optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, 1 - (self.step + 1) ** -0.9)
        with torch.no_grad():
            current = self.model.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [current[name] for name in self.average], 1 - decay)
        return loss.item(), errors

    def save(self, path: Path) -> None:
        """Write the average to `path` in half precision, and what resuming needs beside it."""
        with atomic_path(path) as partial:
            save_file({name: value.half().contiguous() for name, value in self.average.items()}, partial)
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        with atomic_path(path.with_suffix(".state")) as partial:
            torch.save(state, partial)

    def resume(self, path: Path) -> None:
        state = load_checkpoint(path.with_suffix(".state"))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step = state["average"], state["step"]
        torch.manual_seed(self.seed + self.step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights; created if missing")
    parser.add_argument(
        "--codec",
        type=Path,
        default=ASSETS / "codec.safetensors",
        help="weights of the codec; default bundled",
    )
    parser.add_argument("--steps", type=int, default=2800, help="of the training; default 2800")
    parser.add_argument("--start", type=Path, help="weights to begin with; default random ones")
    parser.add_argument(
        "--inhabitants",
        choices=list(WORLDS),
        default="sprites",
        help="of the codebook, without one, or hosts and guests of the codebook; default sprites",
    )
    parser.add_argument("--chunks", type=int, default=8, help="chunks in a batch; default 8")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--warm-up", type=int, default=100, help="steps until that rate is reached; default 100")
    parser.add_argument(
        "--words-only", action="store_true", help="train and save only how prompts are read, a quarter of the weights"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue the training in the folder")
    options = parser.parse_args()

    weights = output_folder(options.output) / "backbone.safetensors"
    prompts = START_PROMPTS.get(options.inhabitants)
    trainer = BackboneTrainer(
        options.steps,
        options.learning_rate,
        options.seed,
        warm_up=options.warm_up,
        start=options.start,
        words_only=options.words_only,
        prompts=prompts,
    )
    if options.resume:
        trainer.resume(weights)
    generator = np.random.default_rng([options.seed, trainer.step])
    open_world, draw_batch = WORLDS[options.inhabitants]
    latent_world = open_world(load_codec(options.codec))
    saved = begun = time.monotonic()
    by_level = defaultdict(list)
    while trainer.step < options.steps:
        batch = draw_batch(latent_world, generator, options.chunks)
        loss, errors = trainer.train_step(batch)
        level = batch.timestep.view(options.chunks, -1, training_data.CHUNK)[:, 1:] / 1000
        for value in training_data.noise_levels().tolist():
            chosen = (level - value).abs() < 1e-4
            by_level[value].append((errors[chosen] * (level[chosen] + 0.1)).mean().item())
        if trainer.step % 25 == 0:
            levels = " ".join(f"{value:.2f}:{np.nanmean(values):.4f}" for value, values in by_level.items())
            minutes = (time.monotonic() - begun) / 60
            print(f"step {trainer.step} minutes {minutes:.2f} loss {loss:.4f} {levels}", flush=True)
            by_level.clear()
        if time.monotonic() - saved > SAVE_EVERY:
            trainer.save(weights)
            saved = time.monotonic()
    trainer.save(weights)


if __name__ == "__main__":
    main()
