"""diffusers' `AnyFlowFARTransformer3DModel`.

A chunk attends to the newest chunks in full and to all chunks before them compressed: after each chunk, a pass over the
whole video fills one cache with either kind. Retrieval memory comes beside that: frames that are retrieved take part in
full, in the same softmax. Where nothing is retrieved, the attention processor runs by itself, so to the last bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention

from longlive_rag.backbones.family import Attachment, CausalTransformer, Family
from longlive_rag.backbones.follow import Follower, Kind
from longlive_rag.backbones.forwards import GradientGuard
from longlive_rag.backbones.own_context import OwnContext
from longlive_rag.config import RetrievalConfig
from longlive_rag.context import UNUSED, ContextPlan

PARTS = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "heads", "inner_dim", "processor")
CACHED = frozenset({"kv_cache", "kv_cache_flag"})
"""Names that the processor of its cached self-attention takes."""
CALL = frozenset({"hidden_states", "chunk_partition", "kv_cache", "kv_cache_flag"})
"""Names that the transformer takes."""
PADDED_TO = 128
"""diffusers pads queries, keys and values to a multiple of this with zeros; such keys count in its softmax."""


@dataclass(frozen=True)
class Beside(OwnContext):
    """A window that stays whole: memory comes beside it."""

    def with_memory(self) -> RetrievalConfig:
        paper, own = RetrievalConfig(), self.native()
        return replace(
            own,
            context_frames=own.context_frames + paper.memory_frames,
            memory_frames=paper.memory_frames,
            recency_guard=paper.recency_guard,
        )


class RetrievedOnly(ContextPlan):
    """The frames that come from memory. What is in the local window, the model attends to by itself."""

    @property
    def candidates(self) -> range:
        left = self.end - self.config.local_frames - self.config.recency_guard
        return range(max(0, left) if self.config.memory_frames else 0)

    @property
    def memory_columns(self) -> slice:
        return slice(0, self.config.memory_frames)

    def fixed_entries(self) -> tuple[list[int], list[int]]:
        return [UNUSED] * self.config.memory_frames, [UNUSED] * self.config.memory_frames


class AnyFlow(Family):
    """Its schedulers give no draft that could ask, and its own pass reads its caches."""

    name = "AnyFlow FAR"
    looked_for = f"diffusers' {', '.join(PARTS)} and a processor that takes {' and '.join(sorted(CACHED))}"
    drafts = False
    reads_cache = True

    def is_attention(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in PARTS) and self.arguments(module) >= CACHED

    def arguments(self, attention: Any) -> frozenset[str]:
        return frozenset(inspect.signature(attention.processor.__call__).parameters)

    @property
    def known_arguments(self) -> frozenset[str]:
        return CACHED | {"attn", "hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb"}

    def fits(self, attention: Any) -> bool:
        return True

    def check(self, transformer: CausalTransformer) -> None:
        missing = CALL - set(inspect.signature(transformer.module.forward).parameters)
        if missing:
            raise TypeError(
                f"model must take {', '.join(sorted(CALL))} in its forward, as AnyFlowFARTransformer3DModel does; "
                f"{type(transformer.module).__name__} does not take {', '.join(sorted(missing))}"
            )
        if getattr(transformer.module, "_parallel_config", None) is not None:
            raise ValueError(
                "model must not be split over processes by diffusers (enable_parallelism): load it without, and give "
                "patch the group of these processes instead"
            )

    def own_context(self, model: Any, transformer: CausalTransformer) -> OwnContext:
        settings: Any = transformer.module.config
        chunk = max(settings.chunk_partition)
        return Beside(
            context_frames=settings.full_chunk_limit * chunk,
            sink_frames=0,
            block_frames=chunk,
            positions="absolute",
            memory_positions="absolute",
        )

    def heads(self, attention: Any) -> tuple[int, int]:
        return attention.heads, attention.inner_dim // attention.heads

    def attach(self, transformer: CausalTransformer, attachment: Attachment) -> None:
        config = attachment.config
        if config.positions != "absolute" or config.sink_frames:
            raise ValueError(
                f"config must have positions='absolute' and sink_frames=0 for {self.name}, whose own attention stays "
                f"as it is and sees the first frames compressed, got {config.positions!r} and {config.sink_frames}; "
                f"start from RetrievalConfig.from_backbone(model)"
            )
        chunks = _ChunkAttention(transformer, attachment)
        attachment.forwards.replace(transformer.module, chunks.transformer_forward)
        for layer, attention in enumerate(transformer.attentions):

            def make(
                original: Callable[..., Any], layer: int = layer, attention: Any = attention
            ) -> Callable[..., Any]:
                return chunks.attention_forward(layer, attention, original)

            attachment.forwards.replace(attention, make)


class _ChunkAttention:
    """The replaced forwards of one transformer, and the call that they share."""

    def __init__(self, transformer: CausalTransformer, attachment: Attachment) -> None:
        self._module: Any = transformer.module
        self._attachment = attachment
        self._gradients = GradientGuard()
        self._follower: Follower[None] | None = None
        """Of the current call; None: memory does not take part in it."""
        self._in_full = range(0)
        """Frames that the current call passes in full."""

    def transformer_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs).arguments
            cached = call.get("kv_cache") is not None
            with self._attachment.one_call:
                if cached and not self._gradients.needed(self._module, call["hidden_states"]):
                    self._begin(call)
                try:
                    return original(*args, **kwargs)
                finally:
                    self._follower = None

        return forward

    @torch.compiler.disable
    def _begin(self, call: dict[str, Any]) -> None:
        latents, partition, flag = call["hidden_states"], list(call["chunk_partition"]), call["kv_cache_flag"]
        settings, config = self._module.config, self._attachment.config
        _, rows, columns = settings.patch_size
        grid = (latents.shape[3] // rows, latents.shape[4] // columns)
        kind = Kind(latents.shape[0], grid, latents.device, latents.dtype)
        follower = self._attachment.followers.follower(call["kv_cache"][0]["full_cache"], kind)
        if not config.memory_frames:
            return  # the model by itself
        start, end, limit = sum(partition[:-1]), sum(partition), settings.full_chunk_limit
        own = sum(partition[-limit:])
        if own > config.local_frames:
            raise ValueError(
                f"config must leave a local window (context_frames - sink_frames - memory_frames) of at least {own} "
                f"latent frames, as many as the model sees in full with chunk_partition={partition}, got "
                f"{config.local_frames}"
            )
        self._follower = follower
        if not flag["is_cache_step"]:
            self._in_full = range(start, end)
            follower.follow(start, partition[-1], latents, RetrievedOnly)
            return
        self._in_full = range(end - sum(partition[1 - limit :] if limit > 1 else []), end)
        if follower.block is None or follower.block.stop < end:  # a chunk that was given, not made
            follower.follow(start, partition[-1], latents[:, start:end], RetrievedOnly)
        follower.note_clean(latents[:, start:end])

    def attention_forward(self, layer: int, attention: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._follower is None:
                return original(*args, **kwargs)
            x, flag = signature.bind(*args, **kwargs).arguments["hidden_states"], kwargs["kv_cache_flag"]
            if flag["is_cache_step"]:
                _, k, v = _project(attention, x[:, flag["num_compressed_tokens"] :])
                self._rewrite(layer, k, v)
                return original(*args, **kwargs)
            if not self._follower.memory.plan.candidates:
                return original(*args, **kwargs)
            q, k, v = _project(attention, x)
            own, weight = _own_attention(q, k, v, kwargs["rotary_emb"], kwargs["kv_cache"], flag)
            out = self._add_memory(layer, q, k, v, own, weight).flatten(2)
            for module in attention.to_out:
                out = module(out)
            return out

        return forward

    # As in wan_attention: compiled, these would be compiled again for every layer.
    @torch.compiler.disable
    def _add_memory(self, layer: int, q: Tensor, k: Tensor, v: Tensor, own: Tensor, own_lse: Tensor) -> Tensor:
        """[B, L, H, D]: one softmax over what the model sees by itself and what was retrieved."""
        assert self._follower is not None
        parts = (self._in_frames(tensor) for tensor in (q, k, v))
        retrieved, lse = self._follower.memory.attend_part(layer, *parts)
        # 0 for a video that got nothing, whose own part then stays as it is.
        share = torch.sigmoid(lse - own_lse)[..., None]
        return torch.lerp(own.float(), retrieved.float(), share).to(q.dtype)

    @torch.compiler.disable
    def _rewrite(self, layer: int, k: Tensor, v: Tensor) -> None:
        assert self._follower is not None
        self._follower.memory.rewrite(layer, self._in_full, self._in_frames(k), self._in_frames(v))

    def _in_frames(self, x: Tensor) -> Tensor:
        """[B, L, H, D] to [B, F, T, H, D]."""
        return x.unflatten(1, (len(self._in_full), -1))


def _project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries and keys, and values, [B, L, H, D]."""
    q, k, v = attention.norm_q(attention.to_q(x)), attention.norm_k(attention.to_k(x)), attention.to_v(x)
    q, k, v = (tensor.to(x.dtype).unflatten(2, (attention.heads, -1)) for tensor in (q, k, v))
    return q, k, v


def _own_attention(
    q: Tensor, k: Tensor, v: Tensor, rotary: dict[str, Tensor], cache: dict[str, Tensor], flag: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What a chunk sees without memory: the compressed chunks, those in full, itself, and the zeros of the padding.

    Args:
        q, k, v: of the chunk, [B, L, H, D], before any rotary embedding.
        rotary: complex, [1, 1, tokens, D / 2], of "query" and "key".
        cache: of the layer; keys before any rotary embedding, and values: [2, B, H, tokens, D].

    Returns:
        [B, L, H, D], and the natural log of each row's sum of exponentials, float32 [B, L, H].
    """
    past = [
        cache[name][:, :, :, : flag[count]]
        for name, count in (
            ("compressed_cache", "num_cached_compressed_tokens"),
            ("full_cache", "num_cached_full_tokens"),
        )
    ]
    q, *pairs = (tensor.transpose(1, 2) for tensor in (q, k, v))
    keys, values = (torch.cat([*(part[i] for part in past), pair], dim=2) for i, pair in enumerate(pairs))
    padding = (0, 0, 0, -q.shape[2] % PADDED_TO)
    q, keys, values = (
        nn.functional.pad(tensor, padding)
        for tensor in (_rotate(q, rotary["query"]), _rotate(keys, rotary["key"]), values)
    )
    out, lse = _attend(q, keys, values)
    length = k.shape[1]
    return out[:, :, :length].transpose(1, 2), lse[:, :, :length].transpose(1, 2).float()


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """By flex attention, as diffusers does it: [B, H, L, D], and the natural log of each row's sum, [B, H, L]."""
    request: Any = getattr(flex_attention, "AuxRequest", None)
    if request is None:  # until torch 2.8
        out, lse = flex_attention.flex_attention(q, k, v, return_lse=True)
        return out, lse
    out, extra = flex_attention.flex_attention(q, k, v, return_aux=request(lse=True))
    return out, extra.lse


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x [B, H, L, D], its adjacent pairs turned by complex [1, 1, L, D / 2]."""
    pairs = torch.view_as_complex(x.to(turns.real.dtype).unflatten(3, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(3).to(x.dtype)
