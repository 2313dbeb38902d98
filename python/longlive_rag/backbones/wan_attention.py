"""Attaches memory to the transformers that descend from Wan: their forward, and that of their self-attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from longlive_rag.backbones.family import Attachment, CausalTransformer
from longlive_rag.backbones.follow import Follower, Kind
from longlive_rag.backbones.forwards import GradientGuard
from longlive_rag.generation.sampling import STEPS

Arguments = Mapping[str, Any]
"""The arguments of one call of the attention, by name."""


class Conventions(Protocol):
    """What a family decides about its passes; described in `WanFamily`."""

    has_clean_pass: bool

    def start_pass(
        self, follower: Follower[Any], start: int, frames: int, latents: Tensor, arguments: Arguments
    ) -> None: ...

    def recomputes(
        self, follower: Follower[Any], frames: int, latents: Tensor, arguments: Arguments
    ) -> Iterable[int] | None: ...

    def output(self, x: Tensor, arguments: Arguments) -> Any: ...


def attach_to_wan(transformer: CausalTransformer, attachment: Attachment, conventions: Conventions) -> None:
    """Replace the forward of the transformer, and of the self-attention of each layer.

    Projections and norms are called where they are, so that LoRA and quantised layers keep working. Calls without a
    key-value cache, or with gradients, go to the original attention.
    """
    memory_attention = _MemoryAttention(attachment, conventions)
    attachment.forwards.replace(transformer.module, memory_attention.transformer_forward)
    for layer, attention in enumerate(transformer.attentions):

        def make(original: Callable[..., Any], layer: int = layer, attention: Any = attention) -> Callable[..., Any]:
            return memory_attention.attention_forward(layer, attention, original)

        attachment.forwards.replace(attention, make)


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Tensors that live on: made in inference mode, they could not be written to outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass
class _Pass:
    """One call of the transformer."""

    input: Tensor | None
    """[B, C, F, H, W], or [B, F, C, H, W] where wrapper and transformer are one."""
    frames: int = 0
    tokens: tuple[int, int] = (0, 0)
    """Rows and columns of tokens in a latent frame."""
    frames_first: bool = False
    follower: Follower[Any] | None = None
    begins_block: bool = False
    recomputed: tuple[int, ...] | None = None
    """Frames whose keys the pass computes again, if that is its only purpose."""

    @property
    def latents(self) -> Tensor:
        """[B, F, C, H, W]."""
        assert self.input is not None
        return self.in_frames(self.input)

    def in_frames(self, x: Tensor) -> Tensor:
        """A tensor that is laid out like the input, with the frames first."""
        return x if self.frames_first else x.transpose(1, 2)


def _latents_among(values: list[Any]) -> Tensor | None:
    """The first five-dimensional tensor, or list of four-dimensional ones, which Wan's transformers take too."""
    for value in values:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor) and value[0].ndim == 4:
            return torch.stack(list(value))
        if isinstance(value, Tensor) and value.ndim == 5:
            return value
    return None


class _MemoryAttention:
    """The replaced forwards of one transformer, and the pass that they share."""

    def __init__(self, attachment: Attachment, conventions: Conventions) -> None:
        self._attachment, self._conventions = attachment, conventions
        self._asks_with_draft = attachment.config.query == "draft"
        self._gradients = GradientGuard()
        self._pass: _Pass | None = None

    def transformer_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._attachment.one_call:
                outer, self._pass = self._pass, _Pass(_latents_among([*args, *kwargs.values()]))
                try:
                    flow = original(*args, **kwargs)
                    if self._pass.follower is not None and self._pass.recomputed is None:
                        self._note_prediction(self._pass, self._pass.follower, flow, kwargs)
                    return flow
                finally:
                    self._pass = outer

        return forward

    def attention_forward(self, layer: int, attention: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        names = tuple(inspect.signature(original).parameters)

        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(names, args)) | kwargs  # noqa: B905  (trailing arguments have defaults)
            cache, x = arguments.get("kv_cache"), arguments["x"]
            if self._pass is None or cache is None:
                return original(*args, **kwargs)
            if self._gradients.needed(attention, x):
                self._check_own_cache(cache, int(arguments.get("current_start", 0)))
                return original(*args, **kwargs)
            if self._attachment.freed_caches is not None:
                self._attachment.freed_caches.free(cache)
            if layer == 0:
                self._measure(self._pass, arguments)
            q, k, v = _project(attention, x, self._pass.frames)
            if layer == 0:
                self._begin(self._pass, arguments, v.dtype)
            if self._pass.recomputed is not None:
                self._rewrite(layer, self._pass.recomputed, k, v)
                return original(*args, **kwargs)
            out = self._attend(layer, q, k, v)
            return self._conventions.output(attention.o(out.flatten(2)), arguments)

        return forward

    # torch.compile would compile this again for every layer, whose pages are other tensors.
    @torch.compiler.disable
    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._follower.memory.attend(layer, q, k, v)

    @torch.compiler.disable
    def _rewrite(self, layer: int, frames: tuple[int, ...], k: Tensor, v: Tensor) -> None:
        self._follower.memory.rewrite(layer, frames, k, v)

    def _check_own_cache(self, cache: dict[str, Any], start: int) -> None:
        """Raise if the model's own attention would read keys that its cache does not hold."""
        freed = self._attachment.freed_caches is not None and not cache["k"].numel()
        if freed or (start > 0 and self._attachment.followers.in_video(cache["k"])):
            raise RuntimeError(
                "a call with gradients goes to the model's own attention, but the blocks before it went to memory, and "
                "its cache does not hold them; make the whole video under torch.no_grad(), or call unpatch() before it"
            )

    @property
    def _follower(self) -> Follower[Any]:
        assert self._pass is not None and self._pass.follower is not None, "the first layer's attention begins a pass"
        return self._pass.follower

    @torch.compiler.disable
    def _measure(self, passed: _Pass, arguments: Arguments) -> None:
        passed.frames, *tokens = arguments["grid_sizes"][0].tolist()
        passed.tokens = (tokens[0], tokens[1])
        check_whole(arguments["x"].shape[1], passed.frames * tokens[0] * tokens[1])

    @torch.compiler.disable
    def _begin(self, passed: _Pass, arguments: Arguments, dtype: torch.dtype) -> None:
        """The first layer of a pass: which cache does it belong to, and which frames are these?"""
        start = _first_frame(int(arguments["current_start"]), passed.tokens[0] * passed.tokens[1])
        shape = [] if passed.input is None else list(passed.input.shape)
        if passed.frames not in shape[1:3]:
            raise ValueError(
                f"the transformer's input must hold latents of {passed.frames} frames, [B, C, F, H, W], got "
                f"{shape or 'no five-dimensional tensor'}"
            )
        passed.frames_first = shape[2] != passed.frames
        x = arguments["x"]
        kind = Kind(x.shape[0], passed.tokens, x.device, dtype)
        with _ordinary_tensors():
            follower = passed.follower = self._attachment.followers.follower(arguments["kv_cache"]["k"], kind)
            before = follower.block
            recomputed = self._conventions.recomputes(follower, passed.frames, passed.latents, arguments)
            if recomputed is not None:
                passed.recomputed = tuple(recomputed)
                return
            self._conventions.start_pass(follower, start, passed.frames, passed.latents, arguments)
        passed.begins_block = follower.block is not before

    @torch.compiler.disable
    def _note_prediction(self, passed: _Pass, follower: Follower[Any], flow: Any, arguments: Arguments) -> None:
        """Flow matching: the flow [B, C, F, H, W] at a timestep [B] or [B, F] implies the clean latents."""
        asks = passed.begins_block and self._asks_with_draft
        if not asks and self._conventions.has_clean_pass:
            return
        with _ordinary_tensors():
            flow = torch.stack(list(flow)) if isinstance(flow, (list, tuple)) else flow
            timestep = arguments["t"] if "t" in arguments else arguments["timestep"]
            sigma = timestep.reshape(flow.shape[0], -1, 1, 1, 1) / STEPS
            clean = (passed.latents - sigma * passed.in_frames(flow)).to(flow.dtype)
            if not self._conventions.has_clean_pass:
                follower.note_clean(clean)
            if asks:
                follower.memory.ask(clean)


def _first_frame(current_start: int, tokens: int) -> int:
    if current_start % tokens:
        raise ValueError(
            f"current_start must be a multiple of {tokens}, the tokens of a latent frame of this size, got "
            f"{current_start}; the pipeline's frame_seq_length is for another size"
        )
    return current_start // tokens


def check_whole(tokens: int, expected: int) -> None:
    """
    Raises:
        ValueError: an attention got another number of tokens than a pass has.
    """
    if tokens != expected:
        raise ValueError(
            f"model must give its attention all {expected} tokens of a pass, got {tokens}: turn its own sequence (or "
            f"context) parallelism off, and give patch the group of its processes instead"
        )


def _project(attention: Any, x: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries and keys, and values, [B, F, T, H, D]."""
    if getattr(attention, "fused_projections", False):
        q, k, v = attention.to_qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = attention.q(x), attention.k(x), attention.v(x)
    q, k = attention.norm_q(q), attention.norm_k(k)
    # A norm with a float32 weight returns float32.
    q, k, v = (
        tensor.to(v.dtype).unflatten(2, (attention.num_heads, attention.head_dim)).unflatten(1, (frames, -1))
        for tensor in (q, k, v)
    )
    return q, k, v
