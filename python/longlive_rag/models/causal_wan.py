"""The Wan 2.1 text-to-video transformer, causal and with memory.

Parameter names and shapes are those of the public Wan-family checkpoints, so that these load strictly. The model has no
cache and knows no context policy: self-attention goes through an ``Attention`` that the caller supplies, a
`RetrievalMemory` in generation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_rag.parallel.attention import ShardedAttention

SIZES: dict[str, dict[str, int]] = {
    "1.3B": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
    "5B": {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "in_dim": 48, "out_dim": 48},
    "14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
}

Prompt = list[tuple[Tensor, Tensor]]
"""Cross-attention keys and values of one prompt per layer, each [B, heads, text_len, head_dim]."""

QKV, PARTS = ("q", "k", "v"), ("weight", "bias")
"""The projections that `CausalWanModel.fuse` makes one, and their parameters."""


class Attention(Protocol):
    """What the transformer asks of its self-attention."""

    def attend(
        self,
        layer: int,
        q: Tensor,  # [B, F, T, H, D], not yet normalised, no rotary embedding
        k: Tensor,
        v: Tensor,
        *,
        q_weight: Tensor | None,  # [H * D], RMS-norm weights
        k_weight: Tensor | None,
        eps: float,
    ) -> Tensor:  # [B, F * T, H, D]
        ...


class CausalWanModel(nn.Module):
    """Predicts the flow (noise - clean latent) of a block of latent frames.

    Args:
        dim, ffn_dim, num_heads, num_layers: width, feed-forward width, attention heads, blocks.
        freq_dim: width of the sinusoidal timestep embedding.
        text_dim, text_len: width and length of the prompt embeddings.
        in_dim, out_dim: latent channels in and out.
        patch_size: latent frames, rows and columns that make one token; the first must be 1.
        eps: epsilon of every normalisation.

    Source: Wan 2.1 (arXiv 2503.20314), made causal as in Self-Forcing (arXiv 2506.08009): one timestep per frame.
    """

    def __init__(
        self,
        dim: int = 1536,
        ffn_dim: int = 8960,
        freq_dim: int = 256,
        text_dim: int = 4096,
        text_len: int = 512,
        num_heads: int = 12,
        num_layers: int = 30,
        in_dim: int = 16,
        out_dim: int = 16,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if dim % num_heads or (dim // num_heads) % 2:
            raise ValueError(f"dim must be num_heads times an even head_dim, got dim={dim}, num_heads={num_heads}")
        if freq_dim % 2:
            raise ValueError(f"freq_dim must be even, got {freq_dim}")
        if patch_size[0] != 1:
            raise ValueError(f"patch_size must keep latent frames apart, (1, rows, columns), got {patch_size}")
        self.dim, self.freq_dim, self.text_dim, self.text_len = dim, freq_dim, text_dim, text_len
        self.num_heads, self.num_layers, self.head_dim = num_heads, num_layers, dim // num_heads
        self.ffn_dim, self.in_dim, self.out_dim, self.eps = ffn_dim, in_dim, out_dim, eps
        self.fused = False
        self.patch_size = (1, patch_size[1], patch_size[2])

        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=patch_size, stride=patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(layer, dim, ffn_dim, num_heads, eps) for layer in range(num_layers))
        self.head = Head(dim, out_dim, self.patch_size, eps)

    @classmethod
    def from_size(cls, size: str, **overrides: int) -> CausalWanModel:
        """A model of a published size: "1.3B" and "14B" (Wan 2.1) or "5B" (Wan 2.2)."""
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        return cls(**{**SIZES[size], **overrides})  # type: ignore[arg-type]

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens that a latent frame of this size becomes.

        Raises:
            ValueError: the size is not a multiple of the patch.
        """
        rows, columns = self.patch_size[1:]
        if height % rows or width % columns:
            raise ValueError(
                f"latents must have a height and width divisible by the patch ({rows}, {columns}), "
                f"got {height} x {width}"
            )
        return height // rows, width // columns

    def prepare_prompt(self, prompt_embeds: Tensor) -> Prompt:
        """Cross-attention keys and values of a prompt, computed once and used by every pass.

        Args:
            prompt_embeds: [B, up to text_len, text_dim]; shorter ones are padded with zeros, as Wan does.
        """
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[1] > self.text_len or prompt_embeds.shape[2] != self.text_dim:
            raise ValueError(
                f"prompt_embeds must be [B, at most {self.text_len}, {self.text_dim}], got {list(prompt_embeds.shape)}"
            )
        padded = F.pad(prompt_embeds, (0, 0, 0, self.text_len - prompt_embeds.shape[1]))
        text = self.text_embedding(padded.to(self.patch_embedding.weight.dtype))
        return [cast(Block, block).prepare_prompt(text) for block in self.blocks]

    def fuse(self) -> None:
        """Save launches, for weights that are whole and stay where they are; `state_dict` stays as it is.

        Queries, keys and values of self-attention become one product, with one parameter, ``self_attn.qkv``, in each
        layer, and modulation is added for all layers at once. Anything that names those three parameters, or splits
        the weights over devices, comes before or goes without.
        """
        self.fused = True
        for block in self.blocks:
            cast(Block, block).self_attn.fuse_projections()

    def _modulation(self, of_time: Tensor) -> Iterable[Modulation | Tensor]:
        """What each block is given of what the timestep says, [B, F, 6, dim]."""
        if not self.fused:
            return [of_time] * self.num_layers
        of_blocks = torch.cat([cast(Block, block).modulation for block in self.blocks])[:, None, None]
        return map(Modulation._make, zip(*(each.unbind(0) for each in modulated(of_blocks, of_time)), strict=True))

    def forward(self, latents: Tensor, timestep: Tensor, prompt: Prompt, attention: Attention) -> Tensor:
        """Predict the flow of one block.

        Args:
            latents: [B, F, in_dim, height, width], noisy at `timestep`.
            timestep: [B, F] or [B], 0 (clean) to 1000 (noise).
            prompt: of `prepare_prompt`.
            attention: self-attention with its context. A `ShardedAttention` has the model work on this rank's tokens.

        Returns:
            [B, F, out_dim, height, width] in the dtype of `latents`.
        """
        batch, frames, _, height, width = latents.shape
        rows, columns = self.token_grid(height, width)
        if timestep.ndim == 1:
            timestep = timestep[:, None].expand(-1, frames)

        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(latents.to(dtype).transpose(1, 2))  # [B, dim, F, rows, columns]
        x = x.flatten(3).permute(0, 2, 3, 1)  # [B, F, T, dim]
        time = self.time_embedding(sinusoidal_embedding(timestep, self.freq_dim).to(dtype))  # [B, F, dim]
        modulation = self._modulation(self.time_projection(time).unflatten(-1, (6, self.dim)))

        if isinstance(attention, ShardedAttention):
            x = attention.own_tokens(x)
        for block, of_block, (text_k, text_v) in zip(self.blocks, modulation, prompt, strict=True):
            x = block(x, of_block, text_k, text_v, attention)

        x = self.head(x, time)  # [B, F, T, patch rows * patch columns * out_dim]
        if isinstance(attention, ShardedAttention):
            x = attention.all_tokens(x)
        patch_rows, patch_columns = self.patch_size[1:]
        x = x.view(batch, frames, rows, columns, patch_rows, patch_columns, self.out_dim)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, frames, self.out_dim, height, width).to(latents.dtype)


class Modulation(NamedTuple):
    """What the timestep does to a block, each [B, F, 1, dim]: ``norm(x) * scale + shift``, and gates."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


def modulated(of_block: Tensor, of_time: Tensor) -> Modulation:
    """From a block's own part [..., 6, dim] and the timestep's [B, F, 6, dim]: two launches, whatever the blocks."""
    sums = of_block + of_time
    scale1, scale2 = (1 + sums[..., 1::3, :]).unsqueeze(-2).unbind(-3)
    shift1, _, gate1, shift2, _, gate2 = sums.unsqueeze(-2).unbind(-3)
    return Modulation(shift1, scale1, gate1, shift2, scale2, gate2)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last modulated by the timestep."""

    def __init__(self, layer: int, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(layer, dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def prepare_prompt(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention's keys and values of the embedded prompt [B, text_len, dim]."""
        return self.cross_attn.prepare(text)

    def forward(
        self, x: Tensor, modulation: Modulation | Tensor, text_k: Tensor, text_v: Tensor, attention: Attention
    ) -> Tensor:
        if isinstance(modulation, Tensor):
            modulation = modulated(self.modulation, modulation)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        # A product and a sum in one launch, rounded once where they were rounded twice.
        x = torch.addcmul(x, gate1, self.self_attn(torch.addcmul(shift1, self.norm1(x), scale1), attention))
        x = x + self.cross_attn(self.norm3(x), text_k, text_v)
        return torch.addcmul(x, gate2, self.ffn(torch.addcmul(shift2, self.norm2(x), scale2)))


class SelfAttention(nn.Module):
    """Projections; normalisation, rotary embedding and the attention itself are the `Attention`'s."""

    def __init__(self, layer: int, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.layer, self.num_heads, self.eps = layer, num_heads, eps
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
        self.qkv: nn.Linear | None = None
        """In the place of q, k and v, once they are fused."""

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """See `CausalWanModel.fuse`."""
        if self.qkv is not None:
            return
        weight, bias = (torch.cat([getattr(self.get_submodule(name), part) for name in QKV]) for part in PARTS)
        with torch.device("meta"):
            fused = nn.Linear(weight.shape[1], weight.shape[0])
        trained = self.q.weight.requires_grad
        fused.weight, fused.bias = nn.Parameter(weight, trained), nn.Parameter(bias, trained)
        for name in QKV:
            delattr(self, name)
        self.qkv = fused
        self.register_state_dict_post_hook(_split_projections)
        self.register_load_state_dict_pre_hook(_join_projections)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        if self.qkv is None:
            q, k, v = (projection(x).unflatten(-1, (self.num_heads, -1)) for projection in (self.q, self.k, self.v))
        else:
            # Strided over the tokens, which `ops.insert` reads as it is.
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        out = attention.attend(
            self.layer, q, k, v, q_weight=self.norm_q.weight, k_weight=self.norm_k.weight, eps=self.eps
        )
        return self.o(out.reshape(x.shape))


def _split_projections(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """In a state_dict, q, k and v have their names and are views of their part."""
    for part in PARTS:
        for name, tensor in zip(QKV, state.pop(f"{prefix}qkv.{part}").chunk(3), strict=True):
            state[f"{prefix}{name}.{part}"] = tensor


def _join_projections(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """`_split_projections` the other way. What is missing, and whatever is misshapen, is left for torch to name."""
    for part in PARTS:
        names = [f"{prefix}{name}.{part}" for name in QKV]
        if all(name in state for name in names):
            state[f"{prefix}qkv.{part}"] = torch.cat([state.pop(name) for name in names])


class CrossAttention(nn.Module):
    """Attention to the prompt, whose keys and values are prepared once."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def _heads_first(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def prepare(self, text: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads_first(self.norm_k(self.k(text))), self._heads_first(self.v(text))

    def forward(self, x: Tensor, text_k: Tensor, text_v: Tensor) -> Tensor:
        q = self._heads_first(self.norm_q(self.q(x.flatten(1, 2))))
        out = F.scaled_dot_product_attention(q, text_k, text_v)
        return self.o(out.transpose(1, 2).reshape(x.shape))


class Head(nn.Module):
    """From tokens back to patches of latents."""

    def __init__(self, dim: int, out_dim: int, patch_size: tuple[int, int, int], eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.head = nn.Linear(dim, out_dim * patch_size[0] * patch_size[1] * patch_size[2])
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(torch.addcmul(shift, self.norm(x), 1 + scale))


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Cosines, then sines of `timestep` [...] at dim / 2 geometric frequencies, float64 [..., dim]."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.to(torch.float64)[..., None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
