"""diffusers' `AnyFlowFARTransformer3DModel`.

The model keeps distant chunks compressed: after each chunk, a pass over the whole video fills one cache with them and
another with the newest chunks in full. With retrieval memory, a chunk attends to the memory's frames in full instead of
the compressed ones; the pass that fills the caches stays the model's own, and the keys that it makes for frames in full
are kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longlive_rag.backbones.family import Attachment, CausalTransformer, Family
from longlive_rag.backbones.follow import Follower, Kind
from longlive_rag.backbones.forwards import GradientGuard
from longlive_rag.config import RetrievalConfig

PARTS = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "heads", "inner_dim", "processor")
CACHED = frozenset({"kv_cache", "kv_cache_flag"})
"""Names that the processor of its cached self-attention takes."""
CALL = frozenset({"hidden_states", "chunk_partition", "kv_cache", "kv_cache_flag"})
"""Names that the transformer takes."""


class AnyFlow(Family):
    """Its schedulers give no draft that could ask, and its own pass reads its caches."""

    name = "AnyFlow FAR"
    looked_for = f"diffusers' {', '.join(PARTS)} and a processor that takes {' and '.join(sorted(CACHED))}"
    drafts = False
    unstated = RetrievalConfig(positions="absolute")  # its own positions
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

    def heads(self, attention: Any) -> tuple[int, int]:
        return attention.heads, attention.inner_dim // attention.heads

    def attach(self, transformer: CausalTransformer, attachment: Attachment) -> None:
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
        _, rows, columns = self._module.config.patch_size
        grid = (latents.shape[3] // rows, latents.shape[4] // columns)
        kind = Kind(latents.shape[0], grid, latents.device, latents.dtype)
        follower = self._follower = self._attachment.followers.follower(call["kv_cache"][0]["full_cache"], kind)
        start, end = sum(partition[:-1]), sum(partition)
        if not flag["is_cache_step"]:
            self._in_full = range(start, end)
            follower.follow(start, partition[-1], latents)
            return
        limit = self._module.config.full_chunk_limit
        self._in_full = range(end - sum(partition[1 - limit :] if limit > 1 else []), end)
        if follower.block is None or follower.block.stop < end:
            follower.follow(start, partition[-1], latents[:, start:end])  # a chunk that was given, not made
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
            out = self._attend(layer, *_project(attention, x)).flatten(2)
            for module in attention.to_out:
                out = module(out)
            return out

        return forward

    # As in wan_attention: compiled, these would be compiled again for every layer.
    @torch.compiler.disable
    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self._follower is not None
        return self._follower.memory.attend(layer, *(self._in_frames(tensor) for tensor in (q, k, v)))

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
