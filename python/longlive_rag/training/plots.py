"""The picture of a training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from longlive_rag import figures
from longlive_rag.embedding import Embedding
from longlive_rag.training.latents import LatentVideo

_NAMES = {"reconstruction": "reconstruction", "delta": "temporal delta", "smooth": "smoothing", "total": "total"}
_MOST_FRAMES = 160  # of a similarity matrix: more would be too small to see


def similarity_matrix(embedding: Embedding, video: LatentVideo) -> np.ndarray:
    """Cosine similarity between the latent frames of a video, at most the first 160: [T, T]."""
    latents = video.read(0, min(video.frames, _MOST_FRAMES))
    with torch.no_grad():
        unit = F.normalize(embedding.embed(latents).float(), dim=-1)
    return (unit @ unit.T).numpy()


def draw_training(path: Path, metrics: Path, before: np.ndarray, after: np.ndarray, video_name: str) -> None:
    """Draw the loss curves of the metrics file, and the similarity matrix of a held-out video before and after."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    epochs = [line["epoch"] + 1 for line in lines]
    figure = figures.figure(13, 5.6)
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 1))
    left = grid[0, 0].subgridspec(2, 2)
    for place, (term, name) in zip((left[0, 0], left[0, 1], left[1, 0], left[1, 1]), _NAMES.items(), strict=True):
        axes = figure.add_subplot(place)
        for kind, colour in (("train", "#8aa4c8"), ("validation", "#b5442e")):
            axes.plot(epochs, [line[kind][term] for line in lines], color=colour, label=kind, linewidth=1.4)
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.25)
        if min(line[kind][term] for line in lines for kind in ("train", "validation")) > 0:
            axes.set_yscale("log")
        if term == "reconstruction":
            axes.legend(fontsize=8)
        if term in ("smooth", "total"):
            axes.set_xlabel("epoch")
    right = grid[0, 1].subgridspec(1, 2)
    for column, (name, matrix) in enumerate((("before training", before), ("after", after))):
        axes = figure.add_subplot(right[0, column])
        image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axes.set_title(f"similarity {name}", fontsize=10)
        axes.set_xlabel("latent frame")
        if column == 0:
            axes.set_ylabel(f"latent frame of {video_name} (held out)")
    figure.colorbar(image, ax=figure.axes[-2:], shrink=0.6, label="cosine")
    figures.save(figure, path, dpi=110)
