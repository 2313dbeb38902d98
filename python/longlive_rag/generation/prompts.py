"""Files of prompts."""

from __future__ import annotations

from pathlib import Path


def read_prompts(path: Path) -> list[str]:
    """Read one prompt per line; empty lines are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts must be a UTF-8 text file, got {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts must hold at least one prompt, got none in {path}")
    return prompts
