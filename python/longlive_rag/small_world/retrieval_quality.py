"""Does an embedding find the right frame? Measured where the right frame is known, or on the embeddings alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_rag.config import RetrievalConfig
from longlive_rag.context import ContextPlan
from longlive_rag.small_world.world import PHASES, Walk


@dataclass(frozen=True)
class RetrievalQuality:
    """Means over the blocks of a video. Right: a frame of the block's own camera position."""

    precision_at_1: float
    """Share of blocks whose most similar frame is right."""
    precision_at_k: float
    """Right ones among the K most similar frames."""
    recall_at_k: float
    """Right ones found, of those that K frames could hold."""
    best_at_1: float
    """Share of blocks whose most similar frame is right and no other right one is nearer in the motion's phase."""
    margin: float
    """Similarity of the best right frame minus that of the best wrong one."""
    blocks: int
    """Blocks asked."""


class _Answer(NamedTuple):
    """What one block found; the terms of `RetrievalQuality`'s means."""

    precision_at_1: float
    precision_at_k: float
    recall_at_k: float
    best_at_1: float
    margin: float


def retrieval_quality(
    embeddings: Tensor, queries: Tensor, walk: Walk, config: RetrievalConfig, arrivals_only: bool = False
) -> RetrievalQuality | None:
    """Ask for every block that has both right and wrong candidates.

    Args:
        embeddings: [T, D], one a frame.
        queries: [T, D]; row s is what the block that starts at frame s asks with.
        walk: the truth about these T frames.
        config: candidates (context, sink, recency guard) and K are those of generation.
        arrivals_only: only blocks whose place is not that of the frame before.

    Returns:
        None if no block could be asked.
    """
    unit, queries = F.normalize(embeddings.float(), dim=-1), F.normalize(queries.float(), dim=-1)
    answers = []
    for start in range(0, len(walk.views), config.block_frames):
        candidates = ContextPlan(config, start, config.block_frames).candidates
        arrives = start > 0 and walk.views[start] != walk.views[start - 1]
        if not candidates or (arrivals_only and not arrives):
            continue
        here = slice(candidates.start, candidates.stop)
        right = walk.views[here] == walk.views[start]
        if right.all() or not right.any():
            continue
        similarity = (unit[here] @ queries[start]).cpu().numpy()
        top = np.argsort(-similarity, kind="stable")[: config.memory_frames]
        apart = np.abs(walk.phases[here] - walk.phases[start]) % PHASES
        apart = np.minimum(apart, PHASES - apart)
        found, possible = right[top].sum(), min(config.memory_frames, right.sum())
        answers.append(
            _Answer(
                precision_at_1=right[top[0]],
                precision_at_k=found / len(top),
                recall_at_k=found / possible,
                best_at_1=right[top[0]] and apart[top[0]] == apart[right].min(),
                margin=similarity[right].max() - similarity[~right].max(),
            )
        )
    if not answers:
        return None
    means = _Answer(*np.mean(answers, axis=0).tolist())
    return RetrievalQuality(**means._asdict(), blocks=len(answers))


def similarity_by_lag(embeddings: Tensor, longest: int) -> list[float]:
    """Mean cosine similarity of frames 1, 2 .. `longest` apart, of [T, D]."""
    unit = F.normalize(embeddings.float(), dim=-1)
    lags = range(1, min(longest, len(unit) - 1) + 1)
    return [float((unit[lag:] * unit[:-lag]).sum(dim=-1).mean()) for lag in lags]


def effective_rank(embeddings: Tensor) -> float:
    """exp(entropy) of the normalised singular values of the centred unit embeddings [T, D]: directions in use.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    unit = F.normalize(embeddings.double(), dim=-1)
    values = torch.linalg.svdvals(unit - unit.mean(dim=0))
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())
