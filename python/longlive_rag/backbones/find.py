"""Finding the transformer in what a user has, by what it offers and not by what it is called."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longlive_rag import rotary
from longlive_rag.backbones.families.family import COMMON, REQUIRED, CausVid, Family, LongLive, LongLiveRAG, MemFlow
from longlive_rag.backbones.families.infinity_rope import InfinityRoPE
from longlive_rag.backbones.families.krea import Krea
from longlive_rag.backbones.families.longlive2 import LongLive2
from longlive_rag.backbones.families.rolling_forcing import RollingForcing

FAMILIES: tuple[Family, ...] = (
    MemFlow(),
    RollingForcing(),
    LongLive2(),
    LongLiveRAG(),
    LongLive(),
    InfinityRoPE(),
    CausVid(),
    Krea(),
    Family(),
)
"""The first that fits counts: what builds on another family stands before it."""
PROJECTIONS = ("q", "k", "v", "o", "norm_q", "norm_k")
SIZES = ("num_heads", "head_dim")
HOLDERS = ("generator", "transformer", "model")
"""Attributes under which pipelines and wrappers keep their transformer."""


@dataclass(frozen=True)
class Backbone:
    """A causal video transformer, ready to be patched."""

    transformer: nn.Module
    attentions: tuple[Any, ...]
    """Self-attention of each layer."""
    parameters: tuple[str, ...]
    """Names of the attention's arguments, in order."""
    family: Family


def find_backbone(model: Any) -> Backbone:
    """The causal transformer of a model, wrapper or pipeline.

    Looks through torch.compile, FSDP and DDP, PEFT, and the pipelines and wrappers that keep it as `generator`,
    `transformer` or `model`.

    Raises:
        TypeError: there is none, or its attention is of no known family; the message says what was looked for and what
            was found.
        ValueError: there are several, or its rotary embedding is not Wan's.
    """
    for root in _roots(model):
        found = _attentions(root)
        if len(found) > 1:
            names = ", ".join(repr(name) for name in found)
            raise ValueError(f"model holds {len(found)} causal transformers ({names}); pass one of them")
        for name, attentions in found.items():
            transformer = root.get_submodule(name)
            parameters = tuple(inspect.signature(attentions[0].forward).parameters)
            family = _family(attentions[0], parameters)
            _check_rotary_embedding(transformer, attentions[0])
            return Backbone(transformer, tuple(attentions), parameters, family)
    raise TypeError(_nothing_found(model))


def holds_causal_attention(module: nn.Module) -> bool:
    """Whether there is any cached self-attention in it, of a known family or not."""
    return any(_is_attention(child) for child in module.modules())


def _roots(model: Any) -> list[nn.Module]:
    roots = [getattr(model, name, None) for name in HOLDERS] + [model]
    return [root for root in roots if isinstance(root, nn.Module)]


def _is_attention(module: nn.Module) -> bool:
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in PROJECTIONS):
        return False
    if not all(isinstance(getattr(module, name, None), int) for name in SIZES):
        return False
    return {"kv_cache", "current_start"} <= set(inspect.signature(module.forward).parameters)


def _attentions(root: nn.Module) -> dict[str, list[nn.Module]]:
    """Cached self-attention modules, under the name of the transformer that owns the list of blocks they lie in."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in root.named_modules():
        if _is_attention(module):
            path = name.split(".")
            depth = max(
                (i for i in range(1, len(path)) if isinstance(root.get_submodule(".".join(path[:i])), nn.ModuleList)),
                default=None,
            )
            if depth is not None:
                found.setdefault(".".join(path[: depth - 1]), []).append(module)
    return found


def _family(attention: nn.Module, parameters: tuple[str, ...]) -> Family:
    names = set(parameters)
    if names >= REQUIRED and names <= COMMON.union(*(family.marks for family in FAMILIES)):
        for family in FAMILIES:
            has_attributes = family.attributes and all(hasattr(attention, name) for name in family.attributes)
            if family.marks & names or has_attributes or not (family.marks or family.attributes):
                return family
    known = "; ".join(
        f"{family.name}: {', '.join(sorted(family.marks | family.attributes))}"
        for family in FAMILIES
        if family.marks or family.attributes
    )
    raise TypeError(
        f"model's attention ({type(attention).__name__}) takes ({', '.join(parameters)}); looked for one that takes "
        f"({', '.join(sorted(COMMON))}), and besides at most what marks a family ({known})"
    )


def _check_rotary_embedding(transformer: nn.Module, attention: nn.Module) -> None:
    """The engine rotates by itself; a model with other frequencies (RIFLEx, another theta) would come out wrong."""
    table = getattr(transformer, "freqs", None)
    if not isinstance(table, Tensor) or not table.is_complex():
        return
    head_dim = attention.head_dim
    assert isinstance(head_dim, int)
    temporal, spatial = rotary.temporal_frequencies(head_dim), rotary.spatial_frequencies(head_dim)
    expected = torch.cat([temporal, spatial, spatial])
    angle = table[1].angle().to(device="cpu", dtype=torch.float64)
    if angle.shape != expected.shape or not torch.allclose(angle, expected, atol=1e-5):
        raise ValueError("model.freqs must be Wan's rotary embedding (theta 10000), but its frequencies are others")


def _nothing_found(model: Any) -> str:
    looked_for = (
        f"looked for self-attention in a ModuleList of blocks, with {', '.join(PROJECTIONS)}, {', '.join(SIZES)} "
        f"and a forward that takes kv_cache and current_start"
    )
    roots = _roots(model)
    if not roots:
        return (
            f"model must be a causal video transformer, or hold one as {', '.join(HOLDERS)}; {looked_for}; found "
            f"{type(model).__name__}, which is no torch module and holds none there"
        )
    near = []
    for name, module in roots[0].named_modules():
        offered = [attribute for attribute in PROJECTIONS if isinstance(getattr(module, attribute, None), nn.Module)]
        if {"q", "k", "v"} <= set(offered):
            parameters = ", ".join(inspect.signature(module.forward).parameters)
            kind = type(module).__name__
            near.append(f"{name or 'itself'} ({kind}) with {', '.join(offered)} and forward({parameters})")
    kinds = sorted({type(module).__name__ for module in roots[0].modules()})
    found = "; ".join(near[:2]) if near else f"{type(roots[0]).__name__} made of {', '.join(kinds[:8])}"
    return f"model must hold a causal video transformer; {looked_for}; found {found}"
