"""What is known of the kernels on this machine: a small file in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

import longlive_rag
from longlive_rag import native
from longlive_rag.files import write_json

Status = Literal["passed", "wrong", "crashed", "hung"]


@dataclass(frozen=True)
class Verdict:
    """How the check of one variant ended."""

    status: Status
    detail: str = ""
    """For a person: the case that failed, and how."""
    thorough: bool = False
    """Whether real sizes were checked too, or only what takes a few seconds."""

    @property
    def trusted(self) -> bool:
        return self.status == "passed"


def folder() -> Path:
    """Where verdicts are kept: ``$XDG_CACHE_HOME/longlive_rag``, by default ``~/.cache/longlive_rag``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longlive_rag"


def identity(device: torch.device) -> dict[str, str]:
    """All that a verdict depends on: device, driver, PyTorch, this package, and its compiled extension."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    module = native.extension()
    compiled = Path(module.__file__ or "") if module is not None else None
    return {
        "device": properties.name if properties else device.type,
        "capability": f"{properties.major}.{properties.minor}" if properties else "",
        "driver": str(native.driver_version()),
        "torch": torch.__version__,
        "package": longlive_rag.__version__,
        "extension": hashlib.sha256(compiled.read_bytes()).hexdigest()[:16] if compiled else "",
    }


def read(device: torch.device) -> dict[str, Verdict]:
    """The verdicts that hold for this machine as it is; empty where there are none, or none that can be read."""
    try:
        content = json.loads(_path(device).read_text(encoding="utf-8"))
        if content["identity"] != identity(device):
            return {}
        return {name: Verdict(**entry) for name, entry in content["verdicts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # missing, cut short or of another version: the check is made again


def write(device: torch.device, verdicts: dict[str, Verdict]) -> Path | None:
    """Remember these verdicts; None where the cache folder cannot be written to, which only costs another check."""
    path = _path(device)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {**read(device), **verdicts}
        write_json(
            path,
            {
                "identity": identity(device),
                "verdicts": {name: asdict(verdict) for name, verdict in known.items()},
            },
        )
        return path
    return None


def _path(device: torch.device) -> Path:
    key = hashlib.sha256(json.dumps(identity(device), sort_keys=True).encode()).hexdigest()[:16]
    return folder() / f"verdict_{key}.json"
