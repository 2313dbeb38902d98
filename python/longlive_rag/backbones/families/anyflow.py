"""diffusers' `AnyFlowFARTransformer3DModel`, by its own conventions: a hook on the model, and attention processors.

The model keeps distant chunks compressed: after each chunk, a pass over the whole video fills one cache with them and
another with the newest chunks in full. With retrieval memory, a chunk attends to the memory's frames in full instead of
the compressed ones; the pass that fills the caches stays the model's own, and the keys that it makes for frames in full
are kept.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from longlive_rag.backbones.follow import Follower
from longlive_rag.config import RetrievalConfig
from longlive_rag.embedding import AveragePool, Embedding
from longlive_rag.memory import Retrieval, RetrievalMemory
from longlive_rag.selection import Selection

HOOK = "longlive_rag_retrieval_memory"
ATTENTION = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "heads", "processor")


def apply_retrieval_memory(
    module: nn.Module,
    config: RetrievalConfig | None = None,
    *,
    embedding: Embedding | None = None,
    selection: Selection | None = None,
) -> RetrievalHook:
    """Give diffusers' causal Wan-like transformer retrieval memory.

        hook = apply_retrieval_memory(pipeline.transformer, RetrievalConfig(context_frames=12))
        video = pipeline(prompt, num_frames=..., chunk_partition=[...])
        remove_retrieval_memory(pipeline.transformer)

    Args:
        module: an `AnyFlowFARTransformer3DModel` (diffusers 0.42), as it is or compiled.
        config: the context policy; default the paper's. Chunks may be shorter than `block_frames`.
        embedding: of clean latent frames; default `AveragePool`.
        selection: which frames come back; default the most similar ones.

    Returns:
        The hook; its `retrieved` tells what each chunk of the last video got.

    Raises:
        TypeError: module is no such transformer; the message says what was looked for and found.
        ValueError: it has retrieval memory already, or config asks with drafts, which its schedulers do not give.
    """
    from diffusers.hooks import HookRegistry

    if config is None:
        config = RetrievalConfig()
    if config.query != "latest":
        raise ValueError(f"config.query must be 'latest' for a diffusers transformer, got {config.query!r}")
    module = getattr(module, "_orig_mod", module)
    attentions = _attentions(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(HOOK) is not None:
        raise ValueError("module has retrieval memory already; call remove_retrieval_memory first")
    hook = _hook_class()(config, attentions, embedding or AveragePool(), selection)
    registry.register_hook(hook, HOOK)  # type: ignore[arg-type]
    return hook


def remove_retrieval_memory(module: nn.Module) -> None:
    """Take back what `apply_retrieval_memory` did."""
    from diffusers.hooks import HookRegistry

    module = getattr(module, "_orig_mod", module)
    HookRegistry.check_if_exists_or_initialize(module).remove_hook(HOOK, recurse=False)


class RetrievalHook:
    """Follows the calls of the transformer. Mixed with diffusers' `ModelHook` where it is made."""

    def __init__(
        self, config: RetrievalConfig, attentions: list[Any], embedding: Embedding, selection: Selection | None
    ) -> None:
        super().__init__()
        self.config = config
        self._attentions, self._embedding, self._selection = attentions, embedding, selection
        self._processors = [attention.processor for attention in attentions]
        self._cache: weakref.ref[Tensor] | None = None
        self._sequence: Follower | None = None
        self.frames = range(0)
        """Frames of the current call that are in full."""

    @property
    def retrieved(self) -> list[Retrieval]:
        """What each chunk of the last video got from memory: `.block_start`, `.frames` [B][k], `.similarity` [B][k]."""
        return [] if self._sequence is None else self._sequence.retrieved

    @property
    def memory(self) -> RetrievalMemory:
        assert self._sequence is not None, "the transformer's call begins a pass"
        return self._sequence.memory

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        for layer, attention in enumerate(self._attentions):
            attention.set_processor(MemoryProcessor(self, layer, attention.processor))
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        for attention, processor in zip(self._attentions, self._processors, strict=True):
            attention.set_processor(processor)
        if self._sequence is not None:
            self._sequence.close()
        return module

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        if call.get("kv_cache") is not None:
            self._follow(module, call)
        return args, kwargs

    def _follow(self, module: Any, call: dict[str, Any]) -> None:
        latents, partition, flag = call["hidden_states"], list(call["chunk_partition"]), call["kv_cache_flag"]
        sequence = self._sequence_of(module, latents, call["kv_cache"][0]["full_cache"])
        start, end = sum(partition[:-1]), sum(partition)
        if not flag["is_cache_step"]:
            self.frames = range(start, end)
            sequence.follow(start, partition[-1], latents)
            return
        in_full = partition[-(module.config.full_chunk_limit - 1) :] if module.config.full_chunk_limit > 1 else []
        self.frames = range(end - sum(in_full), end)
        if sequence.block is None or sequence.block.stop < end:
            sequence.follow(start, partition[-1], latents[:, start:end])  # a chunk that was given, not made
        sequence.predicted(latents[:, start:end])

    def _sequence_of(self, module: Any, latents: Tensor, cache: Tensor) -> Follower:
        """The video that this cache belongs to; every call of the pipeline makes a cache of its own."""
        if self._cache is None or self._cache() is not cache:
            if self._sequence is not None:
                self._sequence.close()
            _, rows, columns = module.config.patch_size

            def make_memory() -> RetrievalMemory:
                return RetrievalMemory(
                    self.config,
                    batch=latents.shape[0],
                    layers=len(self._attentions),
                    heads=module.config.num_attention_heads,
                    head_dim=module.config.attention_head_dim,
                    grid=(latents.shape[3] // rows, latents.shape[4] // columns),
                    device=latents.device,
                    dtype=latents.dtype,
                    embedding=self._embedding,
                    selection=self._selection,
                )

            self._cache, self._sequence = weakref.ref(cache), Follower(self.config, make_memory)
        assert self._sequence is not None
        return self._sequence


class MemoryProcessor:
    """Stands in for the attention processor of one layer."""

    def __init__(self, hook: RetrievalHook, layer: int, original: Any) -> None:
        self.hook, self.layer, self.original = hook, layer, original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        rotary_emb: Any = None,
        kv_cache: Any = None,
        kv_cache_flag: Any = None,
    ) -> Tensor:
        arguments = (hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if kv_cache is None or torch.is_grad_enabled():
            return self.original(attn, *arguments, kv_cache=kv_cache, kv_cache_flag=kv_cache_flag)
        if kv_cache_flag["is_cache_step"]:
            _, k, v = self._project(attn, hidden_states[:, kv_cache_flag["num_compressed_tokens"] :])
            self.hook.memory.rewrite(self.layer, self.hook.frames, k, v)
            return self.original(attn, *arguments, kv_cache=kv_cache, kv_cache_flag=kv_cache_flag)
        q, k, v = self._project(attn, hidden_states)
        out = self.hook.memory.attend(self.layer, q, k, v).flatten(2)
        for module in attn.to_out:
            out = module(out)
        return out

    def _project(self, attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys, and values, [B, F, T, H, D]."""
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        frames = len(self.hook.frames)
        q, k, v = (tensor.to(x.dtype).unflatten(2, (attn.heads, -1)).unflatten(1, (frames, -1)) for tensor in (q, k, v))
        return q, k, v


def _hook_class() -> type[RetrievalHook]:
    from diffusers.hooks import ModelHook

    return type("RetrievalMemoryHook", (RetrievalHook, ModelHook), {"__doc__": RetrievalHook.__doc__})


def _attentions(module: nn.Module) -> list[Any]:
    attentions = [getattr(block, "attn1", None) for block in getattr(module, "blocks", [])]
    parameters = inspect.signature(type(module).forward).parameters
    fits = attentions and all(hasattr(attention, name) for attention in attentions for name in ATTENTION)
    if not fits or not {"chunk_partition", "kv_cache", "kv_cache_flag"} <= set(parameters):
        found = ", ".join(parameters) if isinstance(module, nn.Module) else "no torch module"
        raise TypeError(
            f"module must be a causal transformer of diffusers such as AnyFlowFARTransformer3DModel; looked for blocks "
            f"whose attn1 has {', '.join(ATTENTION)} and a forward that takes chunk_partition, kv_cache and "
            f"kv_cache_flag; found {type(module).__name__} with forward({found})"
        )
    return attentions
