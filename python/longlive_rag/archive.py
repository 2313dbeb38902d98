"""Tensors in a file that is read whole or refused, and a retrieval memory as such a file.

An archive is a safetensors file, so that other tools can look into it. Its metadata say what it is; its last tensor,
`checksums`, holds the SHA-256 of each tensor before it and, in the last row, of the header. It is written and read one
tensor at a time, and appears under its name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from longlive_rag.config import RetrievalConfig
from longlive_rag.embedding import AveragePool
from longlive_rag.files import atomic_path
from longlive_rag.selection import Retrieval

if TYPE_CHECKING:
    from longlive_rag.embedding import Embedding
    from longlive_rag.memory import RetrievalMemory
    from longlive_rag.models.sizes import TransformerSizes

_FORMAT = "longlive_rag archive"
_VERSION = "1"
_CHECKSUMS = "checksums"
_DIGEST_BYTES = hashlib.sha256().digest_size
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Spec(NamedTuple):
    """What a tensor of an archive is, before its content is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def spec_of(tensor: Tensor) -> Spec:
    """The spec of a tensor at hand."""
    return Spec(tensor.dtype, tuple(tensor.shape))


def write(
    path: Path, kind: str, facts: Mapping[str, Any], specs: Mapping[str, Spec], tensors: Iterable[Tensor]
) -> None:
    """Write an archive atomically; at no time is more than one tensor asked for.

    Args:
        kind: what the archive holds; `Archive` refuses another kind.
        facts: JSON values.
        specs: of all tensors.
        tensors: in the order of `specs`, on any device.

    Raises:
        OSError: the file cannot be written; an earlier one at `path` is left alone.
    """
    header: dict[str, Any] = {
        "__metadata__": {"format": _FORMAT, "version": _VERSION, "kind": kind, "facts": json.dumps(facts)}
    }
    offset = 0
    for name, spec in {**specs, _CHECKSUMS: Spec(torch.uint8, (len(specs) + 1, _DIGEST_BYTES))}.items():
        end = offset + spec.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at multiples of eight bytes
    digests = []
    with atomic_path(path) as partial, open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
            if spec_of(tensor) != spec:
                raise ValueError(f"{name} must be {spec}, got {spec_of(tensor)}")
            content = _content(tensor.detach().contiguous().cpu())
            file.write(content)
            digests.append(hashlib.sha256(content).digest())
        file.write(b"".join([*digests, hashlib.sha256(text).digest()]))


class Archive:
    """An archive that is open for reading.

    Attributes:
        facts: as they were written.
        specs: of its tensors, in order.

    Raises:
        OSError: the file is missing or may not be read.
        ValueError: it is not an archive of this kind, is of a later version, truncated, or altered.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115, closed by the with block
        try:
            self._start, self.facts, self.specs, self._digests = self._open(kind)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, on the CPU, in the order of `specs`; each is checked before it is handed out."""
        self._file.seek(self._start)
        for (name, spec), digest in zip(self.specs.items(), self._digests, strict=True):
            tensor = torch.empty(spec.shape, dtype=spec.dtype)
            content = _content(tensor)
            if self._file.readinto(content) != spec.nbytes or hashlib.sha256(content).digest() != digest:  # type: ignore[attr-defined]
                raise ValueError(f"{self.path} has been altered: {name} does not match its checksum")
            yield name, tensor

    def _open(self, kind: str) -> tuple[int, dict[str, Any], dict[str, Spec], list[bytes]]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{self.path} is not an archive of longlive_rag, or has been cut short")
        text = self._file.read(length)
        try:
            header = json.loads(text)
            metadata = header.pop("__metadata__")
            found, version = metadata["format"], metadata["version"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{self.path} is not an archive of longlive_rag, or its header has been altered") from None
        if found != _FORMAT:
            raise ValueError(f"{self.path} is not an archive of longlive_rag, but {found!r}")
        if version != _VERSION:
            raise ValueError(f"{self.path} is of version {version}, but this version reads {_VERSION}")
        try:
            specs = {
                name: Spec(_DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))) for name, entry in header.items()
            }
            expected = 8 + length + sum(spec.nbytes for spec in specs.values())
            checksums = specs.pop(_CHECKSUMS)
            facts = json.loads(metadata["facts"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path} has been altered: its header is damaged") from None
        if size != expected:
            how = "is truncated" if size < expected else "has been altered"
            raise ValueError(f"{self.path} {how}: it should have {expected} bytes, and has {size}")
        self._file.seek(size - checksums.nbytes)
        digests = [self._file.read(_DIGEST_BYTES) for _ in range(len(specs) + 1)]
        if digests.pop() != hashlib.sha256(text).digest():
            raise ValueError(f"{self.path} has been altered: its header does not match its checksum")
        if metadata["kind"] != kind:
            raise ValueError(f"{self.path} must be a {kind}, but is a {metadata['kind']}")
        return 8 + length, facts, specs, digests


def _content(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def save_memory(memory: RetrievalMemory, path: str | Path) -> None:
    """Write the memory to one file, atomically: index, pages of every frame that is kept, what was retrieved.

    One frame at a time is copied. Pages that are packed below the device are saved unpacked. Save between blocks: one
    that is not committed is left out.

    Raises:
        OSError: the file cannot be written; an earlier one at `path` is left alone.
        ValueError: the budget rebuilds frames, which are no longer there to be saved.
    """
    bank, index, retrieved = memory.bank, memory.index, memory.retrieved
    if bank.latents is not None:
        raise ValueError("a memory can be saved only without budget.rebuild, whose frames have no keys and values")
    entries = [entry for entry in bank.entries() if entry[1] < memory.committed]
    small = {
        "frequencies": memory._frequencies,
        "retrieved.starts": torch.tensor([block.block_start for block in retrieved], dtype=torch.int64),
    }
    if memory.committed:
        small |= {"embeddings": index.embeddings, "inverse_norms": index.inverse_norms}
    if retrieved:
        small["retrieved.frames"] = torch.stack([block.frame_table for block in retrieved])
        small["retrieved.similarity"] = torch.stack([block.similarity_table for block in retrieved])
    dtype, shape = bank.pages
    specs = {name: spec_of(tensor) for name, tensor in small.items()}
    specs |= {f"pages.{video}.{frame}": Spec(dtype, shape) for video, frame in entries}
    layers, _, heads, _, head_dim = shape
    facts = {
        "config": asdict(memory.config),
        "sizes": {"batch": memory.batch, "layers": layers, "heads": heads, "head_dim": head_dim, "grid": memory.grid},
        "dtype": str(dtype).removeprefix("torch."),
        "embedding": _embedding_facts(memory.embedding),
        "committed": memory.committed,
    }

    def tensors() -> Iterator[Tensor]:
        yield from small.values()
        for entry in entries:
            yield bank.read(entry)

    write(Path(path), "retrieval memory", facts, specs, tensors())


def load_memory(
    cls: type[RetrievalMemory],
    path: str | Path,
    model: TransformerSizes | None = None,
    shape: Sequence[int] | None = None,
    *,
    embedding: Embedding | None = None,
    device: torch.device | str | None = None,
    **arguments: Any,
) -> RetrievalMemory:
    """A memory as it was when it was saved, on this machine or another.

    Args:
        cls: `RetrievalMemory`.
        path: a file that `save` wrote.
        model: the backbone that will use it. If given, it must have the sizes and dtype that were saved.
        shape: of the latents, [B, F, C, H, W], any F and C; with `model`, batch and grid are compared too.
        embedding: the one it was made with; default `AveragePool`.
        device: of the pages; default that of the model, or the CPU.
        arguments: more for `cls`: selection and budget, which is not saved: another machine has other room. The
            `bank.budget` of the memory that was saved makes the new one forget what that one would have.

    Raises:
        OSError: the file is missing or may not be read.
        ValueError: it is truncated, altered, something else, or of another model or embedding.
    """
    with SavedMemory(Path(path)) as saved:
        if model is not None:
            saved.check_model(model, shape)
            device = device or next(model.parameters()).device
        memory = cls(
            saved.config,
            **saved.sizes,
            device=device or "cpu",
            dtype=saved.dtype,
            embedding=embedding or AveragePool(),
            **arguments,
        )
        try:
            saved.restore(memory)
        except BaseException:
            memory.close()
            raise
    return memory


class SavedMemory:
    """A retrieval memory in a file: what it is, and how to fill another one with it.

    Attributes:
        config: the context policy.
        sizes: batch, layers, heads, head_dim and grid.
        dtype: of the pages.
        committed: latent frames.

    Raises:
        OSError, ValueError: as `Archive`.
    """

    def __init__(self, path: Path) -> None:
        self._archive = Archive(path, "retrieval memory")
        self.path, facts = path, self._archive.facts
        self.config = RetrievalConfig(**facts["config"])
        self.sizes: dict[str, Any] = {**facts["sizes"], "grid": tuple(facts["sizes"]["grid"])}
        self.dtype: torch.dtype = getattr(torch, facts["dtype"])
        self.committed: int = facts["committed"]

    def __enter__(self) -> SavedMemory:
        return self

    def __exit__(self, *error: Any) -> None:
        self._archive.__exit__(*error)

    def check_model(self, model: TransformerSizes, shape: Sequence[int] | None) -> None:
        """Refuse a model, and latents of `shape` [B, F, C, H, W], that this memory was not made with.

        Raises:
            ValueError: the message names all that differs.
        """
        weight = next(model.parameters())
        pairs: dict[str, tuple[object, object]] = {
            "layers": (self.sizes["layers"], model.num_layers),
            "heads": (self.sizes["heads"], model.num_heads),
            "head_dim": (self.sizes["head_dim"], model.head_dim),
            "dtype": (self.dtype, weight.dtype),
        }
        if shape is not None:
            pairs["batch"] = self.sizes["batch"], shape[0]
            pairs["grid"] = self.sizes["grid"], tuple(model.token_grid(shape[3], shape[4]))
        different = [f"{name} {saved}, now {now}" for name, (saved, now) in pairs.items() if saved != now]
        if different:
            raise ValueError(f"{self.path} was saved with another model: {'; '.join(different)}")

    def restore(self, memory: RetrievalMemory) -> None:
        """Fill a new memory of the same sizes.

        Raises:
            ValueError: the file has been altered, or the memory searches by another embedding.
        """
        saved, now = self._archive.facts["embedding"], _embedding_facts(memory.embedding)
        if saved != now:
            raise ValueError(f"{self.path} must be searched by the embedding it was made with, {saved}, got {now}")
        small: dict[str, Tensor] = {}
        known = False
        for name, tensor in self._archive:
            kind, _, rest = name.partition(".")
            if kind != "pages":
                small[name] = tensor.to(memory.device)
                continue
            if not known:  # before the pages, of which some may have to be forgotten
                _restore_index(memory, small)
                known = True
            video, frame = map(int, rest.split("."))
            memory.bank.write((video, frame), tensor)
        starts = small["retrieved.starts"].tolist()
        tables = (small[f"retrieved.{name}"].unbind() if starts else () for name in ("frames", "similarity"))
        memory.retrieved = [Retrieval(*entry) for entry in zip(starts, *tables, strict=True)]
        memory._chosen = memory.retrieved[-1] if starts else None
        memory._frequencies.copy_(small["frequencies"])


def _restore_index(memory: RetrievalMemory, small: Mapping[str, Tensor]) -> None:
    memory.index.restore(small["embeddings"], small["inverse_norms"])
    memory.bank.forgotten = len(memory.index.forgotten)
    if memory._forgetting is not None:
        memory._forgetting.restore()


def _embedding_facts(embedding: Embedding) -> dict[str, Any]:
    """What tells an embedding from another: its class and its numbers."""
    facts: dict[str, Any] = {"class": type(embedding).__qualname__}
    if isinstance(embedding, nn.Module):
        digest = hashlib.sha256()
        for name, tensor in sorted(embedding.state_dict().items()):
            digest.update(name.encode() + _content(tensor.detach().contiguous().cpu()))
        return {**facts, "weights": digest.hexdigest()}
    attributes = getattr(embedding, "__dict__", {})
    return facts | {name: value for name, value in attributes.items() if isinstance(value, (bool, int, float, str))}
