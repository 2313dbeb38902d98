"""Retrieval memory in a model of your own: the engine is four calls.

python examples/your_own_model.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longlive_rag import RetrievalConfig, RetrievalMemory
from longlive_rag.embedding import AveragePool

DIM, HEADS, LAYERS, CHANNELS = 64, 2, 2, 16
ROWS, COLUMNS = 4, 6
BLOCK = 3


class Model(nn.Module):
    """Predicts the clean latents of a block [B, F, C, H, W]. Its attention is the memory's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS, DIM), nn.Linear(DIM, CHANNELS)
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(LAYERS))

    def forward(self, latents: Tensor, memory: RetrievalMemory) -> Tensor:
        x = self.embed(latents.permute(0, 1, 3, 4, 2).flatten(2, 3))  # [B, F, T, DIM]
        for layer in range(LAYERS):
            # [B, F, T, H, D] each; the memory turns them by their positions, and normalises them if given weights.
            q, k, v = self.qkv[layer](x).unflatten(-1, (3, HEADS, DIM // HEADS)).unbind(-3)
            x = x + self.out[layer](memory.attend(layer, q, k, v).flatten(2)).view_as(x)
        return self.head(x).unflatten(2, (ROWS, COLUMNS)).permute(0, 1, 4, 2, 3)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = Model()
    memory = RetrievalMemory(
        RetrievalConfig(context_frames=12, sink_frames=1, memory_frames=6, recency_guard=2, block_frames=BLOCK),
        batch=1,
        layers=LAYERS,
        heads=HEADS,
        head_dim=DIM // HEADS,
        grid=(ROWS, COLUMNS),
        device="cpu",
        dtype=torch.float32,
        embedding=AveragePool(),
    )
    for start in range(0, 30, BLOCK):
        memory.begin_block(start, BLOCK)  # lays out [ sink | memory | local ]
        latents = torch.randn(1, BLOCK, CHANNELS, ROWS, COLUMNS)
        for _ in range(2):
            latents = 0.5 * latents + 0.5 * model(latents, memory)
        model(latents, memory)  # the last pass is over the clean latents: its keys and values stay
        memory.commit(latents)  # embeds and indexes the block
    for entry in memory.retrieved:
        pairs = zip(entry.frames[0], entry.similarity[0], strict=True)
        print(f"block at frame {entry.block_start} saw", ", ".join(f"{frame} ({value:.2f})" for frame, value in pairs))


if __name__ == "__main__":
    main()
