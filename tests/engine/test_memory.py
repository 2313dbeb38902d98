"""The engine: what a block sees, what stays as it was written, and what happens when it is used wrongly."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from longlive_rag import Budget, RetrievalConfig, RetrievalMemory, rotary
from longlive_rag.embedding import AveragePool
from longlive_rag.models import CausalWanModel
from longlive_rag.selection import OracleSelection, RandomSelection, RecentSelection, UniformSelection
from support.small_memory import small_memory

LAYERS, HEADS, HEAD_DIM, GRID = 2, 2, 16, (2, 3)
TOKENS = GRID[0] * GRID[1]
PAGE = 2 * LAYERS * HEADS * TOKENS * HEAD_DIM * 4
"""Bytes of a frame of one video in float32."""
SMALL = RetrievalConfig(context_frames=5, sink_frames=1, memory_frames=2, recency_guard=1, block_frames=1)


def memory(config: RetrievalConfig = SMALL, batch: int = 2, **options: object) -> RetrievalMemory:
    sizes = {"layers": LAYERS, "heads": HEADS, "head_dim": HEAD_DIM, "grid": GRID}
    return small_memory(config, batch=batch, **sizes, **options)


def draw(seed: int, batch: int, frames: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Queries, keys and values of one block for each layer, and its latents."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, frames, TOKENS, HEADS, HEAD_DIM)
    layers = [tuple(torch.randn(shape, generator=generator) for _ in range(3)) for _ in range(LAYERS)]
    return layers, torch.randn(batch, frames, 4, 4, 6, generator=generator)  # type: ignore[return-value]


def run_block(engine: RetrievalMemory, start: int, seed: int, frames: int = 1, passes: int = 2) -> list[Tensor]:
    engine.begin_block(start, frames)
    for number in range(passes):
        layers, latents = draw(seed * 10 + number, engine.batch, frames)
        outputs = [engine.attend(layer, *qkv) for layer, qkv in enumerate(layers)]
    engine.commit(latents)
    return outputs


def rotate_whole(x: Tensor, position: int) -> Tensor:
    """Wan's rotary embedding of one frame [T, H, D] at a temporal position, as complex numbers."""
    frequencies = rotary.temporal_frequencies(HEAD_DIM)
    time = torch.polar(torch.ones_like(frequencies), position * frequencies).expand(TOKENS, -1)
    space = torch.view_as_complex(rotary.spatial_rotation(*GRID, HEAD_DIM).double())
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.cat([time, space], dim=-1)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def test_attention_is_the_papers() -> None:
    """Against the plain way: whole keys rotated at the paper's positions, concatenated, softmax."""
    engine = memory()
    history = []
    for start in range(12):
        outputs = run_block(engine, start, seed=start)
        layers, _ = draw(start * 10 + 1, 2, 1)
        history.append(layers)
    chosen = engine.retrieved[-1]
    assert chosen.block_start == 11
    q, _, _ = history[11][1]
    for video in range(2):
        context = [(0, 0)] + [(frame, 0) for frame in chosen.frames[video]] + [(10, 3), (11, 4)]
        keys = torch.cat([rotate_whole(history[frame][1][1][video, 0], at) for frame, at in context])
        values = torch.cat([history[frame][1][2][video, 0].double() for frame, _ in context])
        query = rotate_whole(q[video, 0], 4)
        scores = torch.einsum("qhd,khd->hqk", query, keys) / math.sqrt(HEAD_DIM)
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values)
        torch.testing.assert_close(outputs[1][video].double(), expected, rtol=1e-5, atol=1e-5)


def test_finished_pages_are_never_touched_again() -> None:
    engine = memory()
    for start in range(6):
        run_block(engine, start, seed=start)
    slots = engine.bank.slots(torch.arange(6, dtype=torch.int32).expand(2, -1)).long()
    before = [pool[slots].clone() for pool in engine.bank.k_pages + engine.bank.v_pages]
    for start in range(6, 40):
        run_block(engine, start, seed=start)
    after = [pool[slots] for pool in engine.bank.k_pages + engine.bank.v_pages]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_new_video_in_the_same_buffers() -> None:
    engine = memory()
    first = [run_block(engine, start, seed=start) for start in range(10)]
    pools = [pool.data_ptr() for pool in engine.bank.k_pages]
    frames = [entry.frames for entry in engine.retrieved]
    again = [run_block(engine, start, seed=start) for start in range(10)]
    assert engine.committed == 10
    assert [entry.frames for entry in engine.retrieved] == frames
    assert [pool.data_ptr() for pool in engine.bank.k_pages] == pools
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_block_begun_again_replaces_the_first_try() -> None:
    spoiled, clean = memory(), memory()
    for start in range(8):
        run_block(spoiled, start, seed=start)
        run_block(clean, start, seed=start)
    run_block(spoiled, 8, seed=999)
    for engine in (spoiled, clean):
        run_block(engine, 8, seed=8)
    assert spoiled.committed == clean.committed == 9
    a, b = run_block(spoiled, 9, seed=9), run_block(clean, 9, seed=9)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_without_memory_only_the_window_is_held() -> None:
    config = RetrievalConfig(context_frames=5, sink_frames=1, memory_frames=0, block_frames=1, positions="absolute")
    engine = memory(config)
    for start in range(1200):
        run_block(engine, start, seed=start % 7, passes=1)
        assert len(engine.bank.frames()) <= config.context_frames
    assert engine.bank.capacity == config.context_frames + config.block_frames
    assert engine.retrieved == []


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_far_beyond_1024_frames(positions: Literal["relative", "absolute"]) -> None:
    """Shifting every index by the same number of frames changes nothing that depends on differences."""
    config = RetrievalConfig(
        context_frames=4, sink_frames=0, memory_frames=1, recency_guard=0, block_frames=1, positions=positions
    )
    engine = memory(config, batch=1, selection=RecentSelection())
    recent: list[Tensor] = []
    for start in range(1500):
        recent = run_block(engine, start, seed=start % 10, passes=1)
        if start == 499:
            early = recent
    for one, other in zip(early, recent, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query", ["latest", "draft"])
def test_a_device_budget_changes_nothing_but_where_pages_lie(query: Literal["latest", "draft"]) -> None:
    config = RetrievalConfig(
        context_frames=5, sink_frames=1, memory_frames=2, recency_guard=0, block_frames=1, query=query
    )
    unlimited, limited = memory(config), memory(config, budget=Budget(device=5 * 2 * PAGE))
    for start in range(40):
        for engine in (unlimited, limited):
            engine.begin_block(start, 1)
            if query == "draft":
                engine.ask(draw(start % 7, 2, 1)[1])
        layers, latents = draw(start, 2, 1)
        for layer, qkv in enumerate(layers):
            assert torch.equal(unlimited.attend(layer, *qkv), limited.attend(layer, *qkv))
        unlimited.commit(latents)
        limited.commit(latents)
    assert [entry.frames for entry in limited.retrieved] == [entry.frames for entry in unlimited.retrieved]
    assert limited.bank.capacity == 5
    with pytest.raises(
        ValueError, match=r"budget.device must be at least 30.72 KB .* context_frames = 5, got 24.58 KB"
    ):
        memory(config, budget=Budget(device=4 * 2 * PAGE))


def test_rewritten_frames_come_back_as_rewritten() -> None:
    """Whether or not they have been in host memory: the copy there must not outlive the page it was made of."""
    chosen = [[0], [0]]
    config = RetrievalConfig(context_frames=3, sink_frames=0, memory_frames=1, recency_guard=0, block_frames=1)
    engines = [
        memory(config, budget=Budget(device=limit), selection=OracleSelection(lambda start, batch: chosen))
        for limit in (None, 4 * 2 * PAGE)
    ]
    outputs: list[list[Tensor]] = [[], []]
    for start in range(16):
        # Frame 0 leaves the device, comes back, is rewritten and leaves again; frame 1 is away when it is rewritten.
        chosen[:] = [[0]] * 2 if start < 7 or 10 <= start < 12 else [[1 if start >= 14 else 2]] * 2
        for engine, seen in zip(engines, outputs, strict=True):
            engine.begin_block(start, 1)
            layers, latents = draw(start, 2, 1)
            seen += [engine.attend(layer, *qkv) for layer, qkv in enumerate(layers)]
            if start in (6, 9):
                for layer, (_, k, v) in enumerate(draw(100 + start, 2, 1)[0]):
                    engine.rewrite(layer, [0 if start == 6 else 1], k, v)
            engine.commit(latents)
    assert engines[1].bank.capacity == 4
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    with pytest.raises(
        ValueError, match="budget.device must leave room for all that a block of 2 videos uses, 10 pages .* got 8 pages"
    ):
        engines[1].rewrite(0, [2, 3], k[:, [0, 0]], v[:, [0, 0]])


def test_rewriting_looks_its_pages_up_once_per_pass() -> None:
    engine = memory()
    for start in range(3):
        run_block(engine, start, seed=start)
    looked_up = []
    slots = engine.bank.slots
    engine.bank.slots = lambda frames: looked_up.append(frames) or slots(frames)  # type: ignore[method-assign, func-returns-value]
    for layer, (_, k, v) in enumerate(draw(5, 2, 2)[0]):
        engine.rewrite(layer, range(1, 3), k, v)
        pages = engine.bank.v_pages[layer][slots(torch.tensor([[1, 2]] * 2, dtype=torch.int32)).long()]
        assert torch.equal(pages, v.transpose(2, 3))
    assert len(looked_up) == 1


def test_a_block_of_the_same_shape_finds_the_same_tables() -> None:
    """A captured CUDA graph reads their addresses, also after a block of another length."""
    engine = memory(RetrievalConfig(context_frames=5, sink_frames=1, memory_frames=1, recency_guard=1, block_frames=2))
    run_block(engine, 0, seed=0, frames=2)
    before = [table.data_ptr() for table in engine._tables]
    run_block(engine, 2, seed=1, frames=1)
    assert not set(before) & {table.data_ptr() for table in engine._tables}
    run_block(engine, 3, seed=2, frames=2)
    assert [table.data_ptr() for table in engine._tables] == before


def test_a_memory_for_a_model_has_its_sizes() -> None:
    model = CausalWanModel(
        dim=32, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=3, in_dim=4, out_dim=4
    ).bfloat16()
    engine = RetrievalMemory.for_model(model, (2, 21, 4, 8, 12), SMALL, embedding=AveragePool())
    assert len(engine.bank.k_pages) == 3
    assert engine.bank.k_pages[0].shape == (2 * (5 + 1), 2, 4 * 6, 16)
    assert engine.bank.k_pages[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="height and width divisible by the patch"):
        RetrievalMemory.for_model(model, (2, 21, 4, 8, 11), SMALL, embedding=AveragePool())


def test_each_video_retrieves_for_itself() -> None:
    together = memory(batch=2)
    alone = [memory(batch=1), memory(batch=1)]
    generator = torch.Generator().manual_seed(3)
    for start in range(14):
        shape = (2, 1, TOKENS, HEADS, HEAD_DIM)
        q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
        latents = torch.randn(2, 1, 4, 4, 6, generator=generator)
        for engine, videos in [(together, slice(0, 2)), (alone[0], slice(0, 1)), (alone[1], slice(1, 2))]:
            engine.begin_block(start, 1)
            for layer in range(LAYERS):
                engine.attend(layer, q[videos], k[videos], v[videos])
            engine.commit(latents[videos])
    for entry, first, second in zip(together.retrieved, alone[0].retrieved, alone[1].retrieved, strict=True):
        assert entry.frames == first.frames + second.frames
    assert any(entry.frames[0] != entry.frames[1] for entry in together.retrieved)


def test_the_draft_query_asks_with_the_block_itself() -> None:
    config = RetrievalConfig(
        context_frames=5, sink_frames=1, memory_frames=2, recency_guard=0, block_frames=1, query="draft"
    )
    engine = memory(config, batch=1)
    scenes = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    for start in range(12):
        engine.begin_block(start, 1)
        draft = scenes[start % 3][None, None]
        before = len(engine.retrieved)
        engine.ask(draft + 0.01)
        if len(engine.retrieved) > before:
            same = [frame for frame in engine.plan.candidates if frame % 3 == start % 3][:2]
            assert set(same) <= set(engine.retrieved[-1].frames[0])
        for layer, qkv in enumerate(draw(start, 1, 1)[0]):
            engine.attend(layer, *qkv)
        engine.commit(draft)
    assert engine.retrieved[-1].block_start == 11


def test_controls_choose_what_they_say() -> None:
    controls = {
        "recent": RecentSelection(),
        "uniform": UniformSelection(),
        "random": RandomSelection(seed=1),
        "oracle": OracleSelection(lambda start, batch: [[start - 9, 99, start - 8, start - 7]] * batch),
    }
    for name, selection in controls.items():
        engine = memory(selection=selection)
        for start in range(16):
            run_block(engine, start, seed=start)
        entry, candidates = engine.retrieved[-1], range(1, 10)
        assert entry.block_start == 15
        if name == "recent":
            assert entry.frames == [[9, 8]] * 2
        elif name == "uniform":
            assert entry.frames == [[1, 9]] * 2
        elif name == "oracle":
            assert entry.frames == [[6, 7]] * 2
        else:
            assert all(set(row) <= set(candidates) and len(row) == 2 for row in entry.frames)
        assert all(math.isfinite(value) for row in entry.similarity for value in row)


def test_a_draft_cannot_ask_within_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replay would search as many frames as there were, and record nothing."""
    engine = memory()
    engine.begin_block(0, 1)
    engine.ask(draw(0, 2, 1)[1])
    monkeypatch.setattr(engine, "_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be part of a CUDA graph"):
        engine.ask(draw(0, 2, 1)[1])


def test_wrong_use_is_explained() -> None:
    engine = memory()
    with pytest.raises(RuntimeError, match="begin_block"):
        engine.attend(0, *draw(0, 2, 1)[0][0])
    with pytest.raises(ValueError, match="start must be at most 0, the number of committed frames"):
        engine.begin_block(1, 1)
    engine.begin_block(0, 1)
    with pytest.raises(ValueError, match="2 videos and the block's 1 frames"):
        engine.attend(0, *draw(0, 2, 2)[0][0])
    with pytest.raises(ValueError, match=r"latents must be \[2, 1, C, H, W\], got \[2, 2, 4, 4, 6\]"):
        engine.commit(draw(0, 2, 2)[1])
    with pytest.raises(TypeError, match="k_pages must be bfloat16, got float32"):
        engine.attend(0, *(tensor.bfloat16() for tensor in draw(0, 2, 1)[0][0]))
