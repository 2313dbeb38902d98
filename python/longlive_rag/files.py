"""Output files: written beside their destination and renamed, so that a reader never meets half a file."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name `path` when the block ends without an exception.

    The temporary name keeps the suffix, since some writers choose a format by it. After an exception the temporary file
    is removed and an earlier file at `path` stays as it was.

    Raises:
        OSError: `path` is a folder, or its folder is missing or cannot be written to; raised before the block runs.
    """
    path = Path(path)
    check_writable(path)
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        OSError: as `atomic_path`.
        ValueError: a number is not finite, which JSON cannot express.
    """
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise unless a file can be written at `path`; to be called before long work.

    Raises:
        OSError: `path` is a folder, or its folder is missing or cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the path of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} of {path} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {path.parent} of {path} cannot be written to")


def output_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder `path`, with its parents, if it is missing, and return it; to be called before long work.

    Raises:
        OSError: `path` is a file, or cannot be created or written to.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; expected a folder for the results")
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {path} cannot be written to")
    return path
