"""Wherever pages lie, they come back as they were, in time, and within the budget."""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from longlive_rag import Budget, RetrievalConfig, RetrievalMemory
from longlive_rag.selection import OracleSelection, ReplaySelection
from longlive_rag.tiers.below import STAGED
from longlive_rag.tiers.disk import DiskTier
from longlive_rag.tiers.forgetting import Redundancy
from longlive_rag.tiers.host import HostTier, slab_bytes
from longlive_rag.tiers.pages import Pages, frame_bytes
from longlive_rag.tiers.transfer import AHEAD, Copy, Timeline, Transfer
from support.small_memory import small_memory

LAYERS, HEADS, HEAD_DIM, GRID = 4, 2, 8, (2, 2)
TOKENS = GRID[0] * GRID[1]
PAGE = 2 * LAYERS * HEADS * TOKENS * HEAD_DIM * 4
CONFIG = RetrievalConfig(context_frames=6, sink_frames=1, memory_frames=2, recency_guard=0, block_frames=2)

# The context and a block are 8 frames: what a memory needs at least to spill without waiting.
HOST = Budget(device=8 * PAGE, host=10**9)
DISK = Budget(device=8 * PAGE, host=3 * PAGE, disk=10**9)
DISK_ALONE = Budget(device=8 * PAGE, host=0, disk=10**9)


def memory(budget: Budget, batch: int = 1, **options: object) -> RetrievalMemory:
    sizes = {"layers": LAYERS, "heads": HEADS, "head_dim": HEAD_DIM, "grid": GRID}
    return small_memory(CONFIG, budget=budget, batch=batch, **sizes, **options)


def scene(number: int, batch: int = 1) -> Tensor:
    """Latents [B, 1, C, H, W] of one of the places that a video returns to."""
    return torch.randn(batch, 1, 6, 4, 4, generator=torch.Generator().manual_seed(number))


def block_of(start: int, batch: int) -> tuple[Tensor, Tensor]:
    """Queries, keys and values [layers, 3, B, F, T, H, D] of a block, and its latents."""
    generator = torch.Generator().manual_seed(1000 + start)
    qkv = torch.randn(LAYERS, 3, batch, 2, TOKENS, HEADS, HEAD_DIM, generator=generator)
    frames = [scene((start + f) // 6 % 7, batch) for f in range(2)]
    noise = 0.05 * torch.randn(batch, 2, 6, 4, 4, generator=generator)
    return qkv, torch.cat(frames, dim=1) + noise


def run(engine: RetrievalMemory, blocks: int, first: int = 0) -> Iterator[Tensor]:
    """Outputs [layers, B, L, H, D] of each block."""
    for start in range(2 * first, 2 * blocks, 2):
        engine.begin_block(start, 2)
        qkv, latents = block_of(start, engine.batch)
        yield torch.stack([engine.attend(layer, *qkv[layer]) for layer in range(LAYERS)])
        engine.commit(latents)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["host", "disk", "disk alone"])
def test_every_tier_gives_what_the_device_alone_gives(name: str, batch: int) -> None:
    sizes = {"host": (8, 10**9, 0), "disk": (8, 3, 10**9), "disk alone": (8, 0, 10**9)}
    device, host, disk = (min(size * batch * PAGE, 10**9) for size in sizes[name])
    plain, tiered = memory(Budget(), batch), memory(Budget(device=device, host=host, disk=disk), batch)
    for expected, actual in zip(run(plain, 60), run(tiered, 60), strict=True):
        assert torch.equal(expected, actual)
    assert [entry.frames for entry in tiered.retrieved] == [entry.frames for entry in plain.retrieved]
    usage = tiered.usage()
    assert sum(tier.frames for tier in usage[:4]) == 120 * batch and usage.forgotten == 0
    assert usage.device.bytes == 8 * batch * PAGE
    if name != "host":
        assert usage.disk.frames > 100 * batch - usage.host.frames
        assert usage.host.bytes <= (max(3 * batch, 2) + STAGED) * PAGE
    tiered.close()
    assert tiered.usage().host.bytes == tiered.usage().disk.bytes == 0


def long_budgets() -> dict[str, Budget]:
    return {
        "host": Budget(device=10 * PAGE, host=10**9),
        "disk": Budget(device=10 * PAGE, host=6 * PAGE, disk=10**9),
        "forgetting": Budget(device=10 * PAGE, host=20 * PAGE),
    }


@pytest.mark.parametrize("name", long_budgets())
def test_a_long_video_in_a_small_budget(name: str) -> None:
    """10 minutes are 1200 blocks of 2: LONGLIVE_RAG_LONG=1."""
    blocks = 1200 if os.environ.get("LONGLIVE_RAG_LONG") else 150
    plain, tiered = memory(Budget()), memory(long_budgets()[name])
    seen = []
    for expected, actual in zip(run(plain, blocks), run(tiered, blocks), strict=True):
        if name != "forgetting":
            assert torch.equal(expected, actual)
        seen.append(tiered.usage())
    assert {usage.device.bytes for usage in seen[5:]} == {10 * PAGE}
    limits = {"host": 2 * blocks, "disk": 6 + STAGED, "forgetting": 20}
    assert max(usage.host.bytes for usage in seen) <= -(-limits[name] * PAGE // 2**26) * 2**26
    if name == "disk":
        assert {usage.host.bytes for usage in seen[40:]} == {(6 + STAGED) * PAGE}
    if name == "forgetting":
        assert {usage.host.bytes for usage in seen[40:]} == {20 * PAGE}
        held = sum(tier.frames for tier in seen[-1][:4])
        assert held + seen[-1].forgotten == 2 * blocks and held >= 10 + 20 - 2 * 4
        return
    assert [entry.frames for entry in tiered.retrieved] == [entry.frames for entry in plain.retrieved]


def test_copies_are_issued_layer_by_layer_ahead_of_the_computation() -> None:
    engine = memory(HOST)
    for _ in run(engine, 20):
        pass
    engine.bank.transfer.timeline = timeline = Timeline()
    came = 0
    for start in range(40, 60, 2):
        timeline.clear()
        for _ in run(engine, start // 2 + 1, first=start // 2):
            pass
        copies = Counter((event.action, event.frame, event.layer) for event in timeline if event.action != "attend")
        assert all(count <= 2 for count in copies.values())
        incoming = {event.frame for event in timeline if event.action == "in"}
        came += len(incoming)
        steps = [str(event) for event in timeline]
        for frame in incoming:
            for layer in range(LAYERS):
                arrives = max(i for i, step in enumerate(steps) if step == f"copy frame {frame} layer {layer} in")
                assert arrives < steps.index(f"attend layer {layer}")
                if layer > AHEAD + 1:  # not all at once, so that the device has work meanwhile
                    assert arrives > steps.index("attend layer 0")
        outgoing = {event.frame for event in timeline if event.action == "out"}
        assert not outgoing & set(range(start, start + 2)), "pages that are still being written"
    assert came > 10


def test_what_leaves_has_been_copied_before_its_slot_is_needed() -> None:
    engine = memory(HOST)
    for _ in run(engine, 20):
        pass
    engine.bank.transfer.timeline = timeline = Timeline()
    with mock.patch.object(engine.bank, "make_ready"):
        engine.begin_block(40, 2)
    assert [str(event) for event in timeline if event.action == "out"] == []


def test_nothing_moves_and_nothing_is_read_while_all_fits() -> None:
    engine = memory(Budget())
    engine.bank.transfer.timeline = timeline = Timeline()
    with (
        mock.patch.object(Tensor, "cpu", side_effect=AssertionError),
        mock.patch.object(Tensor, "tolist", side_effect=AssertionError),
    ):
        for _ in run(engine, 30):
            pass
    assert engine.retrieved and {event.action for event in timeline} == {"attend"}


def test_the_host_reads_what_was_retrieved_once_a_block() -> None:
    engine = memory(HOST)
    for _ in run(engine, 20):
        pass
    read: list[Tensor] = []

    def cpu(tensor: Tensor) -> Tensor:
        read.append(tensor)
        return tensor.clone()

    with mock.patch.object(Tensor, "cpu", cpu):
        engine.begin_block(40, 2)
    assert [tuple(tensor.shape) for tensor in read] == [(1, 2)]


def test_what_the_last_block_used_stays_where_it_is() -> None:
    chosen = [[2, 3]]
    engine = memory(HOST, selection=OracleSelection(lambda start, batch: chosen))
    for _ in run(engine, 20):
        pass
    engine.bank.transfer.timeline = timeline = Timeline()
    for _ in run(engine, 30, first=20):
        pass
    assert [event for event in timeline if event.action == "in" and event.frame in (2, 3)] == []


def test_a_frame_is_forgotten_for_an_older_one_that_is_like_it() -> None:
    redundancy = Redundancy(1)
    angles = torch.tensor([0.0, 1.0, 0.02, 2.0, 1.1, 0.03])
    redundancy.put(0, torch.stack([angles.cos(), angles.sin()], dim=-1)[None].numpy())
    kept = {(0, frame) for frame in range(6)}
    order = []
    while len(kept) > 1:
        victim = redundancy.victim(kept - {(0, 0)})
        assert victim is not None
        order.append(victim[1])
        redundancy.forget(victim)
        kept.discard(victim)
    assert order == [5, 2, 4, 1, 3], "the newer one of two that are alike, and what stands alone last"


def test_of_every_place_the_oldest_copy_is_kept() -> None:
    engine = memory(Budget(device=10 * PAGE, host=24 * PAGE))
    for _ in run(engine, 150):
        pass
    held = engine.bank.frames()
    assert len(held) < 40 and 0 in held
    first_seen = [6 * place for place in range(1, 7)]
    assert all(any(frame in held for frame in range(first, first + 6)) for first in first_seen)
    for entry in engine.retrieved[20:]:
        assert not {(0, frame) for frame in entry.frames[0]} - {(0, frame) for frame in range(entry.block_start)}
    frames, _ = engine.index.search(engine.index.embeddings[:, 299], 1, 290, 60)
    assert set(frames[0].tolist()) - {-1} <= set(held)
    assert engine.index.count == 300


def test_forgetting_may_be_forbidden() -> None:
    engine = memory(Budget(device=8 * PAGE, host=4 * PAGE, forget=False))
    wanted = (
        r"\(12 are held\), and forgetting is forbidden: raise budget.host \(--host-memory\) or budget.disk "
        r"\(--disk-memory\), lower budget.bits"
    )
    with pytest.raises(MemoryError, match=wanted):
        for _ in run(engine, 30):
            pass


def test_a_budget_too_small_for_a_block_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=rf"budget.device must be at least 12.29 KB \({6 * PAGE} bytes\)"):
        memory(Budget(device=6 * PAGE - 1))


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.03), (4, 0.4)])
@pytest.mark.parametrize("disk", [0, 10**7])
def test_packed_pages_are_smaller_and_nearly_the_same(bits: Any, tolerance: float, disk: int) -> None:
    """Values are normal numbers: a code of 8 bits is off by at most 1/64 or so of them, one of 4 bits by 1/4."""
    host = 3 * PAGE if disk else 10**9
    plain, packed = memory(Budget()), memory(Budget(device=8 * PAGE, host=host, disk=disk, bits=bits))
    packed.bank.transfer.timeline = timeline = Timeline()
    for expected, actual in zip(run(plain, 40), run(packed, 40), strict=True):
        assert (expected - actual).abs().max() < tolerance
    assert [entry.frames for entry in packed.retrieved] == [entry.frames for entry in plain.retrieved]
    sizes = {"layers": LAYERS, "heads": HEADS, "tokens": TOKENS, "head_dim": HEAD_DIM, "dtype": torch.float32}
    assert frame_bytes(**sizes, bits=bits) == packed.bank._pages.record_bytes < PAGE  # type: ignore[arg-type]
    copies = Counter((event.action, event.frame, event.layer, str(event).count("layer")) for event in timeline)
    assert {named for action, _, _, named in copies if action == "out"} == {0}, "all layers in one copy"


def test_pinned_memory_may_be_refused() -> None:
    real = torch.empty

    def empty(*arguments: object, pin_memory: bool = False, **options: object) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return real(*arguments, **options)  # type: ignore[call-overload]

    tier = HostTier(PAGE, 2**30, least=0, pinned=True)
    with mock.patch("torch.empty", empty), pytest.warns(UserWarning, match="pinned memory .CUDA error: out of memory"):
        assert tier.take() is not None
    with mock.patch("torch.empty", empty), warnings.catch_warnings():
        warnings.simplefilter("error")
        tier._fresh = 0
        assert tier.take() is not None, "said once"


def test_what_host_memory_refuses_goes_to_disk() -> None:
    plain, tiered = memory(Budget()), memory(Budget(device=8 * PAGE, host=10**9, disk=10**9))
    allocate = HostTier._allocate

    def refusing(tier: HostTier, size: int) -> Tensor:
        if tier is tiered.bank._below.host and tier.bytes:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return allocate(tier, min(size, 6 * PAGE))

    with (
        mock.patch.object(HostTier, "_allocate", refusing),
        mock.patch("longlive_rag.tiers.host.slab_bytes", lambda record, room, pinned: min(room, 6 * PAGE)),
    ):
        for expected, actual in zip(run(plain, 20), run(tiered, 20), strict=True):
            assert torch.equal(expected, actual)
    assert tiered.usage().host.bytes == (6 + STAGED) * PAGE
    assert tiered.usage().disk.frames > 20


@pytest.mark.parametrize("fault", ["claim", "write"])
def test_a_full_disk_is_a_step_down(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on frames are forgotten; none comes back wrong."""
    monkeypatch.setattr("longlive_rag.tiers.disk._SLAB", PAGE)
    engine = memory(DISK)
    outputs = list(run(engine, 20))
    assert engine.usage().disk.frames > 10
    broken = OSError(28, "No space left on device")
    where = "os.posix_fallocate" if fault == "claim" else "os.pwrite"
    with mock.patch(where, side_effect=broken), pytest.warns(UserWarning, match="takes no more frames"):
        outputs += list(run(engine, 40, first=20))
    assert engine.usage().forgotten > 20
    kept = {entry.block_start: (entry.frames, entry.similarity) for entry in engine.retrieved}
    again = memory(Budget(), selection=ReplaySelection(kept))
    assert all(torch.equal(one, other) for one, other in zip(outputs, run(again, 40), strict=True))


@pytest.mark.parametrize("fault", ["altered", "cut"])
def test_a_damaged_file_is_never_a_wrong_frame(fault: str, tmp_path: Path) -> None:
    engine = memory(Budget(device=8 * PAGE, host=0, disk=100 * PAGE, folder=tmp_path))
    for _ in run(engine, 30):
        pass
    tier = engine.bank._below.disk
    assert tier is not None and tier._file is not None
    assert list(tmp_path.iterdir()) == [], "nothing to be removed by others, or left behind by a process that is killed"
    if fault == "altered":
        for place in range(tier._allocated):
            (byte,) = os.pread(tier._file.fileno(), 1, place * PAGE)
            os.pwrite(tier._file.fileno(), bytes([byte ^ 1]), place * PAGE)
    else:
        os.ftruncate(tier._file.fileno(), 10)
    message = "does not hold what was written: the checksum of frame"
    if fault == "cut":
        # Unless the thread has written behind the cut by then: the hole reads as zeros.
        message = f"ends early|{message}"
    with pytest.raises(OSError, match=message):
        for _ in run(engine, 60, first=30):
            pass
    engine.close()


def test_a_place_on_disk_is_used_again() -> None:
    tier = DiskTier(64, 10 * 64, None)
    records = [torch.full((64,), number, dtype=torch.uint8) for number in range(30)]
    for number, record in enumerate(records):
        assert not tier.full
        tier.store((0, number), record, None)
        tier.settle()
        if number >= 8:
            tier.drop((0, number - 8))
    back = torch.empty(64, dtype=torch.uint8)
    for _, number in list(tier.places):
        tier.load((0, number), back).result()
        assert torch.equal(back, records[number])
    assert tier.bytes == 10 * 64
    tier.close()


def test_the_next_frame_is_read_while_one_is_copied() -> None:
    """Neither of two reads goes on before the other one has begun."""
    together, read = threading.Barrier(STAGED, timeout=60), os.preadv

    def preadv(*arguments: Any) -> int:
        together.wait()
        return read(*arguments)

    tier = DiskTier(64, 10 * 64, None, readers=STAGED)
    records = [torch.full((64,), number, dtype=torch.uint8) for number in range(STAGED)]
    back = [torch.empty(64, dtype=torch.uint8) for _ in records]
    for number, record in enumerate(records):
        assert not tier.full
        tier.store((0, number), record, None)
    with mock.patch("os.preadv", preadv):
        for loading in [tier.load((0, number), record) for number, record in enumerate(back)]:
            loading.result()
    assert all(torch.equal(*pair) for pair in zip(back, records, strict=True))
    tier.close()


def test_slabs_waste_little() -> None:
    for page in (287_539_200, 1_278_000_000, 575_000_000, 5_000_000):
        size = slab_bytes(page, 2**60, pinned=True)
        assert size & (size - 1) == 0 and size % page <= size / 8 and size <= 16 * page + 2**27
        assert slab_bytes(page, page, pinned=True) == 0
        assert slab_bytes(page, 3 * page, pinned=False) in (page, 2 * page, 3 * page)


def test_a_replayed_choice_is_the_same_computation() -> None:
    first = memory(HOST)
    outputs = list(run(first, 30))
    recorded = {
        entry.block_start: (entry.frames, entry.similarity) for entry in first.retrieved if entry.block_start < 50
    }
    again = memory(HOST, selection=ReplaySelection(recorded))
    assert all(torch.equal(one, other) for one, other in zip(outputs, run(again, 30), strict=True))
    assert [(e.frames, e.similarity) for e in again.retrieved] == [(e.frames, e.similarity) for e in first.retrieved]
    wrong = memory(HOST, selection=ReplaySelection({20: ([[19]], [[0.5]])}))
    with pytest.raises(
        ValueError, match="the record of block 20 must hold at most 2 of the frames 1 to 14 that are kept"
    ):
        list(run(wrong, 12))


class Log(list[str]):
    """Stands for streams and events, and says what waits for what."""

    def stream(self, name: str) -> Any:
        stream = mock.MagicMock()
        stream.__str__.return_value = name  # type: ignore[attr-defined]
        stream.wait_stream.side_effect = lambda other: self.append(f"{name} waits for {other}")
        stream.wait_event.side_effect = lambda event: self.append(f"{name} waits for layer {event}")
        return stream

    def event(self, name: str) -> Any:
        event = mock.MagicMock()
        event.__str__.return_value = name  # type: ignore[attr-defined]
        event.record.side_effect = lambda: self.append(f"layer {name} is in")
        return event


def test_streams_wait_for_each_other() -> None:
    """What no CPU does: the calls in their order, over doubles of CUDA's streams."""
    log = Log()
    compute, inward, outward = (log.stream(name) for name in ("computation", "in", "out"))
    pools = [[torch.zeros(2, 1, 2, 4) for _ in range(LAYERS)] for _ in range(2)]
    pages = Pages(pools[0], pools[1], 16)
    pages.device = torch.device("cuda", 0)
    records = [torch.zeros(pages.record_bytes, dtype=torch.uint8) for _ in range(2)]
    with (
        mock.patch("torch.cuda.Stream", side_effect=[inward, outward]),
        mock.patch("torch.cuda.Event", side_effect=[log.event(str(layer)) for layer in range(LAYERS)]),
        mock.patch("torch.cuda.current_stream", return_value=compute),
        mock.patch("torch.cuda.stream", return_value=mock.MagicMock()),
    ):
        transfer = Transfer(pages)
        transfer.send([Copy(0, 5, 0, records[0])])
        assert log == ["out waits for computation", "out waits for in"]
        log.clear()
        transfer.hold_for_sent()
        assert log == ["computation waits for out"]
        log.clear()
        transfer.bring([Copy(0, 3, 1, records[1])])
        assert log == ["in waits for computation", "in waits for out", *(f"layer {n} is in" for n in range(AHEAD))]
        for layer in range(LAYERS):
            log.clear()
            assert transfer.busy
            transfer.before(layer)
            assert log[-1] == f"computation waits for layer {layer}"
            assert log[:-1] == [f"layer {layer + AHEAD} is in"] * (layer + AHEAD < LAYERS)
        assert not transfer.busy and not transfer.coming
