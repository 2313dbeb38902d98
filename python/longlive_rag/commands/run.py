"""`longlive-rag run`: a script of the user's own, with its model patched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from longlive_rag.backbones.run.settings import Policy, Settings
from longlive_rag.budget import BudgetOptions
from longlive_rag.files import atomic_path
from longlive_rag.options import Positional


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
        "context policy": ("policy", "embedding"),
        "machine": ("memory", "keep_cache"),
        "output": ("log",),
    }

    command: Positional[tuple[str, ...]]
    """The command to run, with its own options."""
    policy: Policy = field(default_factory=Policy)
    """The context policy. Default: the paper's memory within the model's own window."""
    embedding: Path | None = None
    """Checkpoint of the retrieval autoencoder used to search memory. Default: the mean of each latent channel."""
    memory: BudgetOptions = field(default_factory=BudgetOptions)
    """How much memory keys and values may take."""
    keep_cache: bool = False
    """Keep the pipeline's own key-value cache allocated, although nothing reads it."""
    log: Path | None = None
    """Write what each block of each video retrieved to this JSON file."""

    def run(self) -> int:
        if not self.command:
            raise ValueError("COMMAND must follow the options: longlive-rag run [OPTIONS] -- python inference.py ...")
        if self.embedding is not None and not self.embedding.is_file():
            raise FileNotFoundError(f"no autoencoder checkpoint at {self.embedding}")
        budget = self.memory.budget
        with tempfile.TemporaryDirectory(prefix="longlive-rag-") as folder:
            embedding = None if self.embedding is None else self.embedding.resolve()
            settings = Settings(Path(folder), self.policy, embedding, budget, self.keep_cache)
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
                f"{'' if self.keep_cache else freed}; {_in_words(report['config'])}",
                file=sys.stderr,
            )
        if not any(report["used"] for report in reports):
            families = ", ".join(sorted({report["family"] for report in reports}))
            raise ValueError(
                f"the {families} model was patched, but no call of it went through memory: calls with gradients, or "
                f"without a key-value cache, go to its own attention; is torch.no_grad() missing?"
            )
        if self.log is not None:
            with atomic_path(self.log) as partial:
                partial.write_text(json.dumps(reports, indent=1))
        return 0


def _in_words(config: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in config.items())
