"""What is checked: the kernels, by the names that verdicts and messages use."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """One implementation of one operation."""

    name: str
    operation: str
    environment: dict[str, str] = field(default_factory=dict)
    """What makes a process use this implementation and no other."""
    instead: str = "the PyTorch implementation"
    """What takes its place when it is not trusted."""
    least_tokens: int = 1
    """Of a latent frame; smaller ones are another variant's."""


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("insert", "insert"),
        Variant("retrieve", "retrieve"),
        Variant("pack", "pack"),
        Variant("attend-hopper", "attend", {"LONGLIVE_RAG_ATTEND": "hopper"}, "the kernel for sm_80", least_tokens=64),
        Variant("attend-ampere", "attend", {"LONGLIVE_RAG_ATTEND": "ampere"}, "PyTorch's attention"),
    )
}
