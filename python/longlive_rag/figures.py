"""Figures for files, drawn without pyplot, whose state and choice of a window system affect the whole process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longlive_rag.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, whose parts make room for each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def save(drawn: Figure, path: Path, dpi: int = 100) -> None:
    """Write the figure atomically, in the format of the file's suffix.

    Raises:
        OSError: as `atomic_path`.
    """
    with atomic_path(path) as temporary:
        drawn.savefig(temporary, dpi=dpi)
