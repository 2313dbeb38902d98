"""`longlive-rag run`: a script of the user's own, with its model patched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from longlive_rag.config import RetrievalConfig
from longlive_rag.files import atomic_path
from longlive_rag.options import Positional

ENVIRONMENT = "LONGLIVE_RAG_RUN"
STARTUP = Path(__file__).parents[1] / "backbones" / "run" / "startup"
"""Folder whose sitecustomize has the model patched."""


@dataclass(frozen=True)
class Settings:
    """What `longlive-rag run` tells the processes that it starts."""

    config: RetrievalConfig
    reports: Path
    """Folder for one report of each process that patched a model."""
    embedding: Path | None = None
    device_frames: int | None = None
    keep_cache: bool = False

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The environment of the script, given this process's own."""
        content = json.dumps({**asdict(self), "reports": str(self.reports)}, default=str)
        path = os.pathsep.join([str(STARTUP), *filter(None, [inherited.get("PYTHONPATH")])])
        return {**inherited, ENVIRONMENT: content, "PYTHONPATH": path}

    @classmethod
    def from_environment(cls) -> Settings:
        content = json.loads(os.environ[ENVIRONMENT])
        embedding = content.pop("embedding")
        return cls(
            config=RetrievalConfig(**content.pop("config")),
            reports=Path(content.pop("reports")),
            embedding=None if embedding is None else Path(embedding),
            **content,
        )


@dataclass(frozen=True)
class Run:
    """Run an inference script with retrieval memory added to its video model, without changing the script.

    In every Python process that the command starts, the first causal video transformer called is patched. Launchers
    such as torchrun work too.

    Examples:
      longlive-rag run -- python inference.py --config_path configs/config.yaml
      longlive-rag run --memory-frames 4 --log retrieved.json -- \\
          torchrun --nproc-per-node 8 inference.py
    """

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "context policy": ("memory", "embedding"),
        "machine": ("device_frames", "keep_cache"),
        "output": ("log",),
    }

    command: Positional[tuple[str, ...]]
    """The command to run, with its own options."""
    memory: RetrievalConfig = field(default_factory=RetrievalConfig)
    """The context policy."""
    embedding: Path | None = None
    """Checkpoint of the retrieval autoencoder used to search memory. Default: the mean of each latent channel."""
    device_frames: int | None = None
    """Latent frames of each video that stay on the GPU at most; older ones move to host memory. Default: all."""
    keep_cache: bool = False
    """Keep the pipeline's own key-value cache allocated, although nothing reads it."""
    log: Path | None = None
    """Write what each block of each video retrieved to this JSON file."""

    def run(self) -> int:
        if not self.command:
            raise ValueError("COMMAND must follow the options: longlive-rag run [OPTIONS] -- python inference.py ...")
        if self.embedding is not None and not self.embedding.is_file():
            raise FileNotFoundError(f"no autoencoder checkpoint at {self.embedding}")
        with tempfile.TemporaryDirectory(prefix="longlive-rag-") as folder:
            embedding = None if self.embedding is None else self.embedding.resolve()
            settings = Settings(self.memory, Path(folder), embedding, self.device_frames, self.keep_cache)
            status = subprocess.run(self.command, env=settings.environment(os.environ)).returncode
            reports = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
        if status:
            return status if status > 0 else 128 - status
        if not reports:
            raise ValueError(f"{self.command[0]} called no causal video transformer, so nothing was patched")
        for report in reports:
            freed = f"; {report['released_bytes'] / 2**20:.0f} MiB of its own cache freed"
            print(
                f"longlive-rag run: {report['family']} model patched, videos with memory: {len(report['videos'])}"
                f"{'' if self.keep_cache else freed}",
                file=sys.stderr,
            )
        if self.log is not None:
            with atomic_path(self.log) as beside:
                beside.write_text(json.dumps(reports, indent=1))
        return 0
