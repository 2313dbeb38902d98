"""What `longlive-rag run` tells the processes that it starts; without torch, which the command need not wait for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from longlive_rag.budget import Budget
from longlive_rag.config import Positions, Query, RetrievalConfig

VARIABLE = "LONGLIVE_RAG_RUN"
"""Environment variable that holds the settings."""
STARTUP = Path(__file__).parent / "startup"
"""Folder whose sitecustomize has the model patched."""


@dataclass(frozen=True)
class Policy:
    """What a user decides of the context policy; the rest is what `patch` reads off the model.

    Raises:
        ValueError: a value is out of range.
    """

    native: bool = False
    """The model's own attention, without memory."""
    context_frames: int | None = None
    """Latent frames a block attends to, its own included. Default: the model's own window."""
    sink_frames: int | None = None
    """First frames of the video, always in the context. Default: the model's own."""
    memory_frames: int | None = None
    """Frames retrieved for each block (K). Default: 6, or as many as fit into the model's own window."""
    recency_guard: int | None = None
    """Newest frames outside the context that may not be retrieved (R). Default: 5."""
    block_frames: int | None = None
    """Latent frames denoised together. Default: the model's own."""
    positions: Positions | None = None
    """Temporal positions: relative to the left end of the context, or frame indices. Default: what suits the model."""
    query: Query | None = None
    """What memory is searched with: the latest finished frame, or a draft of the block. Default: latest."""

    def __post_init__(self) -> None:
        # Each value by itself; how they fit together is seen when the model is there.
        roomy = {"context_frames": 4096, "sink_frames": 0, "memory_frames": 0, "recency_guard": 0, "block_frames": 1}
        RetrievalConfig(**(roomy | self.given))

    @property
    def given(self) -> dict[str, Any]:
        """Fields of `RetrievalConfig` that the user decided."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "native"}
        return {name: value for name, value in values.items() if value is not None}

    def applied_to(self, own: RetrievalConfig) -> RetrievalConfig:
        """The model's own config, but for what the user decided.

        Raises:
            ValueError: they do not fit together.
        """
        return replace(own, **self.given)


@dataclass(frozen=True)
class Settings:
    """How to patch the model of a script, and where to report."""

    reports: Path
    """Folder for one report from each process that patched a model."""
    policy: Policy = field(default_factory=Policy)
    embedding: Path | None = None
    budget: Budget = field(default_factory=Budget)
    keep_cache: bool = False

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The environment of the script, given this process's own."""
        content = json.dumps({**asdict(self), "reports": str(self.reports)}, default=str)
        path = os.pathsep.join([str(STARTUP), *filter(None, [inherited.get("PYTHONPATH")])])
        return {**inherited, VARIABLE: content, "PYTHONPATH": path}

    @classmethod
    def from_environment(cls) -> Settings:
        content = json.loads(os.environ[VARIABLE])
        embedding, budget = content.pop("embedding"), content.pop("budget")
        folder = budget.pop("folder")
        return cls(
            reports=Path(content.pop("reports")),
            policy=Policy(**content.pop("policy")),
            embedding=None if embedding is None else Path(embedding),
            budget=Budget(folder=None if folder is None else Path(folder), **budget),
            **content,
        )
