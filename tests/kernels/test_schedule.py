"""The work partition of attend on Hopper (csrc/core/schedule.h): every step once, evenly, merged in one order."""

from __future__ import annotations

import ctypes
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
Schedule make(int64_t tiles, int64_t steps, int multiprocessors) {
  return make_schedule(tiles, steps, multiprocessors);
}
int partials(Schedule schedule) { return partial_count(schedule); }
int pieces(Schedule schedule, int block) { return piece_count(schedule, block); }
Piece piece(Schedule schedule, int block, int index) { return piece_at(schedule, block, index); }
int step(int numerator, int of, int steps) { return step_at(numerator, of, steps); }
int key_tile(int tokens) { return choose_key_tile(tokens); }
}
"""


class Schedule(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("tiles", "blocks", "cut", "sharers")]


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
    library.make.restype, library.make.argtypes = Schedule, [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    library.partials.argtypes, library.pieces.argtypes = [Schedule], [Schedule, ctypes.c_int]
    library.piece.restype, library.piece.argtypes = Piece, [Schedule, ctypes.c_int, ctypes.c_int]
    return library


@dataclass
class Plan:
    """A schedule as its blocks see it."""

    header: ctypes.CDLL
    tiles: int
    steps: int
    multiprocessors: int = H200

    @cached_property
    def schedule(self) -> Schedule:
        return self.header.make(self.tiles, self.steps, self.multiprocessors)

    @cached_property
    def blocks(self) -> list[list[Piece]]:
        s = self.schedule
        return [[self.header.piece(s, b, i) for i in range(self.header.pieces(s, b))] for b in range(s.blocks)]

    def steps_of(self, piece: Piece, steps: int) -> range:
        return range(self.header.step(piece.begin, piece.of, steps), self.header.step(piece.end, piece.of, steps))

    def balance(self) -> float:
        """The largest load of a block over the mean one on all multiprocessors."""
        loads = [sum(len(self.steps_of(piece, self.steps)) for piece in pieces) for pieces in self.blocks]
        return max(loads) / (sum(loads) / self.multiprocessors)


@given(
    tiles=st.integers(1, 700),
    steps=st.integers(1, 2200),
    multiprocessors=st.sampled_from([1, 2, 4, 78, 114, H200, 144]),
    used=st.randoms(use_true_random=False),
)
def test_every_step_belongs_to_one_piece(header, tiles, steps, multiprocessors, used):
    """Also when fewer pages are used than the plan was made for, each sample its own number."""
    plan = Plan(header, tiles, steps, multiprocessors)
    actual = [used.randint(0, steps) for _ in range(tiles)]
    covered, parts, partials = defaultdict(list), defaultdict(list), []
    for pieces in plan.blocks:
        for piece in pieces:
            covered[piece.tile].append(plan.steps_of(piece, actual[piece.tile]))
            parts[piece.tile].append(piece)
    assert plan.schedule.blocks <= multiprocessors
    assert sorted(covered) == list(range(tiles))
    for tile, ranges in covered.items():
        assert sorted(step for r in ranges for step in r) == list(range(actual[tile]))
        ordered = sorted(parts[tile], key=lambda piece: piece.part)
        assert [piece.part for piece in ordered] == list(range(ordered[0].parts)), "each part once"
        assert [piece.begin for piece in ordered] == sorted(piece.begin for piece in ordered), "parts follow the keys"
        if ordered[0].parts > 1:
            first = ordered[0].partial - ordered[0].part
            assert [piece.partial for piece in ordered] == list(range(first, first + len(ordered)))
            partials += [piece.partial for piece in ordered]
    assert len(set(partials)) == len(partials), "no two pieces write one partial result"
    assert not partials or max(partials) < header.partials(plan.schedule)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("heads", [12, 40])
@pytest.mark.parametrize("tokens", [880, 1024, 1560, 3600])
def test_balance_of_the_wan_shapes(header, tokens, heads, frames, batch):
    """Within 3% of perfect on the 132 multiprocessors of an H200, with 12 pages."""
    tiles = -(-frames * tokens // QUERY_TILE) * heads * batch
    plan = Plan(header, tiles, 12 * -(-tokens // header.key_tile(tokens)))
    assert plan.balance() <= 1.03


def test_the_remainder_is_not_left_to_a_last_wave(header):
    """480 x 832, 12 heads: 444 query tiles are 3.36 waves; whole tiles alone would take 4."""
    plan = Plan(header, 444, 168)
    assert (plan.schedule.blocks, plan.schedule.cut, plan.schedule.sharers) == (H200, 48, H200)
    assert plan.balance() < 1.005
    assert all(pieces[0].parts > 1 and pieces[-1].parts == 1 for pieces in plan.blocks), "pieces come before the waves"
    assert max(piece.parts for pieces in plan.blocks for piece in pieces) <= 4


def test_a_nearly_full_last_wave_is_not_cut(header):
    assert Plan(header, 2 * H200 - 2, 168).schedule.cut == 0
    assert Plan(header, 2 * H200, 168).schedule.cut == 0


@pytest.mark.parametrize("tiles, steps", [(1, 1), (7, 2), (40, 5), (100, 168), (444, 1)])
def test_pieces_are_not_too_short_to_fill_a_pipeline(header, tiles, steps):
    plan = Plan(header, tiles, steps)
    shared = [pieces for pieces in plan.blocks if pieces[0].parts > 1]
    for pieces in shared:
        assert sum(len(plan.steps_of(piece, steps)) for piece in pieces if piece.parts > 1) >= 3


@given(
    tiles=st.integers(1, 30),
    steps=st.integers(1, 24),
    multiprocessors=st.integers(1, 13),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_execution(header, tiles, steps, multiprocessors, seed):
    """Running softmax over each piece, partial results merged as the kernel merges them, against one softmax."""
    plan = Plan(header, tiles, steps, multiprocessors)
    random = np.random.default_rng(seed)
    actual = random.integers(0, steps + 1, tiles)
    keys = 4  # of a step
    scores = random.normal(scale=8, size=(tiles, steps * keys))
    values = random.normal(size=(tiles, steps * keys, 3))
    partials: dict[int, tuple[float, float, np.ndarray]] = {}
    arrived: dict[int, int] = defaultdict(int)
    result = np.full((tiles, 3), np.nan)
    blocks = [(block, index) for block, pieces in enumerate(plan.blocks) for index in range(len(pieces))]
    for block, index in random.permutation(blocks):  # the order in which blocks get on is anybody's guess
        piece = plan.blocks[block][index]
        maximum, total, output = -np.inf, 0.0, np.zeros(3)
        for step in plan.steps_of(piece, int(actual[piece.tile])):
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
            weights = [np.exp(part[0] - maximum) if part[0] > -np.inf else 0.0 for part in parts]
            total = sum(weight * part[1] for weight, part in zip(weights, parts, strict=True))
            output = sum(weight * part[2] for weight, part in zip(weights, parts, strict=True))
        result[piece.tile] = output / total if total else 0.0
    for tile in range(tiles):
        used = slice(0, actual[tile] * keys)
        weights = np.exp(scores[tile, used] - scores[tile, used].max(initial=0))
        expected = weights @ values[tile, used] / weights.sum() if actual[tile] else np.zeros(3)
        np.testing.assert_allclose(result[tile], expected, atol=1e-12)


@pytest.mark.parametrize(
    "tokens, tile, useful", [(1560, 112, 0.994), (880, 176, 1.0), (1024, 128, 1.0), (3600, 144, 1.0), (100, 112, 0.89)]
)
def test_key_tile(header, tokens, tile, useful):
    assert header.key_tile(tokens) == tile
    assert tokens / (-(-tokens // tile) * tile) >= useful
