"""The transformer compiled by torch.compile, once for all blocks of all videos, and remembered on disk."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from longlive_rag.checking.verdicts import folder
from longlive_rag.models import CausalWanModel

BACKEND = "inductor"


def cache_folder() -> Path:
    """Where compiled code is kept: `$TORCHINDUCTOR_CACHE_DIR`, by default `compiled` in this package's cache folder.

    torch's own default lies among the temporary files, which do not survive a restart.
    """
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or folder() / "compiled")


def compile_model(model: CausalWanModel) -> None:
    """Compile the passes of a model, in place, when the first of them runs.

    Every block has the same shapes and differs in what its tables hold, so one compilation serves all of them; a second
    one happens when the pools of keys and values grow. Another process that compiles the same finds it in
    `cache_folder`.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder())
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")  # off by default in older versions
    nn.Module.compile(model, backend=BACKEND, fullgraph=True)
