"""Training-time self-attention: all frames of a chunk at once, each with the context of its cached roll-out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_rag import rotary


class JointAttention:
    """What `RetrievalMemory` computes frame by frame, for whole chunks and with gradients.

    A frame comes in several streams: stream 0 is clean, the others are noisy. All streams of a frame attend to the
    same context, keys and values of the clean stream, and to themselves. Queries, keys and values of `attend` are in
    the order [chunks, streams, frames], one frame to a batch element.

    Args:
        context: int64 [chunks, frames, columns], frames of the chunk that each frame sees.
        distance: int64, same shape: temporal position of the frame minus that of the entry.
        used: bool, same shape.
        spatial: `rotary.spatial_rotation` of the token grid.
        frequencies: `rotary.temporal_frequencies` of the heads.
    """

    def __init__(self, context: Tensor, distance: Tensor, used: Tensor, spatial: Tensor, frequencies: Tensor) -> None:
        chunks, frames, _ = self.shape = context.shape
        self.entries = (context + torch.arange(chunks)[:, None, None] * frames).flatten()
        angle = -distance[..., None].to(torch.float32) * frequencies.to(torch.float32)
        self.temporal = torch.stack([angle.cos(), angle.sin()], dim=-1)[:, :, :, None, None]
        self.used, self.spatial = used, spatial

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
    ) -> Tensor:
        """q, k, v [chunks * streams * frames, 1, T, H, D] to [chunks * streams * frames, T, H, D]."""
        chunks, frames, _ = self.shape
        q, k = self._normalise(q, q_weight, eps), self._normalise(k, k_weight, eps)
        q, k, v = (x.view(chunks, -1, frames, *x.shape[2:]) for x in (q, k, v))
        pairs = 2 * self.temporal.shape[-2]
        past_k, past_v = self._gather(k), self._gather(v)
        past_k = torch.cat([rotary.rotate_pairs(past_k[..., :pairs], self.temporal), past_k[..., pairs:]], dim=-1)
        mask = F.pad(self.used.repeat_interleave(k.shape[3], dim=-1), (0, k.shape[3]), value=True)
        mask = mask[:, None].expand(-1, k.shape[1], -1, -1).flatten(0, 2)[:, None, None]
        out = F.scaled_dot_product_attention(
            q.flatten(0, 2).transpose(1, 2), self._with_own(past_k, k), self._with_own(past_v, v), attn_mask=mask
        )
        return out.transpose(1, 2)

    def _normalise(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x = F.rms_norm(x.flatten(-2), x.flatten(-2).shape[-1:], weight, eps).view(x.shape)
        pairs = 2 * self.spatial.shape[1]
        return torch.cat([x[..., :-pairs], rotary.rotate_pairs(x[..., -pairs:], self.spatial[:, None])], dim=-1)

    def _gather(self, x: Tensor) -> Tensor:
        """[chunks, streams, frames, T, H, D] to the context [chunks, frames, columns, T, H, D]."""
        chunks, frames, columns = self.shape
        rows = x[:, 0].reshape(chunks * frames, -1).index_select(0, self.entries)
        return rows.view(chunks, frames, columns, *x.shape[3:])

    @staticmethod
    def _with_own(past: Tensor, own: Tensor) -> Tensor:
        """Context and own tokens, heads first: [chunks * streams * frames, H, (columns + 1) * T, D]."""
        past = past.flatten(2, 3)[:, None].expand(-1, own.shape[1], -1, -1, -1, -1)
        return torch.cat([past, own], dim=3).flatten(0, 2).transpose(1, 2)
