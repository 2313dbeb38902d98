"""Named tensors, one at a time, from checkpoint files of every common layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from longlive_rag.files import load_checkpoint

INDEX_SUFFIX = ".safetensors.index.json"
# Stems under which diffusers, Wan and transformers save a model in a folder.
_STEMS = ("diffusion_pytorch_model", "model")


def checkpoint_file(path: Path) -> Path:
    """The file that holds a checkpoint or, of a sharded one, its index.

    Args:
        path: a `.safetensors`, `.pt`, `.pth` or `.bin` file, a `.safetensors.index.json`, or a folder that holds
            `diffusion_pytorch_model` or `model` as safetensors, whole or sharded.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another kind of file.
    """
    if path.is_dir():
        names = [stem + suffix for stem in _STEMS for suffix in (INDEX_SUFFIX, ".safetensors")]
        for name in names:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"the folder {path} holds no checkpoint; expected one of {', '.join(names)}")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if not path.name.endswith((".safetensors", ".pt", ".pth", ".bin", INDEX_SUFFIX)):
        raise ValueError(f"checkpoint must be a .safetensors, .pt, .pth, .bin or {INDEX_SUFFIX} file, got {path}")
    return path


def read_tensors(path: Path, keys: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint with its name, on the CPU; files are mapped, not read, if possible.

    Args:
        path: as in `checkpoint_file`.
        keys: for `.pt` files, entries that may hold the weights; the first that is present wins, and a file with none
            of them is taken to be the weights itself.

    Raises:
        FileNotFoundError: the checkpoint, or a shard that its index names, is missing.
        ValueError: a file is damaged, or holds something other than tensors.
    """
    path = checkpoint_file(path)
    if path.name.endswith(INDEX_SUFFIX):
        for shard in _shards(path):
            yield from _read_safetensors(shard)
    elif path.suffix == ".safetensors":
        yield from _read_safetensors(path)
    else:
        yield from _read_pickle(path, keys)


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors shards: it lacks a weight_map") from error
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names")
    return shards


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, the handle is not a mapping
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def _read_pickle(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    content = load_checkpoint(path, mmap=True)
    content = next((content[key] for key in keys if key in content), content) if isinstance(content, dict) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        found = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path} must hold tensors, or tensors under one of {', '.join(keys) or '-'}, got {found}")
    yield from content.items()
