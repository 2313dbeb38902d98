"""Files: written atomically, so that a reader never meets half a file, and read with errors that name them."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import pickle
import secrets
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which is renamed to `path` when the block ends without an exception.

    The temporary name keeps the suffix, since some writers choose the format by it. After an exception the temporary
    file is removed and an earlier file at `path` is left alone; if the process is killed, `remove_leftovers` finds it.
    The content is on the disk before it gets its name, so that not even a power cut leaves half a file.

    Raises:
        OSError: `path` is a folder, or its folder is missing or cannot be written to; raised before the block runs.
    """
    path = Path(path)
    check_writable(path)
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of `atomic_path(path)`."""
    for leftover in path.parent.glob(f".{glob.escape(path.stem)}.{'[0-9a-f]' * 8}{glob.escape(path.suffix)}"):
        leftover.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        OSError: as `atomic_path`.
        ValueError: a number is not finite, which JSON cannot express.
    """
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def load_checkpoint(path: Path, *, device: torch.device | str = "cpu", mmap: bool = False) -> Any:
    """Read what `torch.save` wrote: tensors and plain values; anything else in the file is refused, not run.

    Args:
        device: where the tensors go.
        mmap: map the file instead of reading it, if its format (zip, torch's since 1.6) allows that.

    Raises:
        OSError: the file is missing or may not be read.
        ValueError: it is damaged, or holds something else.
    """
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except PermissionError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:  # cut short: any of these
        reason = (str(error) or "it ends early").splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors: it is damaged or holds something else ({reason})"
        ) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise unless a file can be written at `path`; call it before long work.

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
    """Create the folder `path`, with its parents, if it is missing, and return it; call it before long work.

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
