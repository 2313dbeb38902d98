"""`patch`: an existing causal video model gets retrieval memory."""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from longlive_rag.backbones.find import Backbone, find_backbone
from longlive_rag.backbones.follow import Follower
from longlive_rag.config import RetrievalConfig
from longlive_rag.embedding import AveragePool, Embedding
from longlive_rag.generation.sampling import STEPS
from longlive_rag.memory import Retrieval, RetrievalMemory
from longlive_rag.selection import Selection

logger = logging.getLogger(__name__)
_MARK = "_longlive_rag_patched"


def patch(
    model: Any,
    config: RetrievalConfig | None = None,
    *,
    embedding: Embedding | None = None,
    selection: Selection | None = None,
    capacity: int = 64,
    device_frames: int | None = None,
    release_cache: bool = False,
) -> Patched:
    """Turn the attention of an existing causal video model into attention with retrieval memory.

        patched = patch(pipeline, RetrievalConfig())
        video = pipeline.inference(noise, prompts)

    The model's own code stays as it is; blocks, videos and prompt switches are read off its calls. Its projections and
    norms are called where they are, so that LoRA and quantised layers keep working. Calls without a key-value cache, or
    with gradients, go to the original attention.

    Args:
        model: a causal video transformer, or a wrapper or pipeline that holds one.
        config: the context policy; default the paper's. Its window replaces the model's own.
        embedding: of clean latent frames; default `AveragePool`.
        selection: which frames come back; default the most similar ones.
        capacity: latent frames to make room for at once; the length of the video, where it is known, avoids copies.
        device_frames: at most this many latent frames of each video on the GPU; older ones wait in host memory (see
            `RetrievalMemory`).
        release_cache: free the keys and values of the pipeline's own cache, which nothing reads any more, the first
            time it is passed (see `Patched.released_bytes`); not for krea realtime, whose pipeline goes by its size.

    Raises:
        TypeError: model holds no causal transformer of a known family.
        ValueError: it holds several, is patched already, or has another rotary embedding.
    """
    if config is None:
        config = RetrievalConfig()
    if not isinstance(config, RetrievalConfig):
        raise TypeError(f"config must be a RetrievalConfig, got {type(config).__name__}")
    backbone = find_backbone(model)
    if hasattr(backbone.transformer, _MARK):
        raise ValueError("model is patched already; call unpatch() on what patch() returned first")
    if config.query == "draft" and not backbone.family.drafts:
        raise ValueError(
            f"config.query must be 'latest' for {backbone.family.name}, whose blocks share their denoising steps, got "
            f"'draft'"
        )
    make_memory = functools.partial(
        RetrievalMemory,
        config,
        layers=len(backbone.attentions),
        heads=backbone.attentions[0].num_heads,
        head_dim=backbone.attentions[0].head_dim,
        embedding=embedding or AveragePool(),
        selection=selection,
        capacity=capacity,
        device_frames=device_frames,
    )
    return Patched(backbone, config, make_memory, release_cache and not backbone.family.reads_cache)


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
    frames_first: bool = False
    sequence: Follower | None = None
    frames: int = 0
    begins_block: bool = False
    observed: tuple[int, ...] | None = None
    """Frames whose keys the pass makes anew, if it is only that."""

    @property
    def latents(self) -> Tensor:
        """[B, F, C, H, W]."""
        assert self.input is not None
        return self.in_frames(self.input)

    def in_frames(self, x: Tensor) -> Tensor:
        """What is laid out like the input, with the frames first."""
        return x if self.frames_first else x.transpose(1, 2)


def _latents_among(values: list[Any]) -> Tensor | None:
    """The first five-dimensional tensor, or list of four-dimensional ones, which Wan's transformers take too."""
    for value in values:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor) and value[0].ndim == 4:
            return torch.stack(list(value))
        if isinstance(value, Tensor) and value.ndim == 5:
            return value
    return None


@dataclass
class _Tracked:
    """A key-value cache that was seen, and its sequence."""

    keys: weakref.ref[Tensor]
    """Tensor of the first layer's keys: as long as it lives, so does the cache."""
    sequence: Follower
    kind: tuple[Any, ...]
    """What the sequence's memory was made for; a later cache of the same kind takes it over."""


@dataclass
class _Released:
    """Keys or values of a pipeline's cache that were freed."""

    placeholder: weakref.ref[Tensor]
    shape: torch.Size


class Patched:
    """A patched model; also a context manager that unpatches.

    Conditional and unconditional passes have a cache each, and so a memory each.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: RetrievalConfig,
        make_memory: Callable[..., RetrievalMemory],
        release_cache: bool,
    ) -> None:
        self.config, self.family = config, backbone.family.name
        self.released_bytes = 0
        """Memory of the pipeline's own cache that was freed."""
        self._backbone, self._new_memory, self._release_cache = backbone, make_memory, release_cache
        self._sequences: list[_Tracked] = []
        self._released: list[_Released] = []
        self._pass: _Pass | None = None
        self._warned = False
        self._originals: list[tuple[nn.Module, Any]] = []
        transformer = backbone.transformer
        self._replace(transformer, self._transformer_forward(transformer.forward))
        for layer, attention in enumerate(backbone.attentions):
            self._replace(attention, self._attention_forward(layer, attention, attention.forward))
        setattr(transformer, _MARK, True)

    @property
    def retrieved(self) -> list[Retrieval]:
        """What each block of the last video got from memory: `.block_start`, `.frames` [B][k], `.similarity` [B][k]."""
        return self._sequences[0].sequence.retrieved if self._sequences else []

    @property
    def finished(self) -> list[list[Retrieval]]:
        """`retrieved` of each video before the last one."""
        return self._sequences[0].sequence.finished if self._sequences else []

    def reset(self) -> None:
        """Forget the videos so far. A pipeline that begins another video does not need it."""
        for tracked in self._sequences:
            tracked.sequence.reset()

    def unpatch(self) -> None:
        """Give the model its own attention back, and released caches their size; what they held is gone."""
        for module, original in self._originals:
            if original is None:
                del module.forward
            else:
                module.forward = original
        if self._originals:
            delattr(self._backbone.transformer, _MARK)
        self._originals = []
        self._restore_caches()
        for tracked in self._sequences:
            tracked.sequence.close()

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unpatch()

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._originals.append((module, vars(module).get("forward")))
        module.forward = forward

    def _transformer_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            outer, self._pass = self._pass, _Pass(_latents_among([*args, *kwargs.values()]))
            try:
                flow = original(*args, **kwargs)
                if self._pass.sequence is not None and self._pass.observed is None:
                    self._note_prediction(self._pass, flow, kwargs)
                return flow
            finally:
                self._pass = outer

        return forward

    @torch.compiler.disable
    def _note_prediction(self, passed: _Pass, flow: Any, arguments: Mapping[str, Any]) -> None:
        """Flow matching: the flow [B, C, F, H, W] at a timestep [B] or [B, F] implies the clean latents."""
        asks = passed.begins_block and self.config.query == "draft"
        if not asks and self._backbone.family.has_clean_pass:
            return
        assert passed.sequence is not None
        with _ordinary_tensors():
            flow = torch.stack(list(flow)) if isinstance(flow, (list, tuple)) else flow
            timestep = arguments["t"] if "t" in arguments else arguments["timestep"]
            sigma = timestep.reshape(flow.shape[0], -1, 1, 1, 1) / STEPS
            clean = (passed.latents - sigma * passed.in_frames(flow)).to(flow.dtype)
            if not self._backbone.family.has_clean_pass:
                passed.sequence.predicted(clean)
            if asks:
                passed.sequence.memory.ask(clean)

    def _attention_forward(self, layer: int, attention: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        names = self._backbone.parameters
        family = self._backbone.family

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(names, args)) | kwargs  # noqa: B905  (trailing arguments have defaults)
            if self._pass is None or arguments.get("kv_cache") is None or self._needs_gradients(attention, args[0]):
                return original(*args, **kwargs)
            if layer == 0:
                self._begin(arguments)
            if self._release_cache:
                self._release(arguments["kv_cache"])
            q, k, v = self._project(attention, arguments["x"], self._pass.frames)
            if self._pass.observed is not None:
                self._rewrite(layer, k, v)
                return original(*args, **kwargs)
            out = self._attend(layer, q, k, v)
            return family.output(attention.o(out.flatten(2)), arguments)

        return forward

    # torch.compile would compile this anew for every layer, whose pages are other tensors.
    @torch.compiler.disable
    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self._pass is not None and self._pass.sequence is not None, "the first layer's attention begins a pass"
        return self._pass.sequence.memory.attend(layer, q, k, v)

    @torch.compiler.disable
    def _rewrite(self, layer: int, k: Tensor, v: Tensor) -> None:
        assert self._pass is not None and self._pass.sequence is not None and self._pass.observed is not None
        self._pass.sequence.memory.rewrite(layer, self._pass.observed, k, v)

    @staticmethod
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

    @torch.compiler.disable
    def _begin(self, arguments: dict[str, Any]) -> None:
        """The first layer of a pass: whose is it, and which frames?"""
        assert self._pass is not None
        grid = arguments["grid_sizes"][0].tolist()
        frames, tokens = grid[0], grid[1] * grid[2]
        current_start = int(arguments["current_start"])
        if current_start % tokens:
            raise ValueError(
                f"current_start must be a multiple of {tokens}, the tokens of a latent frame of this size, got "
                f"{current_start}; the pipeline's frame_seq_length is for another size"
            )
        shape = [] if self._pass.input is None else list(self._pass.input.shape)
        if frames not in shape[1:3]:
            raise ValueError(
                f"the transformer's input must hold latents of {frames} frames, [B, C, F, H, W], got "
                f"{shape or 'no five-dimensional tensor'}"
            )
        self._pass.frames_first = shape[2] != frames
        sequence = self._sequence(arguments, (grid[1], grid[2]))
        self._pass.sequence, self._pass.frames = sequence, frames
        family, latents, before = self._backbone.family, self._pass.latents, sequence.block
        with _ordinary_tensors():
            observed = family.observe(sequence, frames, latents, arguments)
            if observed is not None:
                self._pass.observed = tuple(observed)
                return
            family.begin(sequence, current_start // tokens, frames, latents, arguments)
        self._pass.begins_block = sequence.block is not before

    def _sequence(self, arguments: dict[str, Any], grid: tuple[int, int]) -> Follower:
        """The sequence of a key-value cache, told by the tensor that holds the first layer's keys."""
        if self._release_cache:
            self._release(arguments["kv_cache"])
        keys, x = arguments["kv_cache"]["k"], arguments["x"]
        dead = []
        for tracked in self._sequences:
            owner = tracked.keys()
            if owner is keys:
                return tracked.sequence
            if owner is None:
                dead.append(tracked)
        kind = (x.shape[0], grid, x.device, x.dtype)
        for tracked in dead:
            if tracked.kind == kind:
                tracked.keys = weakref.ref(keys)
                tracked.sequence.reset()
                return tracked.sequence
        self._sequences = [tracked for tracked in self._sequences if tracked not in dead]
        sequence = Follower(self.config, functools.partial(self._make_memory, x, grid))
        self._sequences.append(_Tracked(weakref.ref(keys), sequence, kind))
        return sequence

    def _make_memory(self, x: Tensor, grid: tuple[int, int]) -> RetrievalMemory:
        *_, values = self._project(self._backbone.attentions[0], x[:, :1], 1)
        return self._new_memory(batch=x.shape[0], grid=grid, device=x.device, dtype=values.dtype)

    def _needs_gradients(self, attention: nn.Module, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        needed = x.requires_grad or any(parameter.requires_grad for parameter in attention.parameters())
        if needed and not self._warned:
            self._warned = True
            logger.warning("calls with gradients go to the model's own attention, without memory; use torch.no_grad()")
        return needed

    def _release(self, cache: dict[str, Any]) -> None:
        for name in ("k", "v"):
            tensor = cache[name]
            if isinstance(tensor, Tensor) and tensor.numel():
                cache[name] = tensor.new_empty(tensor.shape[0], 0, *tensor.shape[2:])
                self._released.append(_Released(weakref.ref(cache[name]), tensor.shape))
                self.released_bytes += tensor.nbytes

    def _restore_caches(self) -> None:
        # The pipeline owns the dictionaries. Holding them here would keep dead caches, and their sequences, alive.
        for released in self._released:
            placeholder = released.placeholder()
            if placeholder is None:
                continue
            for owner in gc.get_referrers(placeholder):
                if isinstance(owner, dict):
                    for name in [name for name in ("k", "v") if owner.get(name) is placeholder]:
                        owner[name] = placeholder.new_zeros(released.shape)
        self._released = []
