"""The operations inside CUDA graphs: captured once, replayed with new tables and data, no host in between."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from longlive_rag import Budget, RetrievalConfig, RetrievalMemory, ops, rotary
from longlive_rag.embedding import AveragePool
from longlive_rag.models import CausalWanModel

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")


def capture(call: object) -> torch.cuda.CUDAGraph:
    """Warm up on a side stream, as PyTorch asks, and capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # type: ignore[operator]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()  # type: ignore[operator]
    return graph


@contextlib.contextmanager
def without_synchronisation() -> Iterator[None]:
    """What waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture_without_warm_up(operation: str) -> None:
    """In a new process: the kernel is loaded within the capture."""
    torch.manual_seed(0)
    pages = torch.randn(2, 4, 2, 30, 64, device=CUDA).half()
    frames = torch.randn(3, 1, 1, 30, 2, 64, device=CUDA).half()
    table, positions = (torch.arange(4, dtype=torch.int32, device=CUDA)[None] for _ in range(2))
    rotation = torch.randn(30, 6, 2, device=CUDA)
    keys = torch.randn(1, 200, 64, device=CUDA)
    inverse_norms = torch.ones(1, 200, device=CUDA)
    frequencies = rotary.temporal_frequencies(64, CUDA)

    def call() -> Tensor:
        if operation == "insert":
            q, k, v = frames
            ops.insert(k, v, None, rotation, pages[0], pages[1], table[:, :1], q=q)
            return pages.clone()
        if operation == "retrieve":
            return ops.retrieve(keys[:, 5], keys, inverse_norms, 0, 200, 6)[0]
        return ops.attend(frames[0, :, 0], pages[0], pages[1], table, positions, positions[:, :1], frequencies)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    graph.replay()
    assert torch.equal(out, call())


@pytest.mark.parametrize("operation", ["insert", "retrieve", "attend"])
def test_the_first_call_of_a_process_may_be_captured(operation: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=capture_without_warm_up, args=(operation,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_retrieval_reaches_attention_on_the_device() -> None:
    """Search, page table and attention in one graph; new keys and a new range give what eager calls give."""
    heads, tokens, head_dim, frames = 2, 30, 128, 20
    torch.manual_seed(0)
    keys = torch.randn(1, frames, 64, device=CUDA)
    inverse_norms = torch.empty(1, frames, device=CUDA)
    query = torch.randn(1, 64, device=CUDA)
    first, last = (torch.zeros(1, dtype=torch.int32, device=CUDA) for _ in range(2))
    frame_slots = torch.randperm(frames).int().to(CUDA)[None]
    table = torch.full((1, 4), -1, dtype=torch.int32, device=CUDA)
    pages = torch.randn(2, frames, heads, tokens, head_dim, device=CUDA).bfloat16()
    q = torch.randn(1, tokens, heads, head_dim, device=CUDA).bfloat16()
    positions = torch.zeros(1, 4, dtype=torch.int32, device=CUDA)
    query_position = torch.full((1, 1), 9, dtype=torch.int32, device=CUDA)
    rotation = rotary.temporal_frequencies(head_dim, CUDA)
    out = torch.empty_like(q)

    def step() -> None:
        inverse_norms.copy_(1 / keys.norm(dim=-1))
        found, _ = ops.retrieve(query, keys, inverse_norms, first, last, 4)
        table.copy_(frame_slots.gather(1, found.clamp(min=0).long()).masked_fill(found < 0, -1))
        out.copy_(ops.attend(q, pages[0], pages[1], table, positions, query_position, rotation))

    graph = capture(step)
    for low, high in ((0, 20), (3, 5), (7, 7)):
        keys.normal_()
        first.fill_(low)
        last.fill_(high)
        graph.replay()
        replayed, slots = out.clone(), table.clone()
        step()
        assert torch.equal(slots, table) and torch.equal(replayed, out)
        assert (table >= 0).sum() == min(4, high - low)


@torch.no_grad()
def test_a_block_is_captured_once_and_replayed_for_the_next() -> None:
    """All passes of a block through a transformer with memory, without a synchronisation."""
    torch.manual_seed(0)
    config = RetrievalConfig(context_frames=6, sink_frames=1, memory_frames=2, recency_guard=1, block_frames=2)
    with torch.device(CUDA):
        model = CausalWanModel(
            dim=256, ffn_dim=256, freq_dim=64, text_dim=32, text_len=8, num_heads=2, num_layers=2, in_dim=16, out_dim=16
        ).bfloat16()
    prompt = model.prepare_prompt(torch.randn(1, 8, 32, device=CUDA).bfloat16())
    frames = torch.randn(24, 16, 8, 12, device=CUDA)

    def video(replay: bool) -> Tensor:
        memory = RetrievalMemory(
            config, batch=1, layers=2, heads=2, head_dim=128, grid=(4, 6), device=CUDA, dtype=torch.bfloat16,
            embedding=AveragePool(), budget=Budget(device=40 * 2 * 2 * 2 * 24 * 128 * 2),
        )  # fmt: skip
        latents = torch.empty(1, 2, 16, 8, 12, device=CUDA)
        flow = torch.empty_like(latents)
        noisy, clean = (torch.full((1, 2), timestep, device=CUDA) for timestep in (500.0, 0.0))

        def passes() -> None:
            flow.copy_(model(latents, noisy, prompt, memory))
            flow.copy_(model(latents - 0.5 * flow, clean, prompt, memory))

        graph, flows = None, []
        for start in range(0, 24, 2):
            latents.copy_(frames[None, start : start + 2])
            memory.begin_block(start, 2)
            if not replay:
                passes()
            elif graph is None:
                graph = capture(passes)
                graph.replay()
            else:
                with without_synchronisation():
                    graph.replay()
            memory.commit(latents)
            flows.append(flow.clone())
        assert memory.retrieved
        return torch.cat(flows)

    assert torch.equal(video(replay=True), video(replay=False))


def two_videos() -> RetrievalMemory:
    return RetrievalMemory(
        RetrievalConfig(), batch=2, layers=1, heads=2, head_dim=64, grid=(2, 3), device=CUDA, dtype=torch.bfloat16,
        embedding=AveragePool(), budget=Budget(device=60 * 2 * 2 * 2 * 6 * 64 * 2),
    )  # fmt: skip


@torch.no_grad()
def test_a_block_begins_without_waiting_for_the_device() -> None:
    """Laying out a block, searching the memory and committing never synchronise with the host."""
    memory = two_videos()
    q = torch.randn(2, 3, 6, 2, 64, device=CUDA).bfloat16()
    latents = torch.randn(2, 3, 16, 4, 6, device=CUDA)
    for start in range(0, 36, 3):
        with without_synchronisation() if start >= 24 else contextlib.nullcontext():
            memory.begin_block(start, 3)
            memory.attend(0, q, q, q)
            memory.commit(latents)
    assert memory.retrieved[-1].frames


@torch.no_grad()
def test_a_block_begins_while_the_device_is_busy() -> None:
    """torch does not report a copy from pageable memory, for which the driver may wait."""
    memory = two_videos()
    latents = torch.randn(2, 3, 16, 4, 6, device=CUDA)
    for start in range(0, 36, 3):
        memory.begin_block(start, 3)
        memory.commit(latents)
    torch.cuda._sleep(2 * 10**9)  # cycles: a second
    busy = torch.cuda.Event()
    busy.record()
    memory.begin_block(36, 3)
    assert not busy.query()
    torch.cuda.synchronize()


@torch.no_grad()
def test_retrieve_in_cuda_graphs_made_by_the_compiler() -> None:
    """Nothing of one call outlives it: the compiler's memory pool refuses tensors that it does not know."""
    keys = torch.randn(1, 200, 64, device=CUDA)
    inverse_norms = 1 / keys.norm(dim=-1)
    first, last = (torch.tensor(bound, dtype=torch.int32, device=CUDA) for bound in (0, 200))

    def search(query: Tensor) -> tuple[Tensor, Tensor]:
        return ops.retrieve(query, keys, inverse_norms, first, last, 6)

    compiled = torch.compile(search, mode="reduce-overhead", fullgraph=True)
    for index in range(5):
        query = keys[:, index].clone()
        torch.compiler.cudagraph_mark_step_begin()
        indices = compiled(query)[0].clone()
        assert torch.equal(indices, search(query)[0]) and indices[0, 0] == index


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device_from_a_new_thread() -> None:
    """The device of the tensors counts, not the one that the thread thinks current."""
    results = []

    def search() -> None:
        device = torch.device("cuda", 1)
        keys = torch.randn(1, 200, 64, device=device)
        results.append(ops.retrieve(keys[:, 5], keys, 1 / keys.norm(dim=-1), 0, 200, 1)[0].item())

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    assert results == [5]
