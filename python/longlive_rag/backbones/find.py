"""Finding the transformer in what a user has, by what it offers and not by what it is called."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from longlive_rag.backbones.families import FAMILIES
from longlive_rag.backbones.family import CausalTransformer, Family

HOLDERS = ("generator", "transformer", "model")
"""Attributes under which pipelines and wrappers keep their transformer."""
QUERY_KEY_VALUE = (("q", "k", "v"), ("to_q", "to_k", "to_v"))
"""What the projections of an attention module are called, cached or not."""


def find_transformer(model: Any) -> CausalTransformer:
    """The causal transformer of a model, wrapper or pipeline.

    Looks through torch.compile, FSDP and DDP, PEFT, and the pipelines and wrappers that keep it as `generator`,
    `transformer` or `model`.

    Raises:
        TypeError: there is none, or its attention is of no known family; the message says what was looked for and what
            was found.
        ValueError: there are several, or its rotary embedding is not the family's.
    """
    for root in _roots(model):
        found = _cached_attentions(root)
        if len(found) > 1:
            names = ", ".join(repr(name) for name in found)
            raise ValueError(f"model holds {len(found)} causal transformers ({names}); pass one of them")
        for name, attentions in found.items():
            transformer = CausalTransformer(root.get_submodule(name), tuple(attentions), _family(attentions[0]))
            transformer.family.check(transformer)
            return transformer
    raise TypeError(_nothing_found(model))


def holds_cached_attention(module: nn.Module) -> bool:
    """Whether there is any cached self-attention in it, of a known family or not."""
    return any(_is_attention(child) for child in module.modules())


def _is_attention(module: nn.Module) -> bool:
    return any(family.is_attention(module) for family in FAMILIES)


def _roots(model: Any) -> list[nn.Module]:
    roots = [getattr(model, name, None) for name in HOLDERS] + [model]
    return [root for root in roots if isinstance(root, nn.Module)]


def _cached_attentions(root: nn.Module) -> dict[str, list[nn.Module]]:
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


def _family(attention: nn.Module) -> Family:
    relatives = [family for family in FAMILIES if family.is_attention(attention)]
    taken = relatives[0].arguments(attention)
    known = frozenset().union(*(family.known_arguments for family in relatives))
    if taken <= known:
        for family in relatives:
            if family.fits(attention):
                return family
    common = frozenset.intersection(*(family.known_arguments for family in relatives))
    own = {family.name: family.known_arguments - common for family in relatives}
    marks = "; ".join(f"{name}: {', '.join(sorted(names))}" for name, names in own.items() if names)
    name, unknown = type(attention).__name__, ", ".join(sorted(taken - known)) or "too little"
    raise TypeError(
        f"model is of a causal family that patch does not know: its attention ({name}) takes {unknown}. In detail: "
        f"looked for one that takes ({', '.join(sorted(common))}), and at most what marks a family besides ({marks})"
    )


def _nothing_found(model: Any) -> str:
    """One short sentence; then what was looked for, and what was found."""
    looked_for = "; or with ".join(dict.fromkeys(family.looked_for for family in FAMILIES))
    looked_for = f"looked for self-attention in a ModuleList of blocks, with {looked_for}"
    roots = _roots(model)
    kind = type(model).__name__
    if not roots:
        return (
            f"model must be a causal video transformer or hold one, got {kind}. In detail: {looked_for}; found no "
            f"torch module, neither itself nor as {', '.join(HOLDERS)}"
        )
    attentions = []
    for name, module in roots[0].named_modules():
        offered = next((names for names in QUERY_KEY_VALUE if all(hasattr(module, name) for name in names)), None)
        if offered is not None:
            parameters = ", ".join(inspect.signature(module.forward).parameters)
            attentions.append(
                f"{name or 'itself'} ({type(module).__name__}) with {', '.join(offered)} and forward({parameters})"
            )
    root = type(roots[0]).__name__
    if attentions:
        return (
            f"model must be causal, but {root} is bidirectional: its attention takes no key-value cache. In detail: "
            f"{looked_for}; found {'; '.join(attentions[:2])}"
        )
    kinds = sorted({type(module).__name__ for module in roots[0].modules()})
    return (
        f"model holds no causal video transformer. In detail: {looked_for}; found {root} made of {', '.join(kinds[:8])}"
    )
