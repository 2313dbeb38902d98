"""A memory that is saved goes on elsewhere as if nothing had happened, and a file that is not whole is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longlive_rag import Budget, RetrievalConfig, RetrievalMemory, archive
from longlive_rag.embedding import AveragePool
from longlive_rag.models import CausalWanModel

CONFIG = RetrievalConfig(context_frames=4, sink_frames=1, memory_frames=2, recency_guard=0, block_frames=1)
SHAPE = (2, 1, 4, 4, 6)
SIZES = {"ffn_dim": 32, "freq_dim": 16, "text_dim": 8, "text_len": 4, "num_layers": 2, "in_dim": 4, "out_dim": 4}


PAGE = 2 * 2 * 2 * 6 * 16 * 4
"""Bytes of a frame of one video."""
BUDGETS = [Budget(), Budget(device=10 * PAGE), Budget(device=10 * PAGE, host=2 * PAGE, disk=100 * PAGE)]


def tiny_model(dim: int = 32, num_heads: int = 2) -> CausalWanModel:
    torch.manual_seed(0)
    return CausalWanModel(dim=dim, num_heads=num_heads, **SIZES).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> CausalWanModel:
    return tiny_model()


@torch.no_grad()
def go_on(model: CausalWanModel, memory: RetrievalMemory, blocks: int) -> list[Tensor]:
    """Outputs of the next blocks, from latents that depend on their number alone."""
    prompt = model.prepare_prompt(torch.ones(SHAPE[0], 4, 8))
    outputs = []
    for start in range(memory.committed, memory.committed + blocks):
        latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(start))
        memory.begin_block(start, 1)
        if memory.config.query == "draft":
            memory.ask(latents * 0.9)
        outputs.append(model(latents, torch.zeros(SHAPE[:2]), prompt, memory))
        memory.commit(latents)
    return outputs


@pytest.fixture
def saved(model: CausalWanModel, tmp_path: Path) -> Path:
    """A memory of ten blocks."""
    memory = RetrievalMemory.for_model(model, SHAPE, CONFIG, embedding=AveragePool())
    go_on(model, memory, 10)
    memory.save(tmp_path / "memory.safetensors")
    return tmp_path / "memory.safetensors"


@pytest.mark.parametrize("query", ["latest", "draft"])
@pytest.mark.parametrize("before", BUDGETS, ids=str)
@pytest.mark.parametrize("after", BUDGETS, ids=str)
def test_a_loaded_memory_goes_on(
    model: CausalWanModel, query: Any, before: Budget, after: Budget, tmp_path: Path
) -> None:
    config = RetrievalConfig(**{**vars(CONFIG), "query": query})
    memory = RetrievalMemory.for_model(model, SHAPE, config, embedding=AveragePool(2), budget=before)
    memory.scale_time(0.5)
    go_on(model, memory, 10)
    memory.save(tmp_path / "memory.safetensors")
    loaded = RetrievalMemory.load(tmp_path / "memory.safetensors", model, SHAPE, embedding=AveragePool(2), budget=after)
    assert (loaded.config, loaded.committed) == (config, 10)
    assert torch.equal(loaded.index.embeddings, memory.index.embeddings)
    for one, other in zip(go_on(model, memory, 6), go_on(model, loaded, 6), strict=True):
        assert torch.equal(one, other)
    assert [block.frames for block in loaded.retrieved] == [block.frames for block in memory.retrieved]
    assert [block.similarity for block in loaded.retrieved] == [block.similarity for block in memory.retrieved]


def test_what_was_forgotten_stays_forgotten(model: CausalWanModel, tmp_path: Path) -> None:
    budget = Budget(device=10 * PAGE, host=4 * PAGE)
    memory = RetrievalMemory.for_model(model, SHAPE, CONFIG, embedding=AveragePool(2), budget=budget)
    go_on(model, memory, 12)
    assert memory.index.forgotten
    memory.save(tmp_path / "memory.safetensors")
    loaded = RetrievalMemory.load(tmp_path / "memory.safetensors", embedding=AveragePool(2), budget=budget)
    assert loaded.index.forgotten == memory.index.forgotten
    assert loaded.usage().forgotten == memory.usage().forgotten
    assert loaded.bank.entries() == memory.bank.entries()
    for one, other in zip(go_on(model, memory, 8), go_on(model, loaded, 8), strict=True):
        assert torch.equal(one, other)
    assert loaded.index.forgotten == memory.index.forgotten
    # A budget that is too small for all that was saved forgets some of it.
    smaller = Budget(device=8 * PAGE, host=0)
    less = RetrievalMemory.load(tmp_path / "memory.safetensors", embedding=AveragePool(2), budget=smaller)
    assert len(less.bank.entries()) == 8
    go_on(model, less, 4)


def test_packed_pages_are_saved_as_the_numbers_they_stand_for(model: CausalWanModel, tmp_path: Path) -> None:
    budget = Budget(device=8 * PAGE, bits=8)
    memory = RetrievalMemory.for_model(model, SHAPE, CONFIG, embedding=AveragePool(), budget=budget)
    go_on(model, memory, 10)
    before = {entry: memory.bank.read(entry) for entry in memory.bank.entries()}
    memory.save(tmp_path / "memory.safetensors")
    loaded = RetrievalMemory.load(tmp_path / "memory.safetensors", model, SHAPE)
    assert all(torch.equal(loaded.bank.read(entry), pages) for entry, pages in before.items())


def test_a_memory_that_rebuilds_frames_is_not_saved(model: CausalWanModel, tmp_path: Path) -> None:
    memory = RetrievalMemory.for_model(
        model, SHAPE, CONFIG, embedding=AveragePool(), budget=Budget(rebuild=True), clean_pass=lambda *_: None
    )
    with pytest.raises(ValueError, match=r"only without budget\.rebuild"):
        memory.save(tmp_path / "memory.safetensors")


def test_a_memory_can_be_loaded_without_its_model(saved: Path) -> None:
    loaded = RetrievalMemory.load(saved)
    assert (loaded.batch, loaded.committed, len(loaded.retrieved)) == (2, 10, 5)


def test_an_empty_memory_is_a_memory(model: CausalWanModel, tmp_path: Path) -> None:
    memory = RetrievalMemory.for_model(model, SHAPE, CONFIG, embedding=AveragePool())
    memory.save(tmp_path / "memory.safetensors")
    loaded = RetrievalMemory.load(tmp_path / "memory.safetensors", model)
    assert torch.equal(go_on(model, loaded, 8)[-1], go_on(model, memory, 8)[-1])


def test_an_archive_is_a_safetensors_file(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        assert "pages.1.9" in file.keys()  # noqa: SIM118, the handle is not a mapping
        assert file.get_tensor("pages.1.9").shape == (2, 2, 2, 6, 16)


def test_one_frame_at_a_time_is_in_memory(
    model: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = RetrievalMemory.for_model(model, SHAPE, CONFIG, embedding=AveragePool())
    go_on(model, memory, 10)
    events: list[str] = []
    read, content = memory.bank.read, archive._content
    monkeypatch.setattr(memory.bank, "read", lambda entry: events.append("read") or read(entry))  # type: ignore[func-returns-value]
    monkeypatch.setattr(archive, "_content", lambda tensor: events.append("write") or content(tensor))  # type: ignore[func-returns-value]
    memory.save(tmp_path / "memory.safetensors")
    pages = events[events.index("read") :]
    assert pages == ["read", "write"] * (2 * 10)


def test_wherever_it_is_cut_it_is_refused(saved: Path, model: CausalWanModel) -> None:
    data = saved.read_bytes()
    generator = random.Random(0)
    for size in [0, 5, 8, 100, len(data) - 1, *generator.sample(range(len(data)), 40)]:
        saved.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"memory\.safetensors (is truncated|is not an archive|has been altered)"):
            RetrievalMemory.load(saved, model)
    saved.write_bytes(data + b" ")
    with pytest.raises(ValueError, match="has been altered: it should have"):
        RetrievalMemory.load(saved, model)


def test_whatever_is_altered_it_is_refused(saved: Path, model: CausalWanModel) -> None:
    data = saved.read_bytes()
    generator = random.Random(0)
    header = int.from_bytes(data[:8], "little")
    places = [*generator.sample(range(8 + header), 60), *generator.sample(range(8 + header, len(data)), 60)]
    for place in places:
        altered = bytearray(data)
        altered[place] ^= 1 << generator.randrange(8)
        saved.write_bytes(altered)
        with pytest.raises(ValueError, match=r"memory\.safetensors "):
            RetrievalMemory.load(saved, model)


def test_what_is_something_else_is_refused(saved: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"pages": torch.zeros(3)}, foreign)
    with pytest.raises(ValueError, match="is not an archive of longlive_rag"):
        RetrievalMemory.load(foreign)
    foreign.write_bytes(b"this is a text about foxes")
    with pytest.raises(ValueError, match="is not an archive of longlive_rag"):
        RetrievalMemory.load(foreign)
    archive.write(foreign, "journal block", {}, {}, ())
    with pytest.raises(ValueError, match="must be a retrieval memory, but is a journal block"):
        RetrievalMemory.load(foreign)
    foreign.write_bytes(saved.read_bytes().replace(b'"version": "1"', b'"version": "2"'))
    with pytest.raises(ValueError, match="is of version 2, but this version reads 1"):
        RetrievalMemory.load(foreign)
    with pytest.raises(FileNotFoundError):
        RetrievalMemory.load(tmp_path / "none")


def test_another_model_is_refused_with_the_reason(saved: Path, model: CausalWanModel) -> None:
    with pytest.raises(ValueError, match=r"another model: heads 2, now 4; head_dim 16, now 8$"):
        RetrievalMemory.load(saved, tiny_model(num_heads=4))
    with pytest.raises(ValueError, match=r"dtype torch.float32, now torch.bfloat16"):
        RetrievalMemory.load(saved, tiny_model().bfloat16())
    with pytest.raises(ValueError, match=r"batch 2, now 1; grid \(2, 3\), now \(4, 3\)"):
        RetrievalMemory.load(saved, model, (1, 1, 4, 8, 6))
    with pytest.raises(ValueError, match="must be searched by the embedding it was made with"):
        RetrievalMemory.load(saved, model, embedding=AveragePool(2))


def test_a_save_that_fails_leaves_what_was_there(
    saved: Path, model: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    memory = RetrievalMemory.load(saved, model)

    def vanish(entry: tuple[int, int]) -> Tensor:
        if entry == (1, 3):
            raise OSError(28, "No space left on device")
        return torch.zeros(memory.bank.pages[1])

    monkeypatch.setattr(memory.bank, "read", vanish)
    with pytest.raises(OSError, match="No space left"):
        memory.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
