"""The retrieval memory of one batch of videos: the engine that every backbone calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from longlive_rag import archive, ops, rotary
from longlive_rag.bank import FrameBank
from longlive_rag.config import RetrievalConfig
from longlive_rag.context import UNUSED, ContextPlan
from longlive_rag.embedding import Embedding
from longlive_rag.index import LatentIndex
from longlive_rag.selection import Request, Selection, SimilaritySelection


@dataclass(frozen=True)
class Retrieval:
    """What one block retrieved."""

    block_start: int
    frame_table: Tensor
    """int32 [B, K], negative: unused. On the memory's device, so that recording it does not stop the GPU."""
    similarity_table: Tensor
    """float32 [B, K]."""

    @property
    def frames(self) -> list[list[int]]:
        """Retrieved frames of each video, most similar first."""
        return [[frame for frame in row if frame >= 0] for row in self.frame_table.tolist()]

    @property
    def similarity(self) -> list[list[float]]:
        """Cosine similarity of each retrieved frame."""
        rows = zip(self.frame_table.tolist(), self.similarity_table.tolist(), strict=True)
        return [[value for frame, value in zip(*row, strict=True) if frame >= 0] for row in rows]


class Tables(NamedTuple):
    """What the operations read of a block: int32 on the device, one row per video, `UNUSED` where there is nothing."""

    block_slots: Tensor
    """[B, F]: the slot that each frame of the block is written to."""
    slots: Tensor
    """[B, N]: the slot of each context entry."""
    positions: Tensor
    """[B, N]: its temporal position."""
    query_positions: Tensor
    """[B, F]: temporal position of each frame of the block."""


class TransformerSizes(Protocol):
    """What a transformer says of itself, as `CausalWanModel` does, so that a memory can be made for it."""

    num_layers: int
    num_heads: int
    head_dim: int

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights; the first one has the device and dtype of the keys."""
        ...

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a latent frame of this size."""
        ...


class RetrievalMemory:
    """Keys and values of all frames so far, and the attention of the current block to those it should see.

    Use: ``begin_block``, then any number of passes in which every layer calls ``attend`` once, then ``commit`` with the
    clean latents. Each pass of a block overwrites the same pages; what the last one wrote is final once the block is
    committed. A block may be begun again (a prompt switch that recomputes the newest frames).

    CUDA graphs: tables are filled in place and there is one set for each block length and number of columns, so a
    captured graph replays for every block of the same shape. It also holds the addresses of the pages: capture again
    when ``bank.generation`` has changed.

    Args:
        config: the context policy.
        batch: videos made together; each retrieves for itself.
        layers, heads, head_dim: of the backbone.
        grid: rows and columns of tokens in a latent frame.
        device, dtype: of the pages, and of the keys and values passed to `attend`.
        embedding: maps clean latents [N, C, H, W] to [N, D].
        capacity: latent frames to allocate up front (see `FrameBank`); ignored without memory, when only the window is
            kept.
        selection: which frames come back; default the most similar ones.
        device_frames: keep at most this many latent frames of each video on the device, at least `context_frames`;
            older ones wait in host memory, and what is retrieved is copied back once per block. This costs one
            synchronisation per block. None: all stay on the device.

    Source: LongLive-RAG (arXiv 2606.02553), section 3; docs/architecture.md.
    """

    def __init__(
        self,
        config: RetrievalConfig,
        *,
        batch: int,
        layers: int,
        heads: int,
        head_dim: int,
        grid: tuple[int, int],
        device: torch.device | str,
        dtype: torch.dtype,
        embedding: Embedding,
        capacity: int = 64,
        selection: Selection | None = None,
        device_frames: int | None = None,
    ) -> None:
        if device_frames is not None and device_frames < config.context_frames:
            raise ValueError(
                f"device_frames must be at least context_frames = {config.context_frames}, got {device_frames}"
            )
        self.config, self.batch, self.embedding = config, batch, embedding
        self.device = torch.device(device)
        self.selection = selection or SimilaritySelection()
        rows, columns = grid
        self.sizes: dict[str, Any] = {"batch": batch, "layers": layers, "heads": heads, "head_dim": head_dim}
        self.sizes["grid"] = grid
        self.index = LatentIndex(capacity)
        self.bank = FrameBank(
            layers=layers,
            batch=batch,
            heads=heads,
            tokens=rows * columns,
            head_dim=head_dim,
            capacity=capacity if config.memory_frames else config.context_frames + config.block_frames,
            device=device,
            dtype=dtype,
            device_frames=device_frames if config.memory_frames else None,
        )
        self.retrieved: list[Retrieval] = []
        """One entry for each block that retrieved something."""
        self._rotation = rotary.spatial_rotation(rows, columns, head_dim, device)
        self._wan_frequencies = rotary.temporal_frequencies(head_dim, device)
        self._frequencies = self._wan_frequencies.clone()
        self._plan: ContextPlan | None = None
        self._chosen: tuple[Tensor, Tensor] | None = None
        # By length of the block and number of columns. Captured graphs read these addresses, so none is ever replaced.
        self._all_tables: dict[tuple[int, int], Tables] = {}
        self._tables = self._tables_for(config.block_frames, config.context_frames)
        self._rewritten: tuple[tuple[int, ...], Tensor] | None = None

    @classmethod
    def for_model(
        cls,
        model: TransformerSizes,
        shape: Sequence[int],
        config: RetrievalConfig,
        *,
        embedding: Embedding,
        capacity: int = 64,
        selection: Selection | None = None,
        device_frames: int | None = None,
    ) -> RetrievalMemory:
        """A memory of the model's sizes, device and dtype for latents of `shape` [B, F, C, H, W], any F and C."""
        batch, _, _, height, width = shape
        weight = next(model.parameters())
        return cls(
            config,
            batch=batch,
            layers=model.num_layers,
            heads=model.num_heads,
            head_dim=model.head_dim,
            grid=model.token_grid(height, width),
            device=weight.device,
            dtype=weight.dtype,
            embedding=embedding,
            capacity=capacity,
            selection=selection,
            device_frames=device_frames,
        )

    def save(self, path: str | Path) -> None:
        """Write the memory to one file, atomically: index, pages of every frame that is kept, what was retrieved.

        Only one frame at a time is in memory. Save between blocks: a block that is not committed is left out. An
        `OSError` leaves an earlier file at `path` alone.
        """
        archive.save_memory(self, Path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: TransformerSizes | None = None,
        shape: Sequence[int] | None = None,
        **arguments: Any,
    ) -> RetrievalMemory:
        """A memory as it was when it was saved, on this machine or another; see `archive.load_memory`."""
        return archive.load_memory(cls, Path(path), model, shape, **arguments)

    @property
    def committed(self) -> int:
        """Latent frames committed so far."""
        return self.index.count

    @property
    def plan(self) -> ContextPlan:
        """The context of the current block.

        Raises:
            RuntimeError: no block has begun.
        """
        if self._plan is None:
            raise RuntimeError("no block has begun: call begin_block(start, frames) first")
        return self._plan

    def begin_block(self, start: int, frames: int) -> None:
        """Lay out the context of the block of `frames` frames that starts at `start`.

        A block at frame 0 after later ones begins a new video. With the "latest" query, frames are retrieved here;
        with "draft", the block starts with those of the previous block and `ask` replaces them.

        Raises:
            ValueError: frames between the last committed one and `start` are missing.
        """
        self.plan_block(ContextPlan(self.config, start, frames))

    def plan_block(self, plan: ContextPlan) -> None:
        """`begin_block` with a context of the caller's own."""
        if plan.start == 0 and self.committed:
            self.reset()
        if plan.start > self.committed:
            raise ValueError(
                f"start must be at most {self.committed}, the number of committed frames (commit(latents) each block "
                f"before the next), got {plan.start}"
            )
        self._plan, self._rewritten = plan, None
        if not self.config.memory_frames:
            for frame in self.bank.frames():
                if not plan.keeps(frame):
                    self.bank.release(frame)
        frames, positions = plan.fixed_entries()
        self.bank.reserve(range(plan.start, plan.end), [frame for frame in frames if frame >= 0])
        self._write_tables(plan, frames, positions)
        if not plan.candidates:
            self._chosen = None
        elif self.config.query == "latest":
            self._choose(self.index.embeddings[:, plan.start - 1])
        elif self._chosen is not None:
            self._write_memory(self._chosen[0])

    def ask(self, latents: Tensor) -> None:
        """Query with a draft of the current block, its clean prediction [B, F, C, H, W] after the first denoising step.

        The query is the mean of its frames' unit embeddings.
        """
        if self.plan.candidates:
            self._choose(torch.nn.functional.normalize(self._embed(latents), dim=-1).mean(dim=1))

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Put the block's keys and values into their pages and attend to the context.

        Args:
            layer: which layer's pages.
            q, k, v: [B, F, T, H, D], before any rotary embedding.
            q_weight, k_weight: RMS-norm weights [H * D]; None where q and k are normalised already.
            eps: of the norm.

        Returns:
            [B, F * T, H, D].
        """
        plan = self.plan
        if k.shape[:2] != (self.batch, plan.frames):
            raise ValueError(
                f"k must hold {self.batch} videos and the block's {plan.frames} frames, [B, F, T, H, D], "
                f"got {list(k.shape)}"
            )
        k_pages, v_pages = self.bank.k_pages[layer], self.bank.v_pages[layer]
        tables = self._tables
        turned = ops.insert(k, v, k_weight, self._rotation, k_pages, v_pages, tables.block_slots, eps, q, q_weight)
        assert turned is not None
        return ops.attend(
            turned, k_pages, v_pages, tables.slots, tables.positions, tables.query_positions, self._frequencies
        )

    def rewrite(self, layer: int, frames: Iterable[int], k: Tensor, v: Tensor) -> None:
        """Replace keys, already normalised, and values [B, F, T, H, D] of earlier frames; dropped frames are skipped.

        Raises:
            ValueError: `device_frames` leaves no room for these frames in addition to the block's context.
        """
        wanted = tuple(frames)
        if self._rewritten is None or self._rewritten[0] != wanted:  # once per pass: every layer rewrites the same ones
            self.bank.overwrite(wanted)
            table = torch.tensor(wanted, dtype=torch.int32).to(self.device, non_blocking=True)
            self._rewritten = wanted, self.bank.slots(table.expand(self.batch, -1))
        ops.insert(k, v, None, self._rotation, self.bank.k_pages[layer], self.bank.v_pages[layer], self._rewritten[1])

    def scale_time(self, scale: float) -> None:
        """Multiply all temporal distances by `scale`, initially 1, from the next pass on (`t_scale` of LongLive 2)."""
        torch.mul(self._wan_frequencies, scale, out=self._frequencies)

    @property
    def frequencies(self) -> Tensor:
        """Radians per frame of the temporal rotation, float64 [P], after `scale_time`."""
        return self._frequencies

    def restore_record(self, retrieved: Sequence[tuple[int, Tensor, Tensor]], frequencies: Tensor) -> None:
        """Take over what `save` recorded beside index and pages."""
        self.retrieved = [Retrieval(*entry) for entry in retrieved]
        if retrieved:
            self._chosen = retrieved[-1][1:]
        self._frequencies.copy_(frequencies)

    def commit(self, latents: Tensor) -> Tensor:
        """Finish the current block: embed its clean latents [B, F, C, H, W] and index them.

        Returns:
            The embeddings, [B, F, D].
        """
        plan = self.plan
        if latents.ndim != 5 or latents.shape[:2] != (self.batch, plan.frames):
            raise ValueError(f"latents must be [{self.batch}, {plan.frames}, C, H, W], got {list(latents.shape)}")
        embeddings = self._embed(latents)
        self.index.put(plan.start, embeddings)
        return embeddings

    def reset(self) -> None:
        """Begin a new video in the same buffers."""
        self.index.clear()
        self.bank.clear()
        self.retrieved = []
        self._plan = self._chosen = self._rewritten = None

    def close(self) -> None:
        """Free the pages. The record of what was retrieved stays."""
        self.bank.close()
        self._plan = None

    def __enter__(self) -> RetrievalMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _embed(self, latents: Tensor) -> Tensor:
        return self.embedding.embed(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])

    def _choose(self, query: Tensor) -> None:
        plan = self.plan
        request = Request(plan.start, query, plan.candidates, self.config.memory_frames)
        frames, similarity = self._chosen = self.selection.select(request, self.index)
        self.retrieved.append(Retrieval(plan.start, frames, similarity))
        self._write_memory(frames)

    def _tables_for(self, frames: int, columns: int) -> Tables:
        """The tables of blocks of this length and with as many context entries."""
        if (frames, columns) not in self._all_tables:
            widths = (frames, columns, columns, frames)
            self._all_tables[frames, columns] = Tables(
                *(torch.full((self.batch, n), UNUSED, dtype=torch.int32, device=self.device) for n in widths)
            )
        return self._all_tables[frames, columns]

    def _write_tables(self, plan: ContextPlan, frames: list[int], positions: list[int]) -> None:
        """Fill the tables in place with the plan's fixed entries."""
        tables = self._tables = self._tables_for(plan.frames, len(frames))
        host = torch.tensor([frames, positions], dtype=torch.int32).to(self.device, non_blocking=True)
        tables.slots.copy_(self.bank.slots(host[0].expand(self.batch, -1)))
        tables.positions.copy_(host[1].expand(self.batch, -1))
        tables.query_positions.copy_(torch.tensor(plan.query_positions(), dtype=torch.int32), non_blocking=True)
        block = torch.arange(plan.start, plan.end, dtype=torch.int32, device=self.device)
        tables.block_slots.copy_(self.bank.slots(block.expand(self.batch, -1)))

    def _write_memory(self, frames: Tensor) -> None:
        frames = self.plan.unseen(frames)
        if self.bank.device_frames is not None:
            self.bank.fetch([[frame for frame in row if frame >= 0] for row in frames.tolist()])
            self._rewritten = None
        columns = self.plan.memory_columns
        self._tables.slots[:, columns] = self.bank.slots(frames)
        self._tables.positions[:, columns] = self.plan.memory_positions(frames)
