"""Retrieval memory for a pipeline that knows nothing of it.

    python examples/patch_your_pipeline.py

The model below stands for Self-Forcing or one of its relatives: random weights, a key-value cache and a sliding window
of its own. Nothing in it is written for `patch`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_rag import RetrievalConfig, patch, rotary

DIM, HEADS, LAYERS, CHANNELS = 64, 2, 2, 16
ROWS, COLUMNS = 4, 4
TOKENS = ROWS * COLUMNS
WINDOW, BLOCK = 12, 3


class CausalAttention(nn.Module):
    """Attends to the last `WINDOW` latent frames, whose keys and values it keeps in `kv_cache`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, DIM // HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(DIM), nn.RMSNorm(DIM)

    def forward(
        self,
        x: Tensor,  # [B, L, DIM]
        seq_lens: Tensor,
        grid_sizes: Tensor,  # [B, 3]: frames, rows, columns
        freqs: Tensor,  # complex [positions, head_dim / 2]
        block_mask: object,
        kv_cache: dict[str, Tensor],
        current_start: int,
    ) -> Tensor:
        frames, start, end = int(grid_sizes[0, 0]), current_start, current_start + x.shape[1]
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (tensor.unflatten(2, (self.num_heads, -1)) for tensor in (q, k, v))
        turns = rotations(freqs, start // TOKENS, frames)
        kv_cache["k"][:, start:end], kv_cache["v"][:, start:end] = turn(k, turns), v
        window = slice(max(0, end - WINDOW * TOKENS), end)
        q, k, v = (y.transpose(1, 2) for y in (turn(q, turns), kv_cache["k"][:, window], kv_cache["v"][:, window]))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def rotations(freqs: Tensor, start: int, frames: int) -> Tensor:
    """Wan's rotary embedding, complex [frames * TOKENS, 1, head_dim / 2]: pairs for time, then for row and column."""
    spatial = freqs.shape[1] // 3
    time, rows, columns = freqs.split([freqs.shape[1] - 2 * spatial, spatial, spatial], dim=1)
    parts = (time[start : start + frames, None, None], rows[None, :ROWS, None], columns[None, None, :COLUMNS])
    return torch.cat([part.expand(frames, ROWS, COLUMNS, -1) for part in parts], dim=-1).flatten(0, 2)[:, None]


def turn(x: Tensor, by: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * by).flatten(-2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = CausalAttention()
        self.ffn = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor, *call: object) -> Tensor:
        x = x + self.self_attn(x, *call)
        return x + self.ffn(x)


class CausalTransformer(nn.Module):
    """Predicts the flow of a block of latents [B, C, F, H, W] at a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS, DIM), nn.Linear(DIM, CHANNELS)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        head_dim = DIM // HEADS
        spatial = rotary.spatial_frequencies(head_dim)
        frequencies = torch.cat([rotary.temporal_frequencies(head_dim), spatial, spatial])
        angle = torch.outer(torch.arange(1024, dtype=torch.float64), frequencies)
        self.freqs = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)

    def forward(self, x: Tensor, timestep: float, kv_cache: list[dict[str, Tensor]], current_start: int) -> Tensor:
        frames = x.shape[2]
        tokens = self.embed(x.permute(0, 2, 3, 4, 1).flatten(1, 3)) * (1 - timestep / 2000)
        lengths, grid = torch.tensor([tokens.shape[1]]), torch.tensor([[frames, ROWS, COLUMNS]])
        for block, cache in zip(self.blocks, kv_cache, strict=True):
            tokens = block(tokens, lengths, grid, self.freqs, None, cache, current_start)
        return self.head(tokens).unflatten(1, (frames, ROWS, COLUMNS)).permute(0, 4, 1, 2, 3)


class Pipeline:
    """Two denoising steps a block, then a pass on the clean latents that fills the cache."""

    def __init__(self) -> None:
        self.generator = CausalTransformer().eval()

    @torch.no_grad()
    def inference(self, noise: Tensor) -> Tensor:
        """A video [B, C, frames, H, W] from noise of that shape."""
        shape = (noise.shape[0], noise.shape[2] * TOKENS, HEADS, DIM // HEADS)
        cache = [{"k": torch.zeros(shape), "v": torch.zeros(shape)} for _ in range(LAYERS)]
        video = []
        for index, latents in enumerate(noise.split(BLOCK, dim=2)):
            for timestep in (1000.0, 500.0, 0.0):
                flow = self.generator(latents, timestep, cache, index * BLOCK * TOKENS)
                latents = latents - timestep / 1000 * flow
            video.append(latents)
        return torch.cat(video, dim=2)


def main() -> None:
    torch.manual_seed(0)
    pipeline = Pipeline()
    noise = torch.randn(1, CHANNELS, 30, ROWS, COLUMNS)
    own = pipeline.inference(noise)

    window_only = RetrievalConfig(context_frames=WINDOW, sink_frames=0, memory_frames=0, positions="absolute")
    with patch(pipeline, window_only):
        same = pipeline.inference(noise)
    print(f"patched, no memory: differs from the model's own window by {(same - own).abs().max():.1e}")

    with patch(pipeline, RetrievalConfig(context_frames=WINDOW, recency_guard=2)) as patched:
        remembered = pipeline.inference(noise)
    print(f"patched, with memory: differs by {(remembered - own).abs().max():.1e}; what came back:")
    for entry in patched.retrieved:
        print(f"  frames {entry.block_start} to {entry.block_start + BLOCK - 1} saw {entry.frames[0]} again")


if __name__ == "__main__":
    main()
