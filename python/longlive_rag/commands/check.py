"""`longlive-rag check`: are the kernels right on this machine's GPU?"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from longlive_rag.files import check_writable, write_json


@dataclass(frozen=True)
class Check:
    """Check every kernel against its definition on this machine's GPU, and remember what can be trusted.

    Each kernel runs in a process of its own with a time limit, so that one that hangs or crashes takes nothing with it.
    What fails is not used from then on; the next best implementation takes its place. The exit status is 1 if something
    failed. Without a GPU there is nothing to check.

    Examples:
      longlive-rag check
      longlive-rag check --report report.json
    """

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "what to check": ("device", "quick"),
        "output": ("report",),
    }

    quick: bool = False
    """Check small sizes only, which takes seconds. Default: the sizes of real videos too."""
    device: str = "cuda"
    """The GPU to check, cuda or cuda:N."""
    report: Path | None = None
    """Write what a bug report needs to this JSON file."""

    def run(self) -> int:
        if self.report is not None:
            check_writable(self.report)
        import torch

        from longlive_rag.checking import isolated, verdicts
        from longlive_rag.checking.variants import VARIANTS
        from longlive_rag.native import attend_variants, cuda_status
        from longlive_rag.ops import _choice

        status = cuda_status()
        if not status.available:
            print(f"Nothing to check: {status.reason}.")
            self._write({"cuda": asdict(status)})
            return 0
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"device must be cuda or cuda:N, got {self.device!r}") from None
        if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device must be cuda or cuda:N with N below {torch.cuda.device_count()}, got {self.device!r}"
            )
        device = torch.device("cuda", device.index or 0)
        identity = verdicts.identity(device)
        print(f"{identity['device']}, compute capability {identity['capability']}, torch {identity['torch']}")
        found = {}
        for name in ["insert", "retrieve", "pack", *attend_variants(device)]:
            print(f"  {name:<14} ...", end="\r", flush=True)
            verdict = found[name] = isolated.check(name, device, thorough=not self.quick)
            instead = "" if verdict.trusted else f"; {VARIANTS[name].instead} is used instead"
            print(f"  {name:<14} {verdict.status:<8} {verdict.detail}{instead}", flush=True)
        path = verdicts.write(device, found)
        _choice.forget()
        print(f"Remembered in {path}." if path else "Not remembered: the cache folder cannot be written to.")
        self._write({"cuda": asdict(status), "verdicts": {name: asdict(verdict) for name, verdict in found.items()}})
        return 0 if all(verdict.trusted for verdict in found.values()) else 1

    def _write(self, facts: dict[str, object]) -> None:
        if self.report is None:
            return
        import torch

        from longlive_rag.checking import verdicts

        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        machine = {"system": platform.platform(), "python": platform.python_version()}
        write_json(self.report, {**machine, **verdicts.identity(device), **json.loads(json.dumps(facts))})
        print(f"Written: {self.report}")
