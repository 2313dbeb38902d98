"""What `longlive-rag run` tells the processes that it starts; without torch, which the command need not wait for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from longlive_rag.budget import Budget
from longlive_rag.config import RetrievalConfig

VARIABLE = "LONGLIVE_RAG_RUN"
"""Environment variable that holds the settings."""
STARTUP = Path(__file__).parent / "startup"
"""Folder whose sitecustomize has the model patched."""


@dataclass(frozen=True)
class Settings:
    """How to patch the model of a script, and where to report."""

    config: RetrievalConfig
    reports: Path
    """Folder for one report from each process that patched a model."""
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
            config=RetrievalConfig(**content.pop("config")),
            reports=Path(content.pop("reports")),
            embedding=None if embedding is None else Path(embedding),
            budget=Budget(folder=None if folder is None else Path(folder), **budget),
            **content,
        )
