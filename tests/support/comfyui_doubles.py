"""Doubles of what ComfyUI hands to a pack of nodes; interfaces only, and none of its code.

Its autoregressive Wan and the sampler that drives it, the patcher of a model, and as much of `comfy_api.latest` as our
nodes use.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from longlive_rag import rotary
from support.causal_doubles import Attention, Transformer

PACK = Path(__file__).parents[2] / "comfyui"
Renoise = Callable[[int, int], Tensor]
"""From the number of the draw and of frames to noise [B, F, C, H, W]."""


class ComfyUIAttention(Attention):
    def forward(self, x, freqs, kv_cache=None, transformer_options=None):  # type: ignore[override]
        return self.uncached(x, kv_cache)


class CausalWan(Transformer):
    """The model itself, with caches as long as the video."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(ComfyUIAttention, **sizes)
        head_dim = self.blocks[0].self_attn.head_dim
        axes = [rotary.temporal_frequencies(head_dim), *[rotary.spatial_frequencies(head_dim)] * 2]
        self.rope_embedder = SimpleNamespace(theta=10000.0, axes_dim=[2 * len(axis) for axis in axes])
        self.eval().requires_grad_(False)

    def attend(self, attention, x, grid_sizes, cache, current_start, **extra):
        return attention(x, None, kv_cache=cache, transformer_options={})

    def forward(  # type: ignore[override]
        self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, **kwargs
    ):
        state = (transformer_options or {})["ar_state"]
        timestep = timestep[:, None].expand(-1, x.shape[2])
        return super().forward(x, timestep, context, 0, kv_cache=state["kv_caches"])

    def init_kv_caches(self, batch_size, max_seq_len, device, dtype):
        attention = self.blocks[0].self_attn
        shape = (batch_size, max_seq_len, attention.num_heads, attention.head_dim)
        return [
            {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")} | {"end": torch.tensor([0])}
            for _ in self.blocks
        ]


@torch.no_grad()
def sample(
    model: CausalWan, noise: Tensor, prompt: Tensor, steps: list[float], block: int, renoise: Renoise,
    given: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `SamplerARVideo` makes of noise [B, F, C, H, W], by way of the same calls.

    Args:
        steps: timesteps of the denoising passes.
        given: latents that the video begins with.
    """
    batch, frames, _, height, width = noise.shape
    tokens = height // 2 * (width // 2)
    caches = model.init_kv_caches(batch, frames * tokens, noise.device, noise.dtype)
    output, draws = torch.zeros_like(noise), 0

    def predict(latents: Tensor, start: int, timestep: float, again: bool) -> Tensor:
        for cache in caches:
            cache["end"] -= latents.shape[1] * tokens * again
        state = {"start_frame": start, "kv_caches": caches, "crossattn_caches": [{} for _ in caches]}
        time = torch.full((batch,), timestep)
        flow = model(latents.transpose(1, 2), time, context=prompt, transformer_options={"ar_state": state})
        assert all(int(cache["end"]) == (start + latents.shape[1]) * tokens for cache in caches)
        return latents - timestep / 1000 * flow.transpose(1, 2)

    start = 0
    if given is not None:
        output[:, : given.shape[1]] = given
        predict(given, 0, 0.0, again=False)
        start = given.shape[1]
    while start < frames:
        latents = noise[:, start : start + block]
        for step, timestep in enumerate(steps):
            clean = predict(latents, start, timestep, again=step > 0)
            if step + 1 < len(steps):
                sigma = steps[step + 1] / 1000
                latents = (1 - sigma) * clean + sigma * renoise(draws, clean.shape[1])
                draws += 1
        output[:, start : start + block] = clean
        predict(clean, start, 0.0, again=True)
        start += block
    return output


class ModelPatcher:
    """Clones share the weights, as ComfyUI's."""

    def __init__(self, model: ComfyUIModel) -> None:
        self.model = model
        self.attachments: dict[str, Any] = {}
        self.wrappers: dict[tuple[str, str], list[Any]] = {}

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.attachments, other.wrappers = dict(self.attachments), copy.copy(self.wrappers)
        return other

    def set_attachments(self, key: str, attachment: object) -> None:
        self.attachments[key] = attachment

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Any) -> None:
        self.wrappers[wrapper_type, key] = [*self.wrappers.get((wrapper_type, key), []), wrapper]


class ComfyUIModel(nn.Module):
    """What keeps the transformer."""

    diffusion_model: CausalWan

    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.add_module("diffusion_model", diffusion_model)


class _NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


def comfy_api() -> ModuleType:
    """`comfy_api.latest`: schemas keep what they are given."""

    def kept(*args: Any, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(args=args, **kwargs)

    kind = SimpleNamespace(Input=kept, Output=kept)
    io = SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}), Schema=kept, NodeOutput=_NodeOutput,
        **dict.fromkeys(("Model", "Int", "Combo", "String", "Latent", "Float", "Image"), kind),
    )  # fmt: skip
    module = ModuleType("comfy_api.latest")
    vars(module).update(
        io=io, ui=SimpleNamespace(PreviewImage=MagicMock()), ComfyExtension=type("ComfyExtension", (), {})
    )
    return module


def import_pack() -> ModuleType:
    """Our nodes, imported as ComfyUI imports a folder of `custom_nodes`."""
    sys.modules.setdefault("comfy_api", ModuleType("comfy_api"))
    sys.modules.setdefault("comfy_api.latest", comfy_api())
    spec = importlib.util.spec_from_file_location(
        "longlive_rag_comfyui", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
