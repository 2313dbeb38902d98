"""Interface doubles of the public causal video models: what their attention takes and returns, none of their code.

Each double is our own transformer, under the public parameter names, with an attention that takes a family's arguments.
The cached attention itself is missing: a patched double must never reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_rag import rotary
from longlive_rag.models import CausalWanModel
from longlive_rag.models.causal_wan import CrossAttention, Head, sinusoidal_embedding


class NativeAttentionReached(Exception):
    """The double has no cached attention of its own."""


class Attention(nn.Module):
    """Self-Forcing's and Causal-Forcing's."""

    returns_update = False

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, 1e-6), nn.RMSNorm(dim, 1e-6)

    def uncached(self, x: Tensor, kv_cache: object) -> Tensor:
        if kv_cache is not None:
            raise NativeAttentionReached
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (tensor.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for tensor in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None):
        return self.uncached(x, kv_cache)


class KreaAttention(Attention):
    """With a block mask, its frames fill the cache, each block of them seeing itself and those before."""

    fused_projections = False

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None):
        if block_mask is None:
            return self.uncached(x, kv_cache)
        frames, rows, columns = grid_sizes[0].tolist()
        temporal = torch.outer(torch.arange(frames), rotary.temporal_frequencies(self.head_dim))
        angle = torch.stack([temporal.cos(), temporal.sin()], -1)[:, None, None].expand(-1, rows * columns, -1, -1, -1)
        spatial = rotary.spatial_rotation(rows, columns, self.head_dim)[None, :, None].expand(frames, -1, -1, -1, -1)
        rotation = torch.cat([angle.float(), spatial], dim=-2).flatten(0, 1)
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (tensor.unflatten(2, (self.num_heads, -1)) for tensor in (q, k, v))
        q, k = rotary.rotate_pairs(q, rotation), rotary.rotate_pairs(k, rotation)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=block_mask)
        return self.o(out.transpose(1, 2).flatten(2))


class CausVidAttention(Attention):
    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, current_end=0):
        return self.uncached(x, kv_cache)


class RollingForcingAttention(Attention):
    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        updating_cache=False,
    ):  # fmt: skip
        return self.uncached(x, kv_cache)


class InfinityRoPEAttention(Attention):
    def forward(
        self,
        x,
        seq_lens,
        grid_sizes,
        freqs,
        block_mask,
        kv_cache=None,
        current_start=0,
        cache_start=None,
        timestep=None,
    ):
        return self.uncached(x, kv_cache)


class LongLiveAttention(Attention):
    returns_update = True

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        sink_recache_after_switch=False,
    ):  # fmt: skip
        return self.uncached(x, kv_cache)


class LongLiveRAGAttention(Attention):
    returns_update = True

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        sink_recache_after_switch=False, memory_indices=None,
    ):  # fmt: skip
        return self.uncached(x, kv_cache)


class MemFlowAttention(Attention):
    returns_update = True

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        kv_bank=None, update_bank=None, is_recache=None,
    ):  # fmt: skip
        return self.uncached(x, kv_cache)


class LongLive2Attention(Attention):
    returns_update = True

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None, t_scale=1.0,
        use_relative_rope=False, method="linear", original_seq_len=None, temporal_offset=0.0,
    ):  # fmt: skip
        return self.uncached(x, kv_cache)


ATTENTIONS: dict[str, type[Attention]] = {
    "Self-Forcing": Attention,
    "krea realtime": KreaAttention,
    "CausVid": CausVidAttention,
    "Rolling Forcing": RollingForcingAttention,
    "Infinity-RoPE": InfinityRoPEAttention,
    "LongLive": LongLiveAttention,
    "LongLive-RAG": LongLiveRAGAttention,
    "MemFlow": MemFlowAttention,
    "LongLive 2": LongLive2Attention,
}


class Block(Protocol):
    """What a transformer uses of our model's block, whose attention it has replaced."""

    self_attn: Attention
    cross_attn: CrossAttention
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    norm3: nn.LayerNorm
    ffn: nn.Sequential
    modulation: Tensor


class Transformer(nn.Module):
    """Takes latents [B, C, F, H, W] and hands each layer its cache, as the public transformers do."""

    # Taken over from our own model by name.
    patch_embedding: nn.Conv3d
    text_embedding: nn.Sequential
    time_embedding: nn.Sequential
    time_projection: nn.Sequential
    blocks: Sequence[Block]  # a ModuleList
    head: Head
    num_frame_per_block: int  # only where a test sets it

    def __init__(self, attention: type[Attention], **sizes: Any) -> None:
        super().__init__()
        parts = CausalWanModel(**sizes)
        for name, module in parts.named_children():
            self.add_module(name, module)
        self.patch_size, self.freq_dim, self.dim = parts.patch_size, parts.freq_dim, parts.dim
        self.block_mask: Tensor | None = None
        for block in self.blocks:
            block.self_attn = attention(parts.dim, parts.num_heads)
        spatial = rotary.spatial_frequencies(parts.head_dim)
        frequencies = torch.cat([rotary.temporal_frequencies(parts.head_dim), spatial, spatial])
        angle = torch.outer(torch.arange(1024, dtype=torch.float64), frequencies)
        self.freqs = torch.polar(torch.ones_like(angle), angle)

    def forward(self, x, t, context, seq_len, kv_cache=None, crossattn_cache=None, current_start=0, **extra):
        batch, _, frames, height, width = x.shape
        grid = [frames, height // self.patch_size[1], width // self.patch_size[2]]
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2)
        time = self.time_embedding(sinusoidal_embedding(t, self.freq_dim).to(x.dtype))
        modulation = self.time_projection(time).unflatten(-1, (6, self.dim))
        text = self.text_embedding(context)
        grid_sizes = torch.tensor([grid] * batch)
        ends = []
        for layer, block in enumerate(self.blocks):
            cache = None if kv_cache is None else kv_cache[layer]
            shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + modulation).unsqueeze(3).unbind(2)

            def frames_of(y: Tensor) -> Tensor:
                return y.unflatten(1, (frames, -1))

            inner = (frames_of(block.norm1(tokens)) * (1 + scale1) + shift1).flatten(1, 2)
            out = self.attend(block.self_attn, inner, grid_sizes, cache, current_start, **extra)
            if cache is not None and isinstance(out, tuple):
                out, (current_end, local_end, update) = out
                ends.append((cache, current_end, local_end, update))
            tokens = tokens + (frames_of(out) * gate1).flatten(1, 2)
            prompted = block.cross_attn(frames_of(block.norm3(tokens)), *block.cross_attn.prepare(text))
            tokens = tokens + prompted.flatten(1, 2)
            fed = block.ffn(frames_of(block.norm2(tokens)) * (1 + scale2) + shift2)
            tokens = tokens + (fed * gate2).flatten(1, 2)
        for cache, current_end, local_end, update in ends:
            if update is None:
                cache["global_end_index"].fill_(current_end)
                cache["local_end_index"].fill_(local_end)
        y = self.head(frames_of(tokens), time)
        y = y.view(batch, *grid, *self.patch_size[1:], -1)
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)

    def attend(self, attention, x, grid_sizes, cache, current_start, **extra):
        """Positional, as the public blocks call it."""
        seq_lens = torch.tensor([x.shape[1]] * x.shape[0])
        return attention(x, seq_lens, grid_sizes, self.freqs, self.block_mask, cache, current_start, **extra)


class Wrapper(nn.Module):
    """Keeps the transformer as `model` and takes latents [B, F, C, H, W]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, context: Tensor, timestep: Tensor, **call: object) -> Tensor:
        return self.model(latents.transpose(1, 2), t=timestep, context=context, seq_len=32760, **call).transpose(1, 2)


class Pipeline:
    """No module, as many pipelines; keeps the wrapper as `generator`."""

    # Only where a test sets them.
    num_frame_per_block: int
    denoising_step_list: Tensor

    def __init__(self, family: str, **sizes: Any) -> None:
        self.generator = Wrapper(Transformer(ATTENTIONS[family], **sizes)).eval().requires_grad_(False)

    @property
    def transformer(self) -> Transformer:
        return cast(Transformer, self.generator.model)

    def cache(self, batch: int, tokens: int, **extra: object) -> list[dict[str, Any]]:
        heads, head_dim = (getattr(self.transformer.blocks[0].self_attn, name) for name in ("num_heads", "head_dim"))
        return [
            {
                "k": torch.zeros(batch, tokens, heads, head_dim),
                "v": torch.zeros(batch, tokens, heads, head_dim),
                "global_end_index": torch.tensor([0]),
                "local_end_index": torch.tensor([0]),
                **{name: value.clone() if isinstance(value, Tensor) else value for name, value in extra.items()},
            }
            for _ in self.transformer.blocks
        ]
