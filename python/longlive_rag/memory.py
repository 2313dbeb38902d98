"""The retrieval memory of one batch of videos: the engine that every backbone calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from longlive_rag import ops, rotary
from longlive_rag.bank import FrameBank
from longlive_rag.config import RetrievalConfig
from longlive_rag.context import UNUSED, ContextPlan
from longlive_rag.embedding import Embedding
from longlive_rag.index import LatentIndex
from longlive_rag.selection import Request, Selection, SimilaritySelection


@dataclass(frozen=True)
class Retrieval:
    """What one block got from memory."""

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


class RetrievalMemory:
    """Keys and values of all frames so far, and the attention of the current block to those it should see.

    Use: ``begin_block``, then any number of passes in which every layer calls ``attend`` once, then ``commit`` with the
    clean latents. The passes of a block write the same pages over and over; what the last one wrote stands from the
    moment the block is committed. A block may be begun again (a prompt switch that re-computes the newest frames).

    Args:
        config: the context policy.
        batch: videos made together; each retrieves for itself.
        layers, heads, head_dim: of the backbone.
        grid: rows and columns of tokens in a latent frame.
        device, dtype: of the pages, and of the keys that come.
        embedding: from clean latents [N, C, H, W] to [N, D].
        capacity: latent frames to make room for at once (see `FrameBank`); ignored without memory, when only the window
            is held.
        selection: which frames come back; default the most similar ones.
        device_frames: at most this many latent frames of each video on the device, `context_frames` or more; older ones
            wait in host memory, and what is retrieved is copied back once per block. This costs one synchronisation per
            block. None: all stay on the device.

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
        """One entry for each block that had memory."""
        self._rotation = rotary.spatial_rotation(rows, columns, head_dim, device)
        self._wan_frequencies = rotary.temporal_frequencies(head_dim, device)
        self._frequencies = self._wan_frequencies.clone()
        self._plan: ContextPlan | None = None
        self._chosen: tuple[Tensor, Tensor] | None = None
        self._tables = self._block_tables(ContextPlan(config, 0, config.block_frames))

    @property
    def finished(self) -> int:
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

        A block at frame 0 after later ones begins a new video. With the "latest" query the memory is retrieved here;
        with "draft", the block starts with the previous block's and `ask` replaces it.

        Raises:
            ValueError: frames between the last committed one and `start` are missing.
        """
        self.plan_block(ContextPlan(self.config, start, frames))

    def plan_block(self, plan: ContextPlan) -> None:
        """`begin_block` with a context of the caller's own."""
        if plan.start == 0 and self.finished:
            self.reset()
        if plan.start > self.finished:
            raise ValueError(
                f"start must be at most {self.finished}, the number of committed frames (commit(latents) each block "
                f"before the next), got {plan.start}"
            )
        self._plan = plan
        if not self.config.memory_frames:
            for frame in self.bank.frames():
                if not plan.keeps(frame):
                    self.bank.release(frame)
        self.bank.reserve(range(plan.start, plan.end), [frame for frame in plan.fixed_entries()[0] if frame >= 0])
        self._write_tables(plan)
        if not plan.candidates:
            self._chosen = None
        elif self.config.query == "latest":
            self._choose(self.index.embeddings[:, plan.start - 1])
        elif self._chosen is not None:
            self._write_memory(self._chosen[0])

    def ask(self, latents: Tensor) -> None:
        """Ask with a draft of the current block, its clean prediction [B, F, C, H, W] after the first denoising step.

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
        block_slots, slots, positions, query_position = self._tables
        turned = ops.insert(k, v, k_weight, self._rotation, k_pages, v_pages, block_slots, eps, q, q_weight)
        assert turned is not None
        return ops.attend(turned, k_pages, v_pages, slots, positions, query_position, self._frequencies)

    def rewrite(self, layer: int, frames: Iterable[int], k: Tensor, v: Tensor) -> None:
        """Put keys, normalised, and values [B, F, T, H, D] into the pages of earlier frames, where they have any."""
        table = torch.tensor(list(frames), dtype=torch.int32, device=self.device).expand(self.batch, -1)
        k_pages, v_pages = self.bank.k_pages[layer], self.bank.v_pages[layer]
        ops.insert(k, v, None, self._rotation, k_pages, v_pages, self.bank.slots(table))

    def scale_time(self, scale: float) -> None:
        """Multiply all temporal distances by `scale` from the next pass on (`t_scale` of LongLive 2); at first 1."""
        torch.mul(self._wan_frequencies, scale, out=self._frequencies)

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
        self._plan = self._chosen = None

    def close(self) -> None:
        """Give the pages back to the device. The record of what was retrieved stays."""
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

    def _block_tables(self, plan: ContextPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        columns = len(plan.fixed_entries()[0])
        shapes = ((self.batch, plan.frames), (self.batch, columns), (self.batch, columns), (self.batch, plan.frames))
        block_slots, slots, positions, query_position = (
            torch.full(shape, UNUSED, dtype=torch.int32, device=self.device) for shape in shapes
        )
        return block_slots, slots, positions, query_position

    def _write_tables(self, plan: ContextPlan) -> None:
        """Fill the tables in place, so that captured graphs see the new block.

        Only other lengths need new ones.
        """
        columns = len(plan.fixed_entries()[0])
        if (self._tables[0].shape[1], self._tables[1].shape[1]) != (plan.frames, columns):
            self._tables = self._block_tables(plan)
        block_slots, slots, positions, query_position = self._tables
        frames, places = plan.fixed_entries()
        host = torch.tensor([frames, places], dtype=torch.int32).to(self.device, non_blocking=True)
        slots.copy_(self.bank.slots(host[0].expand(self.batch, -1)))
        positions.copy_(host[1].expand(self.batch, -1))
        query_position.copy_(torch.tensor(plan.query_positions(), dtype=torch.int32), non_blocking=True)
        block = torch.arange(plan.start, plan.end, dtype=torch.int32, device=self.device)
        block_slots.copy_(self.bank.slots(block.expand(self.batch, -1)))

    def _write_memory(self, frames: Tensor) -> None:
        frames = self.plan.unseen(frames)
        if self.bank.device_frames is not None:
            self.bank.fetch([[frame for frame in row if frame >= 0] for row in frames.tolist()])
        _, slots, positions, _ = self._tables
        columns = self.plan.memory_columns
        slots[:, columns] = self.bank.slots(frames)
        positions[:, columns] = self.plan.memory_positions(frames)
