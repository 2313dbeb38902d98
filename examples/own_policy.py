"""A policy of your own: which frames come back.

    python examples/own_policy.py

The most similar frames are often neighbours and show the same thing. This policy wants them `gap` frames apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longlive_rag import RetrievalConfig, rollout
from longlive_rag.index import LatentIndex
from longlive_rag.models import CausalWanModel
from longlive_rag.selection import Request, Selection, SimilaritySelection


class SpacedSelection:
    """The most similar candidates that are at least `gap` frames apart."""

    def __init__(self, gap: int) -> None:
        self.gap = gap

    def select(self, request: Request, index: LatentIndex) -> tuple[Tensor, Tensor]:
        """Frames int32 [B, k], unused entries negative, and their similarity float32 [B, k]."""
        first, last = request.candidates.start, request.candidates.stop
        ranked, _ = index.search(request.query, first, last, min(64, len(request.candidates)))
        frames = torch.full((ranked.shape[0], request.k), -1, dtype=torch.int32)
        for sample, row in enumerate(ranked.tolist()):
            chosen: list[int] = []
            for frame in row:
                if len(chosen) < request.k and all(abs(frame - other) >= self.gap for other in chosen):
                    chosen.append(frame)
            frames[sample, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        frames = frames.to(request.query.device)
        return frames, index.similarity(request.query, frames)


def main() -> None:
    torch.manual_seed(0)
    model = CausalWanModel(
        dim=64, ffn_dim=64, freq_dim=32, text_dim=16, text_len=4, num_heads=2, num_layers=2
    ).eval()  # random weights stand for a checkpoint
    frames = 60
    # Latents that wander slowly, so that neighbours are alike.
    noise = torch.randn(1, frames, 16, 1, 1).cumsum(dim=1) / 3 + 0.3 * torch.randn(1, frames, 16, 4, 4)
    prompt = torch.randn(1, 4, 16)
    config = RetrievalConfig(memory_frames=4, recency_guard=2)
    policies: dict[str, Selection] = {"most similar": SimilaritySelection(), "8 frames apart": SpacedSelection(gap=8)}
    for name, selection in policies.items():
        result = rollout(model, noise, prompt, config, selection=selection, denoising_steps=[1000, 500])
        last = result.retrieved[-1]
        print(f"{name}: the block at frame {last.block_start} saw frames {sorted(last.frames[0])}")


if __name__ == "__main__":
    main()
