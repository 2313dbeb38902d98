"""ComfyUI's own autoregressive Wan (`comfy/ldm/wan/ar_model.py`), which `SamplerARVideo` drives.

Its attention is told neither frame nor size: both come with the call of the transformer, in
``transformer_options["ar_state"]``. Its sampler makes a cache of zeros as long as the whole video and sets the cache's
end back before each further pass over a block; every block attends to the whole past.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longlive_rag import rotary
from longlive_rag.backbones.family import Attachment, CausalTransformer, Family
from longlive_rag.backbones.follow import Follower, Kind
from longlive_rag.backbones.own_context import OwnContext
from longlive_rag.generation.sampling import STEPS

PROJECTIONS = ("q", "k", "v", "o", "norm_q", "norm_k")
TAKEN = frozenset({"x", "freqs", "kv_cache", "transformer_options"})
"""Names that its attention takes."""
CALL = frozenset({"x", "timestep", "transformer_options"})
"""Names that the transformer takes."""
WHOLE_PAST = 21
"""Latent frames that its checkpoints, those of Self-Forcing and Causal-Forcing, were trained to see."""


class ComfyUI(Family):
    name = "ComfyUI autoregressive Wan"
    looked_for = f"{', '.join(PROJECTIONS)} and a forward that takes {', '.join(sorted(TAKEN))}"

    def is_attention(self, module: nn.Module) -> bool:
        return all(isinstance(getattr(module, name, None), nn.Module) for name in PROJECTIONS) and (
            self.arguments(module) >= TAKEN
        )

    def arguments(self, attention: Any) -> frozenset[str]:
        return frozenset(inspect.signature(attention.forward).parameters)

    @property
    def known_arguments(self) -> frozenset[str]:
        return TAKEN

    def fits(self, attention: Any) -> bool:
        return True

    def check(self, transformer: CausalTransformer) -> None:
        missing = CALL - set(inspect.signature(transformer.module.forward).parameters)
        if missing:
            raise TypeError(
                f"model must take {', '.join(sorted(CALL))} in its forward, as ComfyUI's CausalWanModel does; "
                f"{type(transformer.module).__name__} does not take {', '.join(sorted(missing))}"
            )
        # Keys are rotated by the memory; with another theta or other axes they would come out wrong.
        embedder = getattr(transformer.module, "rope_embedder", None)
        _, head_dim = self.heads(transformer.attentions[0])
        pairs = [len(rotary.temporal_frequencies(head_dim)), *[len(rotary.spatial_frequencies(head_dim))] * 2]
        if embedder is not None and (embedder.theta, list(embedder.axes_dim)) != (10000, [2 * n for n in pairs]):
            raise ValueError(
                f"model.rope_embedder must be Wan's rotary embedding (theta 10000, axes {[2 * n for n in pairs]}), got "
                f"theta {embedder.theta}, axes {list(embedder.axes_dim)}"
            )

    def own_context(self, model: Any, transformer: CausalTransformer) -> OwnContext:
        return OwnContext(context_frames=WHOLE_PAST, sink_frames=0, block_frames=1, positions="absolute")

    def heads(self, attention: Any) -> tuple[int, int]:
        return attention.num_heads, attention.head_dim

    def attach(self, transformer: CausalTransformer, attachment: Attachment) -> None:
        memory_attention = _MemoryAttention(transformer, attachment)
        attachment.forwards.replace(transformer.module, memory_attention.transformer_forward)
        if attachment.freed_caches is not None and hasattr(transformer.module, "init_kv_caches"):
            attachment.forwards.replace(transformer.module, memory_attention.init_kv_caches, "init_kv_caches")
        for layer, attention in enumerate(transformer.attentions):

            def make(
                original: Callable[..., Any], layer: int = layer, attention: Any = attention
            ) -> Callable[..., Any]:
                return memory_attention.attention_forward(layer, attention, original)

            attachment.forwards.replace(attention, make)


class _MemoryAttention:
    """The replaced forwards of one transformer, and the pass that they share."""

    def __init__(self, transformer: CausalTransformer, attachment: Attachment) -> None:
        self._module: Any = transformer.module
        self._attachment = attachment
        self._follower: Follower[None] | None = None
        """Of the current pass; None: memory does not take part in it."""
        self._frames = 0
        """Latent frames of the current pass."""

    def init_kv_caches(self, original: Callable[..., list[dict[str, Any]]]) -> Callable[..., Any]:
        """Caches that hold no token, in the place of zeros for the whole video."""

        def init_kv_caches(
            batch_size: int, max_seq_len: int, device: torch.device, dtype: torch.dtype
        ) -> list[dict[str, Any]]:
            caches = original(batch_size, 0, device, dtype)
            freed = self._attachment.freed_caches
            assert freed is not None
            for cache in caches:
                for name in ("k", "v"):
                    values = batch_size * max_seq_len * cache[name].shape[2] * cache[name].shape[3]
                    freed.bytes += values * cache[name].element_size()
            return caches

        return init_kv_caches

    def transformer_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs).arguments
            state = (call.get("transformer_options") or {}).get("ar_state")
            if state is None:
                return original(*args, **kwargs)
            with self._attachment.one_call:
                begins_block = self._begin(call["x"], state)
                try:
                    flow = original(*args, **kwargs)
                    if begins_block and self._attachment.config.query == "draft":
                        self._ask(call["x"], flow, call["timestep"])
                    return flow
                finally:
                    self._follower = None

        return forward

    def attention_forward(self, layer: int, attention: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, freqs: Tensor, kv_cache: Any = None, transformer_options: Any = None) -> Any:
            if self._follower is None:
                return original(x, freqs, kv_cache=kv_cache, transformer_options=transformer_options or {})
            out = self._attend(layer, *_project(attention, x, self._frames))
            kv_cache["end"].add_(x.shape[1])  # which the sampler sets back
            return attention.o(out.flatten(2))

        return forward

    # As in wan_attention: compiled, this would be compiled again for every layer.
    @torch.compiler.disable
    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self._follower is not None
        return self._follower.memory.attend(layer, q, k, v)

    @torch.compiler.disable
    def _begin(self, x: Tensor, state: Mapping[str, Any]) -> bool:
        """A pass begins; whether it is the first over its block.

        Args:
            x: latents [B, C, F, H, W].
        """
        caches = state["kv_caches"]
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self._module.parameters())):
            raise RuntimeError("memory gives no gradients; sample under torch.no_grad(), or call unpatch() first")
        if caches[0]["k"].shape[0] != x.shape[0]:
            raise ValueError(
                f"the sampler's cache is for a batch of {caches[0]['k'].shape[0]}, but a pass has {x.shape[0]}; "
                f"guidance is not possible, so cfg must be 1"
            )
        _, rows, columns = self._module.patch_size
        self._frames = x.shape[2]
        grid = (-(-x.shape[3] // rows), -(-x.shape[4] // columns))
        kind = Kind(x.shape[0], grid, x.device, x.dtype)
        # Made in inference mode, what lives on could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if self._attachment.freed_caches is not None:
                for cache in caches:
                    self._attachment.freed_caches.free(cache)
            follower = self._attachment.followers.follower(caches[0]["k"], kind)
            before = follower.block
            follower.follow(int(state["start_frame"]), x.shape[2], x.transpose(1, 2))
        self._follower = follower
        return follower.block is not before

    @torch.compiler.disable
    def _ask(self, x: Tensor, flow: Tensor, timestep: Tensor) -> None:
        """Flow matching: the flow [B, C, F, H, W] at the timestep [B] implies the clean latents."""
        assert self._follower is not None
        with torch.inference_mode(False), torch.no_grad():
            clean = x - (timestep / STEPS).view(-1, 1, 1, 1, 1) * flow
            self._follower.memory.ask(clean.transpose(1, 2).to(x.dtype))


def _project(attention: Any, x: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries and keys, and values, [B, F, T, H, D]."""
    q, k, v = attention.norm_q(attention.q(x)), attention.norm_k(attention.k(x)), attention.v(x)
    shape = (frames, x.shape[1] // frames, attention.num_heads, attention.head_dim)
    q, k, v = (tensor.to(v.dtype).unflatten(1, shape[:2]).unflatten(3, shape[2:]) for tensor in (q, k, v))
    return q, k, v
