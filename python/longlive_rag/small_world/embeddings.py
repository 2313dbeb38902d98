"""Embeddings compared: on the small world, where the right frame is known, and on files where it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_rag import figures
from longlive_rag.config import RetrievalConfig
from longlive_rag.embedding import Embedding
from longlive_rag.generation.video import VideoReader
from longlive_rag.intervals import bootstrap_interval
from longlive_rag.small_world import measure, world
from longlive_rag.small_world.backbone import SmallBackbone
from longlive_rag.small_world.codec import LATENT_SHAPE, Codec
from longlive_rag.small_world.corpus import encode_frames
from longlive_rag.small_world.policies import POLICIES
from longlive_rag.small_world.retrieval_quality import (
    RetrievalQuality,
    effective_rank,
    retrieval_quality,
    similarity_by_lag,
)
from longlive_rag.training.latents import SUFFIXES, LatentVideo

LONGEST_LAG = 60
QUERIES = ("latest", "draft")
SEED, NOISE = 10_000, 0.3
ROLLOUT_TRACK, ROLLOUT_LAPS = "pans", 4
ROLLOUT_SEED = 5000  # of tuning; the benchmark's own stays unseen
_COLUMNS = ("same place", "nearest beat", "margin", "newest asks")
_PIXELS_PER_LATENT, _PICTURES_PER_LATENT = 8, 4  # of Wan's VAE


@dataclass(frozen=True)
class WorldVideos:
    """True videos of the small world.

    videos: (walk, latents [T, C, H, W]) of every video.
    drafts: [VIEWS, PHASES, C, H, W]: what a generator without memory expects at a camera position and beat, the mean
        over the inhabitants that may live there.
    """

    videos: list[tuple[world.Walk, Tensor]]
    drafts: Tensor


def world_videos(codec: Codec, videos: int = 8, frames: int = 160, draws: int = 24) -> WorldVideos:
    """The benchmark's camera walks with casts of their own, `videos` for each track; `draws` casts make a draft.

    All latents get noise of standard deviation `NOISE` (theirs is 1), since generated ones are not exact.
    """
    generator = np.random.default_rng(SEED)
    views, phases = (axis.ravel() for axis in np.mgrid[: world.VIEWS, : world.PHASES])
    expected = torch.zeros(len(views), *LATENT_SHAPE)
    for _ in range(draws):
        expected += encode_frames(codec, views, phases, world.draw_cast(generator, len(views))) / draws
    made = []
    for track in world.TRACKS:
        walk = world.walk(track, frames)
        for cast in world.draw_cast(generator, videos):
            made.append((walk, encode_frames(codec, walk.views, walk.phases, cast)))
    noises = torch.Generator().manual_seed(SEED)

    def noisy(latents: Tensor) -> Tensor:
        return latents + NOISE * torch.randn(latents.shape, generator=noises)

    drafts = noisy(expected).unflatten(0, (world.VIEWS, world.PHASES))
    return WorldVideos([(walk, noisy(latents)) for walk, latents in made], drafts)


def measure_on_world(embedding: Embedding, truth: WorldVideos, config: RetrievalConfig) -> dict[str, Any]:
    """Quality at arrivals, for each track and query, with 95% intervals over videos; similarity by lag; effective rank.

    The query "latest" is the frame before; "draft" is the expectation of `WorldVideos.drafts`.
    """
    drafts = embedding.embed(truth.drafts.flatten(0, 1)).unflatten(0, truth.drafts.shape[:2])
    found: dict[tuple[str, str], list[RetrievalQuality]] = {}
    ranks, lags = [], []
    for walk, latents in truth.videos:
        embeddings = embedding.embed(latents)
        asked = {"latest": embeddings.roll(1, dims=0), "draft": drafts[walk.views, walk.phases]}
        for query in QUERIES:
            quality = retrieval_quality(embeddings, asked[query], walk, config, arrivals_only=True)
            if quality is not None:
                found.setdefault((walk.track, query), []).append(quality)
        ranks.append(effective_rank(embeddings))
        lags.append((walk.track, similarity_by_lag(embeddings, LONGEST_LAG)))
    return {
        "dimension": drafts.shape[-1],
        "tracks": {
            track: {
                "queries": {query: _summary(found[track, query]) for query in QUERIES if (track, query) in found},
                "similarity_by_lag": np.mean([curve for name, curve in lags if name == track], axis=0).tolist(),
            }
            for track in dict.fromkeys(name for name, _ in lags)
        },
        "effective_rank": float(np.mean(ranks)),
    }


def measure_in_rollouts(embedding: Embedding, model: SmallBackbone, codec: Codec, videos: int) -> dict[str, float]:
    """Share of inhabitants that are still themselves when they come back, where memory is searched by this embedding.

    Roll-outs of the "retrieval" policy on pans, first lap given, so that real drafts ask. Mean, 95% interval over
    videos, and chance.
    """
    walk = world.walk(ROLLOUT_TRACK, world.lap_frames(ROLLOUT_TRACK, ROLLOUT_LAPS))
    policy = POLICIES["retrieval"]
    score, _ = measure.measure(
        model, codec, policy, walk, seed=ROLLOUT_SEED, videos=videos, given=True, embedding=embedding
    )
    return {**score.interval(), "chance": round(score.chance, 4)}


def measure_alone(embedding: Embedding, latents: Tensor) -> dict[str, Any] | None:
    """What can be said of latents [T, C, H, W] without a known truth; None if the embedding is for other latents."""
    try:
        embeddings = embedding.embed(latents)
    except ValueError:
        return None
    return {
        "dimension": embeddings.shape[-1],
        "effective_rank": effective_rank(embeddings),
        "similarity_by_lag": similarity_by_lag(embeddings, LONGEST_LAG),
    }


def read_latents_or_video(path: Path) -> Tensor:
    """Latents [T, C, H, W] of a file; of a video, for which there is no VAE here, its pictures at a VAE's resolution.

    These stand-ins are [T, 3, H, W] in -1 .. 1: every fourth picture, each pixel the mean of 8 x 8.
    """
    if path.suffix in SUFFIXES:
        return LatentVideo.open(path).read()
    with VideoReader(path) as reader:
        pictures = [
            F.avg_pool2d(torch.from_numpy(picture).permute(2, 0, 1).float(), _PIXELS_PER_LATENT)
            for number, picture in enumerate(reader)
            if number % _PICTURES_PER_LATENT == 0
        ]
    return torch.stack(pictures) / 127.5 - 1


def comparison_table(report: Mapping[str, Any]) -> str:
    """One line per embedding: what draft and newest frame find on each track, rank, roll-outs if there are any."""
    columns = [f"{track} {name}" for track in world.TRACKS for name in _COLUMNS]
    rows: list[tuple[str, ...]] = [("embedding", "D", *columns, "rank", "pans roll-outs")]
    for name, result in report["small_world"].items():
        cells = []
        for track in world.TRACKS:
            queries = result["tracks"][track]["queries"]
            draft, latest = queries["draft"], queries["latest"]
            cells += [_interval(draft["precision_at_1"]), _interval(draft["best_at_1"])]
            cells += [f"{draft['margin']['mean']:+.3f}", f"{latest['precision_at_1']['mean']:.3f}"]
        rollouts = _interval(result["rollouts"]) if "rollouts" in result else "-"
        rows.append((name, str(result["dimension"]), *cells, f"{result['effective_rank']:.1f}", rollouts))
    lines = ["small world, at arrivals (95% interval over videos)", *_aligned(rows)]
    for path, results in report["files"].items():
        rows = [("embedding", "D", "rank", "similarity at lag 1", "8", "30")]
        for name, result in results.items():
            if result is None:
                rows.append((name, "-", "-", "for other latents", "-", "-"))
                continue
            curve = result["similarity_by_lag"]
            at = [f"{curve[lag - 1]:.4f}" if lag <= len(curve) else "-" for lag in (1, 8, 30)]
            rows.append((name, str(result["dimension"]), f"{result['effective_rank']:.1f}", *at))
        lines += ["", path, *_aligned(rows)]
    return "\n".join(lines)


def draw_comparison(report: Mapping[str, Any], path: Path) -> None:
    """What each embedding finds, and its similarity against time lag, on the small world and in each file."""
    measured = report["small_world"]
    files = {name: {k: v for k, v in results.items() if v} for name, results in report["files"].items()}
    colours = {name: f"C{index % 10}" for index, name in enumerate(measured)}
    figure = figures.figure(14, 11 if files else 7.5)
    rows = figure.add_gridspec(3 if files else 2, 1)
    top, middle = rows[0].subgridspec(1, len(world.TRACKS)), rows[1].subgridspec(1, len(world.TRACKS))
    for column, track in enumerate(world.TRACKS):
        axes = figure.add_subplot(top[column])
        for row, (name, result) in enumerate(measured.items()):
            for offset, metric, alpha in ((-0.18, "precision_at_1", 1.0), (0.18, "best_at_1", 0.45)):
                value = result["tracks"][track]["queries"]["draft"][metric]
                error = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
                axes.barh(row + offset, value["mean"], 0.34, xerr=error, color=colours[name], alpha=alpha)
        axes.set_yticks(range(len(measured)), list(measured))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.02)
        axes.set_title(f"{track}: found by a draft, same place (dark) at the nearest beat (light)", fontsize=10)
        axes = figure.add_subplot(middle[column])
        for name, result in measured.items():
            _draw_lags(axes, name, result["tracks"][track]["similarity_by_lag"], colours[name])
        axes.set_title(f"{track}: similarity against time lag (colours as above)", fontsize=10)
    bottom = rows[-1].subgridspec(1, max(1, len(files)))
    for column, (file, results) in enumerate(files.items()):
        axes = figure.add_subplot(bottom[column])
        for name, result in results.items():
            _draw_lags(axes, name, result["similarity_by_lag"], colours[name])
        axes.set_title(f"{Path(file).name}: similarity against time lag", fontsize=10)
    figures.save(figure, path)


def _draw_lags(axes: Any, name: str, curve: Sequence[float], colour: str) -> None:
    axes.plot(range(1, len(curve) + 1), curve, color=colour, label=name, linewidth=1.3)
    axes.set_xlabel("latent frames apart")
    axes.set_ylabel("mean cosine")
    axes.grid(alpha=0.25)


def _summary(qualities: list[RetrievalQuality]) -> dict[str, dict[str, float]]:
    """Mean and 95% bootstrap interval over videos of every measure."""
    values = np.array([list(asdict(quality).values()) for quality in qualities])
    low, high = bootstrap_interval(values, draws=1000)
    names = asdict(qualities[0])
    return {
        name: {"mean": float(mean), "low": float(below), "high": float(above)}
        for name, mean, below, above in zip(names, values.mean(axis=0), low, high, strict=True)
    }


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [f"{row[0]:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
