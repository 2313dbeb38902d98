"""The work partition of attend (csrc/core/schedule.h): every step once, evenly, merged in one order."""

from __future__ import annotations

import ctypes
import heapq
import os
import shlex
import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

CSRC = Path(__file__).resolve().parents[2] / "csrc"
H200 = 132
"""Multiprocessors."""
QUERY_TILE = 128
DRIVER = r"""
#include "core/schedule.h"
using namespace longlive;
extern "C" {
Schedule make(int tiles, int steps, int blocks) { return make_schedule(tiles, steps, blocks); }
Schedule make_of_parts(int tiles, int steps, int blocks) { return make_schedule_of_parts(tiles, steps, blocks); }
int units(Schedule schedule) { return unit_count(schedule); }
int partials(Schedule schedule) { return partial_count(schedule); }
Piece piece(Schedule schedule, int unit, int index) { return piece_at(schedule, unit, index); }
int step(int numerator, int of, int steps) { return step_at(numerator, of, steps); }
int key_tile(int tokens) { return choose_key_tile(tokens); }
}
"""


class Schedule(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("tiles", "cut", "sharers")]


class Piece(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("tile", "begin", "end", "of", "part", "parts", "partial")]


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to compile csrc/core/schedule.h with")
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "driver.cpp").write_text(DRIVER)
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{CSRC}"]
    sanitizer = ["-fsanitize=undefined", "-fno-sanitize-recover"]
    files = [f"{folder}/driver.cpp", "-o", f"{folder}/driver.so"]
    command = [*shlex.split(compiler), *flags, *sanitizer, *files]
    result = subprocess.run(command, capture_output=True, text=True)
    if "libubsan" in result.stderr:
        command = [*shlex.split(compiler), *flags, *files]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    library = ctypes.CDLL(f"{folder}/driver.so")
    library.make.restype, library.make.argtypes = Schedule, [ctypes.c_int, ctypes.c_int, ctypes.c_int]
    library.make_of_parts.restype, library.make_of_parts.argtypes = library.make.restype, library.make.argtypes
    library.partials.argtypes = library.units.argtypes = [Schedule]
    library.piece.restype, library.piece.argtypes = Piece, [Schedule, ctypes.c_int, ctypes.c_int]
    return library


@dataclass
class Plan:
    """What each block computes of a batch; `steps[sample]` is what each of the sample's tiles meets."""

    header: ctypes.CDLL
    tiles: int
    steps: list[int]
    multiprocessors: int = H200

    def schedule(self, sample: int) -> Schedule:
        return self.header.make(self.tiles, self.steps[sample], self.multiprocessors)

    @cached_property
    def blocks(self) -> list[list[tuple[int, Piece]]]:
        """Pairs of sample and piece, as the kernel's planning thread deals them."""
        blocks = []
        for block in range(self.multiprocessors):
            pieces, unit = [], block
            for sample in range(len(self.steps)):
                schedule = self.schedule(sample)
                units = self.header.units(schedule)
                for mine in range(unit, units, self.multiprocessors):
                    index = 0
                    while (piece := self.header.piece(schedule, mine, index)).tile >= 0:
                        pieces.append((sample, piece))
                        index += 1
                    unit = mine + self.multiprocessors
                unit -= units
            blocks.append(pieces)
        return blocks

    def steps_of(self, sample: int, piece: Piece) -> range:
        steps = self.steps[sample]
        return range(self.header.step(piece.begin, piece.of, steps), self.header.step(piece.end, piece.of, steps))

    def balance(self) -> float:
        """The largest load of a block over the mean one."""
        loads = [sum(len(self.steps_of(*piece)) for piece in pieces) for pieces in self.blocks]
        return max(loads) / (sum(loads) / self.multiprocessors)


@given(
    tiles=st.integers(1, 700),
    steps=st.lists(st.integers(0, 2200), min_size=1, max_size=4),
    multiprocessors=st.sampled_from([1, 2, 4, 78, 114, H200, 144]),
)
def test_every_step_belongs_to_one_piece(header, tiles, steps, multiprocessors):
    plan = Plan(header, tiles, steps, multiprocessors)
    covered, parts, partials = defaultdict(list), defaultdict(list), []
    for pieces in plan.blocks:
        for sample, piece in pieces:
            covered[sample, piece.tile].append(plan.steps_of(sample, piece))
            parts[sample, piece.tile].append(piece)
    assert sorted(covered) == [(sample, tile) for sample in range(len(steps)) for tile in range(tiles)]
    largest = header.make(tiles, max(steps), multiprocessors)
    for (sample, tile), ranges in covered.items():
        assert sorted(step for r in ranges for step in r) == list(range(steps[sample]))
        ordered = sorted(parts[sample, tile], key=lambda piece: piece.part)
        assert [piece.part for piece in ordered] == list(range(ordered[0].parts)), "each part once"
        assert [piece.begin for piece in ordered] == sorted(piece.begin for piece in ordered), "parts follow the keys"
        if ordered[0].parts > 1:
            first = ordered[0].partial - ordered[0].part
            assert [piece.partial for piece in ordered] == list(range(first, first + len(ordered)))
            assert tile < largest.cut and first + len(ordered) <= header.partials(largest), "room for the most steps"
            partials += [(sample, piece.partial) for piece in ordered]
    assert len(set(partials)) == len(partials), "no two pieces write one partial result"


@given(tiles=st.integers(1, 700), steps=st.integers(1, 500), others=st.lists(st.integers(0, 500), max_size=3))
def test_a_sample_is_cut_as_if_alone(header, tiles, steps, others):
    def cuts(plan: Plan, sample: int) -> set[tuple[int, ...]]:
        pieces = [piece for pieces in plan.blocks for owner, piece in pieces if owner == sample]
        return {(piece.tile, piece.begin, piece.end, piece.of, piece.part, piece.parts) for piece in pieces}

    alone = Plan(header, tiles, [steps])
    together = Plan(header, tiles, [*others, steps])
    assert cuts(alone, 0) == cuts(together, len(others))


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("heads", [12, 40])
@pytest.mark.parametrize("tokens", [880, 1024, 1560, 3600])
def test_balance_of_the_wan_shapes(header, tokens, heads, frames, batch):
    """Within 3% of perfect on the 132 multiprocessors of an H200, with 12 pages."""
    tiles = -(-frames * tokens // QUERY_TILE) * heads
    plan = Plan(header, tiles, [12 * -(-tokens // header.key_tile(tokens))] * batch)
    assert plan.balance() <= 1.03


def test_the_remainder_is_not_left_to_a_last_wave(header):
    """480 x 832, 12 heads: 444 query tiles are 3.36 waves; whole tiles alone would take 4."""
    plan = Plan(header, 444, [108])
    assert (plan.schedule(0).cut, plan.schedule(0).sharers) == (48, H200)
    assert plan.balance() < 1.005
    pieces = [[piece for _, piece in pieces] for pieces in plan.blocks]
    assert all(block[0].parts > 1 and block[-1].parts == 1 for block in pieces), "pieces come before the waves"
    assert max(piece.parts for block in pieces for piece in block) <= 4


def test_a_nearly_full_last_wave_is_not_cut(header):
    assert header.make(2 * H200 - 2, 168, H200).cut == 0
    assert header.make(2 * H200, 168, H200).cut == 0


@pytest.mark.parametrize("tiles, steps", [(1, 1), (7, 2), (40, 5), (100, 168), (444, 1)])
def test_pieces_are_not_too_short_to_fill_a_pipeline(header, tiles, steps):
    plan = Plan(header, tiles, [steps])
    for pieces in plan.blocks:
        stretch = [len(plan.steps_of(sample, piece)) for sample, piece in pieces if piece.parts > 1]
        assert not stretch or sum(stretch) >= 3


@given(
    tiles=st.integers(1, 30),
    steps=st.integers(1, 24),
    multiprocessors=st.integers(1, 13),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_execution(header, tiles, steps, multiprocessors, seed):
    """Running softmax over each piece, partial results merged as the kernel merges them, against one softmax."""
    plan = Plan(header, tiles, [steps], multiprocessors)
    random = np.random.default_rng(seed)
    keys = 4  # of a step
    scores = random.normal(scale=8, size=(tiles, steps * keys))
    values = random.normal(size=(tiles, steps * keys, 3))
    partials: dict[int, tuple[float, float, np.ndarray]] = {}
    arrived: dict[int, int] = defaultdict(int)
    result = np.full((tiles, 3), np.nan)
    blocks = [(block, index) for block, pieces in enumerate(plan.blocks) for index in range(len(pieces))]
    for block, index in random.permutation(blocks):  # the order in which blocks get on is anybody's guess
        sample, piece = plan.blocks[block][index]
        maximum, total, output = -np.inf, 0.0, np.zeros(3)
        for step in plan.steps_of(sample, piece):
            part = slice(step * keys, (step + 1) * keys)
            larger = max(maximum, scores[piece.tile, part].max())
            weights = np.exp(scores[piece.tile, part] - larger)
            shrink = np.exp(maximum - larger)
            total, output = total * shrink + weights.sum(), output * shrink + weights @ values[piece.tile, part]
            maximum = larger
        if piece.parts > 1:
            partials[piece.partial] = (maximum, total, output)
            arrived[piece.tile] += 1
            if arrived[piece.tile] < piece.parts:
                continue
            first = piece.partial - piece.part
            parts = [partials[first + i] for i in range(piece.parts)]
            maximum = max(part[0] for part in parts)
            shares = [np.exp(part[0] - maximum) if part[0] > -np.inf else 0.0 for part in parts]
            total = sum(weight * part[1] for weight, part in zip(shares, parts, strict=True))
            output = np.sum([weight * part[2] for weight, part in zip(shares, parts, strict=True)], axis=0)
        result[piece.tile] = output / total
    for tile in range(tiles):
        weights = np.exp(scores[tile] - scores[tile].max())
        np.testing.assert_allclose(result[tile], weights @ values[tile] / weights.sum(), atol=1e-12)


@pytest.mark.parametrize(
    "tokens, tile, useful", [(1560, 176, 0.984), (880, 176, 1.0), (1024, 128, 1.0), (3600, 144, 1.0), (100, 112, 0.89)]
)
def test_key_tile(header, tokens, tile, useful):
    assert header.key_tile(tokens) == tile
    assert tokens / (-(-tokens // tile) * tile) >= useful


@given(
    tiles=st.integers(1, 2000), steps=st.lists(st.integers(0, 2200), min_size=2, max_size=2), blocks=st.integers(1, 300)
)
def test_parts(header, tiles, steps, blocks):
    """Where a block takes one unit: one piece of one tile each, every step once, and room for the largest table."""
    schedule, larger = (header.make_of_parts(tiles, some, blocks) for some in sorted(steps))
    assert larger.cut >= schedule.cut and larger.sharers >= schedule.sharers
    covered: defaultdict[int, list[int]] = defaultdict(list)
    parts: defaultdict[int, list[int]] = defaultdict(list)
    for unit in range(header.units(schedule)):
        piece = header.piece(schedule, unit, 0)
        assert header.piece(schedule, unit, 1).tile == -1
        first, last = (header.step(at, piece.of, min(steps)) for at in (piece.begin, piece.end))
        assert (piece.parts > 1) == (piece.tile < schedule.cut)
        if piece.parts > 1:
            parts[piece.tile].append(piece.part)
            assert piece.parts == schedule.sharers // schedule.cut
            assert last - first >= 4, "not too short to fill a pipeline"
        covered[piece.tile] += range(first, last)
    assert covered == {tile: list(range(min(steps))) for tile in range(tiles)}
    assert all(order == list(range(schedule.sharers // schedule.cut)) for order in parts.values())


def time_of_parts(header: ctypes.CDLL, tiles: int, steps: int, blocks: int) -> float:
    """In whole tiles, blocks taking units as they get free. A part costs two steps more, merging a step for each."""
    schedule = header.make_of_parts(tiles, steps, blocks)
    free = [0.0] * blocks
    for unit in range(header.units(schedule)):
        piece = header.piece(schedule, unit, 0)
        own = header.step(piece.end, piece.of, steps) - header.step(piece.begin, piece.of, steps)
        extra = 2 if piece.parts > 1 else 0
        merge = piece.parts if 0 < piece.part == piece.parts - 1 else 0
        heapq.heapreplace(free, free[0] + own + extra + merge)
    return max(free) / steps


@given(tiles=st.integers(1, 700), steps=st.integers(1, 700), blocks=st.integers(1, 300))
def test_parts_never_take_longer_than_whole_tiles(header, tiles, steps, blocks):
    assert time_of_parts(header, tiles, steps, blocks) <= -(-tiles // blocks)


@pytest.mark.parametrize(
    "device, tile, heads, tokens, gain",
    [
        ("A100", 64, 12, 1560, 0.28),
        ("RTX 4090", 32, 12, 1560, 0.1),
        ("A100", 64, 40, 1560, 0),
        ("A100", 64, 12, 3600, 0.03),
    ],
)
def test_gain_of_parts(header, device, tile, heads, tokens, gain):
    """What docs/kernels.md says of three frames and twelve pages."""
    blocks = 2 * {"A100": 108, "RTX 4090": 128}[device]
    tiles = -(-3 * tokens // QUERY_TILE) * heads
    time = time_of_parts(header, tiles, 12 * -(-tokens // tile), blocks)
    assert time <= (1 - gain) * -(-tiles // blocks)
