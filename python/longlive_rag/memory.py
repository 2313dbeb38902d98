"""The retrieval memory of one batch of videos: the engine that every backbone calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from longlive_rag import archive, ops, rotary
from longlive_rag.attention import PagedAttention
from longlive_rag.bank import FrameBank, Usage
from longlive_rag.budget import Budget, format_bytes
from longlive_rag.config import RetrievalConfig
from longlive_rag.context import ContextPlan
from longlive_rag.embedding import Embedding
from longlive_rag.index import LatentIndex
from longlive_rag.models.sizes import TransformerSizes
from longlive_rag.selection import Request, Retrieval, Selection, SimilaritySelection
from longlive_rag.tables import Tables, uploadable
from longlive_rag.tiers.forgetting import Forgetting
from longlive_rag.tiers.latents import CleanPass, LatentTier
from longlive_rag.tiers.pages import frame_bytes

_NO_BLOCK = "no block has begun: call begin_block(start, frames) first"


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
        selection: which frames come back; default the most similar ones.
        budget: of device, host and disk, in bytes; default all that is free on the device, then half of host memory.
            Without memory only the window is kept, and all of it on the device. Once frames are below the device, a
            block costs one short wait for the device, since the host has to know what was chosen.
        clean_pass: of the model, with which keys and values are rebuilt if ``budget.rebuild``.

    Raises:
        ValueError: the budget is too small for a block, or asks to rebuild without a `clean_pass`.

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
        selection: Selection | None = None,
        budget: Budget | None = None,
        clean_pass: CleanPass | None = None,
    ) -> None:
        budget = budget or Budget()
        self.config, self.batch, self.grid, self.embedding = config, batch, grid, embedding
        self.device = torch.device(device)
        self._cuda = self.device.type == "cuda"
        self.selection = selection or SimilaritySelection()
        tokens = grid[0] * grid[1]
        page = frame_bytes(layers=layers, heads=heads, tokens=tokens, head_dim=head_dim, dtype=dtype)
        needed = batch * config.context_frames * page
        if budget.device is not None and budget.device < needed:
            raise ValueError(
                f"budget.device must be at least {format_bytes(needed)} ({needed} bytes), what a block of {batch} "
                f"videos writes and sees with context_frames = {config.context_frames}, got "
                f"{format_bytes(budget.device)}"
            )
        self.index = LatentIndex()
        forgets = budget.forget and not budget.rebuild
        self._forgetting = Forgetting(self.index, batch, config.sink_frames) if forgets else None
        self.bank = FrameBank(
            layers=layers,
            batch=batch,
            heads=heads,
            tokens=tokens,
            head_dim=head_dim,
            frames=config.context_frames + config.block_frames,
            device=device,
            dtype=dtype,
            budget=budget if config.memory_frames else Budget(),
            written=config.block_frames,
            retrieved=config.memory_frames,
            forgetting=self._forgetting,
        )
        self.retrieved: list[Retrieval] = []
        """One entry for each block that retrieved something."""
        self._rotation = rotary.spatial_rotation(*grid, head_dim, device)
        self._wan_frequencies = rotary.temporal_frequencies(head_dim, device)
        self._frequencies = self._wan_frequencies.clone()
        if budget.rebuild:
            if clean_pass is None:
                raise ValueError(
                    "budget.rebuild needs the clean pass of the model, which `stream`, `rollout` and the command "
                    "generate supply for CausalWanModel; got none"
                )
            pools = self.bank.k_pages, self.bank.v_pages
            self.bank.latents = LatentTier(clean_pass, *pools, self._rotation, self._frequencies)
        self._plan: ContextPlan | None = None
        self._chosen: Retrieval | None = None
        # The block's choice as the host knows it.
        self._read: tuple[Retrieval, Tensor] | None = None
        # Whether an attention was captured or compiled: then later passes may begin without a call of `attend`.
        self._unseen_passes = False
        self._attention = PagedAttention(self._rotation, self._frequencies, head_dim)
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
        selection: Selection | None = None,
        budget: Budget | None = None,
        clean_pass: CleanPass | None = None,
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
            selection=selection,
            budget=budget,
            clean_pass=clean_pass,
        )

    save = archive.save_memory
    load = classmethod(archive.load_memory)

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
            raise RuntimeError(_NO_BLOCK)
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
        self._attention.expect_new_tables()
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
            self._write_memory(self._chosen)
        self._get_ready()

    def ask(self, latents: Tensor) -> None:
        """Query with a draft of the current block, its clean prediction [B, F, C, H, W] after the first denoising step.

        The query is the mean of its frames' unit embeddings.

        Raises:
            RuntimeError: within the capture of a CUDA graph, whose replay would search the frames of this block again.
        """
        if self._is_captured():
            raise RuntimeError("ask(latents) cannot be part of a CUDA graph: capture what comes before and after it")
        if self.plan.candidates:
            self._choose(torch.nn.functional.normalize(self._embed(latents), dim=-1).mean(dim=1))
            self._get_ready()

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
        return self._attend(layer, q, k, v, (q_weight, k_weight, eps), lse=False)[0]

    def attend_part(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`attend`, as one part of an attention that is put together from several: also returns the natural log of
        each row's sum of exponentials, float32 [B, F * T, H], -inf where the context is empty."""
        out, lse = self._attend(layer, q, k, v, (None, None, 1e-6), lse=True)
        assert lse is not None
        return out, lse

    def _attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, norm: tuple[Tensor | None, Tensor | None, float], lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self._plan is None:
            raise RuntimeError(_NO_BLOCK)
        transfer = self.bank.transfer
        if torch.compiler.is_compiling():
            self._unseen_passes = True
        else:
            if layer == 0 and self._is_captured():
                self._unseen_passes = True
                if transfer.busy:
                    raise RuntimeError(
                        "frames are on their way to the device: run a pass of the block before its capture"
                    )
            if transfer.busy:
                transfer.before(layer)
            if transfer.timeline is not None:
                transfer.attends(layer)
        k_pages, v_pages = self.bank.k_pages[layer], self.bank.v_pages[layer]
        return self._attention(layer, q, k, v, *norm, k_pages, v_pages, self._tables, lse)

    def rewrite(self, layer: int, frames: Iterable[int], k: Tensor, v: Tensor) -> None:
        """Replace keys, already normalised, and values [B, F, T, H, D] of earlier frames; dropped frames are skipped.

        Raises:
            ValueError: the device has no room for these frames in addition to the block's context.
        """
        wanted = tuple(frames)
        if self._rewritten is None or self._rewritten[0] != wanted:  # once per pass: every layer rewrites the same ones
            self.bank.overwrite(wanted)
            table = uploadable(list(wanted), self.device).to(self.device, non_blocking=True)
            self._rewritten = wanted, self.bank.slots(table.expand(self.batch, -1))
        ops.insert(k, v, None, self._rotation, self.bank.k_pages[layer], self.bank.v_pages[layer], self._rewritten[1])

    def scale_time(self, scale: float) -> None:
        """Multiply all temporal distances by `scale`, initially 1, from the next pass on (`t_scale` of LongLive 2)."""
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
        if self._forgetting is not None and not self.bank.resident:
            self._forgetting.note(plan.start, embeddings)
        if self.bank.latents is not None:
            self.bank.latents.put(plan, latents)
        return embeddings

    def usage(self) -> Usage:
        """Frames and bytes per tier."""
        return self.bank.usage()

    def reset(self) -> None:
        """Begin a new video in the same buffers."""
        self.index.clear()
        self.bank.clear()
        self.retrieved = []
        self._plan = self._chosen = self._rewritten = None
        self._attention.expect_new_tables()

    def close(self) -> None:
        """Free the pages. The record of what was retrieved stays."""
        self.bank.close()
        self._plan = None

    def __enter__(self) -> RetrievalMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _is_captured(self) -> bool:
        return self._cuda and torch.cuda.is_current_stream_capturing()

    def _embed(self, latents: Tensor) -> Tensor:
        return self.embedding.embed(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])

    def _get_ready(self) -> None:
        if self.config.memory_frames:
            self.bank.make_ready()
        if self._unseen_passes:
            self.bank.transfer.finish()

    def _choose(self, query: Tensor) -> None:
        plan = self.plan
        request = Request(plan.start, query, plan.candidates, self.config.memory_frames, self._tables.candidates)
        frames, similarity = self.selection.select(request, self.index)
        self._chosen = Retrieval(plan.start, frames, similarity)
        self.retrieved.append(self._chosen)
        self._write_memory(self._chosen)

    def _tables_for(self, frames: int, columns: int) -> Tables:
        """The tables of blocks of this length and with as many context entries."""
        if (frames, columns) not in self._all_tables:
            self._all_tables[frames, columns] = Tables(self.batch, frames, columns, self.device)
        return self._all_tables[frames, columns]

    def _write_tables(self, plan: ContextPlan, frames: list[int], positions: list[int]) -> None:
        """Fill the tables in place with the plan's fixed entries."""
        tables = self._tables = self._tables_for(plan.frames, len(frames))
        memory = plan.memory_columns
        if plan.memory_at_zero:
            positions = [*positions[: memory.start], *[0] * self.config.memory_frames, *positions[memory.stop :]]
        videos, block = range(self.batch), range(plan.start, plan.end)
        tables.fill(
            [[self.bank.slot(video, frame) for frame in block] for video in videos],
            [[self.bank.slot(video, frame) for frame in frames] for video in videos],
            *([row] * self.batch for row in (positions, plan.query_positions())),
            *([[bound]] * self.batch for bound in (plan.candidates.start, plan.candidates.stop)),
        )
        if self.config.memory_frames:
            self.bank.write_slots(block, tables.block_slots)

    def _write_memory(self, chosen: Retrieval) -> None:
        columns, plan = self.plan.memory_columns, self.plan
        frames = chosen.frame_table
        if not self.bank.resident:
            if self._read is None or self._read[0] is not chosen:
                self._read = chosen, frames.cpu()
            frames = plan.unseen(self._read[1])
            rows = frames.tolist()
            self.bank.fetch([[frame for frame in row if frame >= 0] for row in rows])
            self._rewritten = None
            slots = [[self.bank.slot(video, frame) for frame in row] for video, row in enumerate(rows)]
            positions = plan.memory_positions(frames).tolist()
            table = uploadable([slots, positions], self.device).to(self.device, non_blocking=True)
            self._tables.slots[:, columns], self._tables.positions[:, columns] = table
            return
        frames = plan.unseen(frames)
        self._tables.slots[:, columns] = self.bank.slots(frames)
        if not plan.memory_at_zero:
            self._tables.positions[:, columns] = plan.memory_positions(frames)
