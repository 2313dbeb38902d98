"""A corpus from the public Wan-family checkpoints."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from longlive_rag.config import PAPER_STEPS, RetrievalConfig
from longlive_rag.generation.prompts import read_prompts
from longlive_rag.generation.rollout import Prompts
from longlive_rag.generation.text_encoder import PromptEncoder
from longlive_rag.generation.wan_files import BACKBONES, find_checkpoint, find_wan_files
from longlive_rag.models.checkpoints import load_causal_wan
from longlive_rag.training.sources import GeneratorSource

NATIVE = RetrievalConfig(sink_frames=3, memory_frames=0, recency_guard=0, positions="absolute")
"""Sink and sliding window of the published corpus (LongLive-RAG, configs/generate_latent.yaml)."""
TIMESTEP_SHIFT = 5.0
VAE_FACTOR = 8


def wan_source(
    backbone: str,
    checkpoint: Path | None,
    lora: Path | None,
    wan_dir: Path | None,
    prompts: Path | None,
    *,
    height: int,
    width: int,
    frames: int,
    seed: int,
    device: torch.device,
) -> GeneratorSource:
    """Load a generator and encode its prompts; videos go through the prompts in turn.

    Args:
        backbone: a name of `wan_files.BACKBONES`.
        height, width: of the video in pixels, multiples of 16.

    Raises:
        ValueError, OSError: something is missing, damaged or does not fit; raised before anything large is loaded if
            possible.
    """
    if wan_dir is None or prompts is None:
        name = "wan_dir, the folder of Wan's text encoder," if wan_dir is None else "prompts, a text file,"
        raise ValueError(f"{name} must be given for source {backbone}, got none")
    if min(height, width) < 2 * VAE_FACTOR or height % (2 * VAE_FACTOR) or width % (2 * VAE_FACTOR):
        raise ValueError(f"height and width must be multiples of {2 * VAE_FACTOR} pixels, got {height} x {width}")
    if frames % NATIVE.block_frames:
        raise ValueError(f"frames must be whole blocks of {NATIVE.block_frames} latent frames, got {frames}")
    weights, texts = find_checkpoint(backbone, checkpoint), read_prompts(prompts)
    files = find_wan_files(wan_dir)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = PromptEncoder(files, device=device, dtype=dtype)
    embeds: list[Tensor] = [encoder.encode(text).to("cpu") for text in tqdm(texts, desc="prompts", unit="prompt")]
    del encoder  # larger than the generator
    gc.collect()
    model = load_causal_wan(weights, weight_keys=BACKBONES[backbone].weight_keys, lora=lora, device=device, dtype=dtype)
    if model.text_dim != embeds[0].shape[-1]:
        raise ValueError(f"{weights} takes prompts of width {model.text_dim}, {wan_dir} makes {embeds[0].shape[-1]}")

    def pool(number: int) -> tuple[Prompts, dict[str, str]]:
        which = number % len(texts)
        return embeds[which][None].to(device), {"prompt": texts[which]}

    shape = (model.in_dim, height // VAE_FACTOR, width // VAE_FACTOR)
    source = GeneratorSource(
        model,
        pool,
        shape,
        frames,
        NATIVE,
        denoising_steps=PAPER_STEPS,
        timestep_shift=TIMESTEP_SHIFT,
        seed=seed,
        name=f"{backbone} {weights.name}",
    )
    source.settings |= {
        "lora": lora.name if lora else "none",
        "prompts": hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16],
    }
    return source
