"""The inside of `longlive-rag run`: patches the first causal video transformer that a script calls."""

from __future__ import annotations

import atexit
import json
import os
import sys
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from longlive_rag.backbones.find import holds_cached_attention
from longlive_rag.backbones.patching import Patched, config_for, patch
from longlive_rag.backbones.run.settings import Settings
from longlive_rag.files import atomic_path
from longlive_rag.retrieval_log import retrieval_entries


def watch() -> None:
    """From now on, look at each module that is called for the first time, until one holds a causal transformer."""
    settings = Settings.from_environment()
    # Modules that were looked at; a model is complete when it is first called, LoRA, FSDP and all.
    seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def look(module: nn.Module, _: Any) -> None:
        if module in seen:
            return
        seen.add(module)
        if holds_cached_attention(module):
            handle.remove()
            _patch(module, settings)

    handle = register_module_forward_pre_hook(look)


def _patch(module: nn.Module, settings: Settings) -> None:
    try:
        policy = settings.policy
        own = config_for(module, "native" if policy.native else "memory", policy.context_frames)
        patched = patch(
            module,
            policy.applied_to(own),
            embedding=settings.embedding,
            budget=settings.budget,
            release_cache=not settings.keep_cache,
        )
    except (TypeError, ValueError, OSError) as error:
        print(f"longlive-rag run: {error}", file=sys.stderr)
        sys.exit(2)
    atexit.register(_report, patched, settings.reports / f"{os.getpid()}.json")


def _report(patched: Patched, path: Path) -> None:
    videos = [
        retrieval_entries(retrieved, video)
        for retrieved in [*patched.earlier_videos, patched.retrieved]
        if retrieved
        for video in range(len(retrieved[0].frames))
    ]
    content = {
        "family": patched.family,
        "config": asdict(patched.config),
        "used": patched.used,
        "released_bytes": patched.released_bytes,
        "videos": videos,
    }
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(content))
