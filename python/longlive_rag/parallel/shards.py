"""Tokens and heads split over ranks, and the exchange that turns the one into the other.

Everywhere but in self-attention a rank holds a share of the tokens of each latent frame, with all heads; in
self-attention it holds all tokens, with a share of the heads. Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longlive_rag.ops._library import register
from longlive_rag.parallel.costs import check_ranks, token_counts

Group: TypeAlias = ProcessGroup | DeviceMesh
"""The ranks that make one video: a process group, or a device mesh of one dimension."""

Shape = tuple[int, ...]


@dataclass
class Traffic:
    """What this rank has sent to the others, as it was counted."""

    exchanges: int = 0
    """Begun, whether all-to-all or all-gather."""
    bytes: int = 0


_total = Traffic()


def exchanges_begun() -> int:
    """By this process, in all groups: a rank that hangs has begun fewer than those that wait for it."""
    return _total.exchanges


class Shards:
    """This rank's share of tokens and heads.

    The buffers of the exchange are made once for each shape and keep their addresses. What an exchange returns may lie
    in them: it must be used before the next exchange of the same shape, as the next layer's always is.

    Args:
        group: the ranks that make one video, this one among them.
        heads: attention heads of the backbone.

    Raises:
        TypeError: `group` is neither a process group nor a device mesh, or this rank is not in it.
        ValueError: the mesh has several dimensions, or its ranks do not divide the heads.
    """

    def __init__(self, group: Group, heads: int) -> None:
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group must be a device mesh of one dimension (mesh['name'] takes one of several), got {group}"
                )
            group = group.get_group()
        if not isinstance(group, ProcessGroup):
            raise TypeError(
                f"group must be a ProcessGroup or a DeviceMesh with this rank among its own, got {type(group).__name__}"
            )
        self.group: ProcessGroup = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        check_ranks("group must have", self.ranks, heads)
        self.heads = heads // self.ranks
        """Of this rank."""
        self.first_rank = dist.get_global_rank(group, 0)
        """The group's first rank, as all processes count."""
        self.traffic = Traffic()
        self.handle = next(_handles)
        self._buffers: dict[tuple[Shape, torch.dtype, str], Tensor] = {}
        _shards[self.handle] = self

    def token_counts(self, tokens: int) -> list[int]:
        """How many of a latent frame's tokens each rank holds; raises ValueError if there are fewer than ranks."""
        return token_counts(tokens, self.ranks)

    def own_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens of x [B, F, T, C]: a view [B, F, own, C]."""
        counts = self.token_counts(x.shape[2])
        return x.narrow(2, sum(counts[: self.rank]), counts[self.rank])

    def all_tokens(self, x: Tensor, tokens: int) -> Tensor:
        """The tokens [B, F, T, C] of all ranks from each rank's own [B, F, own, C]."""
        return _gather_tokens(x, tokens, self.handle)

    def to_heads(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise q and k over the model dimension, and exchange own tokens with all heads for all with own heads.

        Args:
            q, k, v: [B, F, own tokens, H, D].
            q_weight, k_weight: RMS-norm weights [H * D]; None where q and k are normalised already.
            eps: of the norm.
            tokens: T, of a latent frame.

        Returns:
            q, k and v, [B, F, T, H / ranks, D], the last two dimensions contiguous.
        """
        qk, v = _tokens_to_heads(q, k, v, q_weight, k_weight, eps, tokens, self.handle)
        q, k, v = (x.permute(1, 2, 0, 3, 4) for x in (qk.select(1, 0), qk.select(1, 1), v))
        return q, k, v

    def to_tokens(self, x: Tensor, frames: int) -> Tensor:
        """Exchange all tokens with own heads for own tokens with all heads.

        Args:
            x: [B, F * T, H / ranks, D].
            frames: F.

        Returns:
            [B, F * own tokens, H, D].
        """
        return _heads_to_tokens(x, frames, self.handle)

    def own_heads(self, x: Tensor) -> Tensor:
        """This rank's heads of x [..., H, D]: a view [..., H / ranks, D]."""
        return x.narrow(-2, self.rank * self.heads, self.heads)

    def all_heads(self, x: Tensor) -> Tensor:
        """The heads [B, L, H, D] of all ranks from each rank's own [B, L, H / ranks, D]."""
        sent, received = self._buffer(x.shape, x, "heads sent"), self._buffer((self.ranks, *x.shape), x, "heads")
        sent.copy_(x)
        self._count((self.ranks - 1) * sent.nbytes)
        dist.all_gather(list(received), sent, group=self.group)
        return received.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _count(self, sent: int) -> None:
        for traffic in (self.traffic, _total):
            traffic.exchanges += 1
            traffic.bytes += sent

    def _buffer(self, shape: Shape, like: Tensor, use: str) -> Tensor:
        key = (shape, like.dtype, use)
        if key not in self._buffers:
            with torch.inference_mode(False):  # otherwise it could not be written to outside of inference mode
                self._buffers[key] = like.new_empty(shape)
        return self._buffers[key]

    def _exchange(
        self, received: Tensor, sent: Tensor, received_rows: list[int], sent_rows: list[int], wait: bool = True
    ) -> Any:
        """One all-to-all of rows: the first dimension of both tensors."""
        self._count((sum(sent_rows) - sent_rows[self.rank]) * sent[0].nbytes)
        return dist.all_to_all_single(received, sent, received_rows, sent_rows, group=self.group, async_op=not wait)


def own_rows(tensor: Tensor, group: Group) -> Tensor:
    """This rank's share of a weight, as FSDP2 splits it: a part of the first dimension, perhaps nothing; a view."""
    members = group.get_group() if isinstance(group, DeviceMesh) else group
    parts, rank = tensor.chunk(dist.get_world_size(members)), dist.get_rank(members)
    return parts[rank] if rank < len(parts) else tensor[:0]


_handles = itertools.count()
# Operations take numbers and tensors: the shards that a number stands for.
_shards: weakref.WeakValueDictionary[int, Shards] = weakref.WeakValueDictionary()


def normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [B, F, t, H, D] after the RMS norm over H * D."""
    return x if weight is None else F.rms_norm(x.flatten(-2), weight.shape, weight.to(x.dtype), eps).view(x.shape)


def _by_rank(x: Tensor, ranks: int) -> Tensor:
    """x [B, F, t, H, D] as [ranks, t, B, F, H / ranks, D], a view."""
    return x.unflatten(3, (ranks, -1)).permute(3, 2, 0, 1, 4, 5)


# An operation's results may not share memory: q and k, which travel together, are one of them.
def _to_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    tokens: int,
    shards: int,
) -> tuple[Tensor, Tensor]:
    me = _shards[shards]
    batch, frames, own, heads, head_dim = q.shape
    counts = me.token_counts(tokens)
    if counts[me.rank] != own or heads != me.heads * me.ranks:
        raise ValueError(
            f"q must have {me.heads * me.ranks} heads and {counts[me.rank]} of the {tokens} tokens of a latent frame, "
            f"this rank's share, got {list(q.shape)}"
        )
    page = (batch, frames, me.heads, head_dim)
    sent_rows = [own] * me.ranks
    # Rows are tokens, so that what comes from the ranks in turn lies in order. v travels while q and k are normalised.
    v_sent, v_all = me._buffer((me.ranks, own, *page), v, "v sent"), me._buffer((tokens, *page), v, "v")
    v_sent.copy_(_by_rank(v, me.ranks))
    v_travels = me._exchange(v_all, v_sent.flatten(0, 1), counts, sent_rows, wait=False)
    qk_sent = me._buffer((me.ranks, own, 2, *page), q, "q and k sent")
    qk_all = me._buffer((tokens, 2, *page), q, "q and k")
    for half, (x, weight) in enumerate(((q, q_weight), (k, k_weight))):
        qk_sent[:, :, half].copy_(_by_rank(normalised(x, weight, eps), me.ranks))
    me._exchange(qk_all, qk_sent.flatten(0, 1), counts, sent_rows)
    v_travels.wait()
    return qk_all, v_all


def _to_heads_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, tokens, shards = rest
    me = _shards[shards]
    page = (q.shape[0], q.shape[1], me.heads, q.shape[4])
    return q.new_empty(tokens, 2, *page), v.new_empty(tokens, *page)


def _to_tokens(x: Tensor, frames: int, shards: int) -> Tensor:
    me = _shards[shards]
    batch, total, heads, head_dim = x.shape
    tokens = total // frames
    counts = me.token_counts(tokens)
    own = counts[me.rank]
    sent = me._buffer((tokens, batch, frames, heads, head_dim), x, "out sent")
    received = me._buffer((me.ranks, own, batch, frames, heads, head_dim), x, "out")
    sent.copy_(x.unflatten(1, (frames, tokens)).permute(2, 0, 1, 3, 4))
    me._exchange(received.flatten(0, 1), sent, [own] * me.ranks, counts)
    out = x.new_empty(batch, frames * own, me.ranks * heads, head_dim)
    out.view(batch, frames, own, me.ranks, heads, head_dim).copy_(received.permute(2, 3, 1, 0, 4, 5))
    return out


def _to_tokens_fake(x: Tensor, frames: int, shards: int) -> Tensor:
    me = _shards[shards]
    own = me.token_counts(x.shape[1] // frames)[me.rank]
    return x.new_empty(x.shape[0], frames * own, me.ranks * x.shape[2], x.shape[3])


def _gather(x: Tensor, tokens: int, shards: int) -> Tensor:
    me = _shards[shards]
    counts = me.token_counts(tokens)
    batch, frames, own, channels = x.shape
    # All ranks send as many rows as the one with the most tokens.
    most = counts[0]
    sent = me._buffer((most, batch, frames, channels), x, "share sent")
    received = me._buffer((me.ranks * most, batch, frames, channels), x, "shares")
    sent[:own].copy_(x.permute(2, 0, 1, 3))
    me._count((me.ranks - 1) * sent.nbytes)
    shares = list(received.split(most))
    dist.all_gather(shares, sent, group=me.group)
    rows = [share[:count] for share, count in zip(shares, counts, strict=True)]
    return torch.cat(rows).permute(1, 2, 0, 3).contiguous()


def _gather_fake(x: Tensor, tokens: int, shards: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], tokens, x.shape[3])


# Operations, so that a compiler takes the exchanges as they are.
_tokens_to_heads = register(
    "tokens_to_heads(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, float eps, int tokens, "
    "int shards) -> (Tensor, Tensor)",
    _to_heads,
    _to_heads_fake,
)
_heads_to_tokens = register("heads_to_tokens(Tensor x, int frames, int shards) -> Tensor", _to_tokens, _to_tokens_fake)
_gather_tokens = register("gather_tokens(Tensor x, int tokens, int shards) -> Tensor", _gather, _gather_fake)
