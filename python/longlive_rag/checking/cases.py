"""The cases of a check: small and odd ones, and with `thorough` real sizes, each against the float64 definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from longlive_rag import ops, rotary
from longlive_rag.checking.variants import Variant
from longlive_rag.ops import _portable
from longlive_rag.ops._attend_arguments import Arguments

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call, and how far from the truth it may be."""

    name: str
    run: Callable[[], tuple[float, float]]
    """Gives the error and its limit."""


def cases(variant: Variant, device: torch.device, thorough: bool) -> Iterator[Case]:
    """The cases of one variant on a device."""
    if variant.operation == "attend":
        yield from _attend_cases(device, thorough, variant.least_tokens)
    else:
        others = {"insert": _insert_cases, "retrieve": _retrieve_cases, "pack": _pack_cases}
        yield from others[variant.operation](device, thorough)


def _insert_cases(device: torch.device, thorough: bool) -> Iterator[Case]:
    shapes = [(2, 2, 15, 3, 64), (1, 3, 24, 2, 128)] + [(1, 3, 1560, 12, 128), (1, 3, 880, 24, 128)] * thorough
    for shape in shapes:
        for dtype in (*HALF, torch.float32):
            yield Case(f"insert {_text(shape, dtype)}", partial(_insert, shape, dtype, device))


def _insert(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    batch, frames, tokens, heads, head_dim = shape
    draw = _Draw(device)
    q, k, v = (draw(*shape).to(dtype) for _ in "qkv")
    q_weight, k_weight = (1 + draw(heads * head_dim) / 8 for _ in "qk")
    rotation = draw(tokens, rotary.spatial_pairs(head_dim), 2)
    slots = torch.randperm(batch * frames + 2, generator=draw.generator, device=device)[: batch * frames].int()
    slots[0] = -1
    results = []
    for kind in (dtype, torch.float64):
        pages = torch.full((2, batch * frames + 2, heads, tokens, head_dim), -7.0, dtype=kind, device=device)
        turned = ops.insert(
            k.to(kind),
            v.to(kind),
            k_weight.to(torch.float64 if kind is torch.float64 else torch.float32),
            rotation,
            pages[0],
            pages[1],
            slots.view(batch, frames),
            1e-6,
            q.to(kind),
            q_weight.to(torch.float64 if kind is torch.float64 else torch.float32),
        )
        assert turned is not None
        # What nothing was to be written to counts with how far it moved, and so adds nothing to the norm.
        results.append(torch.cat([pages.flatten() + 7, turned.flatten()]).double())
    # One rounding to the dtype, by half a unit in the last place at most.
    return _relative(*results), torch.finfo(dtype).eps


def _retrieve_cases(device: torch.device, thorough: bool) -> Iterator[Case]:
    shapes = [(1, 5, 16, 6), (3, 1000, 64, 6), (2, 300, 1024, 64)] + [(1, 100_000, 1024, 6)] * thorough
    for shape in shapes:
        for dtype in (torch.float32, *HALF):
            yield Case(f"retrieve {_text(shape, dtype)}", partial(_retrieve, shape, dtype, device))


def _retrieve(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    batch, count, width, k = shape
    draw = _Draw(device)
    query, keys = draw(batch, width).to(dtype), draw(batch, count, width).to(dtype)
    norms = 1 / keys.double().norm(dim=-1)
    first, last = 1, count - 1
    indices, similarity = ops.retrieve(query, keys, norms.float(), first, last, k)
    cosine = torch.cosine_similarity(query.double()[:, None], keys.double(), dim=-1)
    best = cosine[:, first:last].sort(dim=1, descending=True).values[:, :k]
    found = indices[:, : best.shape[1]]
    if bool((indices[:, best.shape[1] :] != -1).any()) or bool((found < first).any()) or bool((found >= last).any()):
        return float("inf"), 0.0
    if any(len(set(row)) != len(row) for row in found.tolist()):
        return float("inf"), 0.0
    # Which of two frames comes first is open where they are equally similar; how similar they are is not.
    error = max(
        float((cosine.gather(1, found.long()) - best).abs().max()),
        float((similarity[:, : best.shape[1]].double() - best).abs().max()),
    )
    # Products of the stored dtype's numbers summed in float32: at most `width` roundings of sums below 1.
    return error, width * torch.finfo(torch.float32).eps


def _pack_cases(device: torch.device, thorough: bool) -> Iterator[Case]:
    shapes = [(2, 3, 15, 64), (3, 2, 50, 128)] + [(30, 12, 1560, 128)] * thorough
    for shape in shapes:
        for dtype in HALF:
            for bits in (8, 4):
                name = f"pack {_text(shape, dtype)}, {bits} bits"
                yield Case(name, partial(_pack, shape, dtype, bits, device))


def _pack(
    shape: tuple[int, int, int, int], dtype: torch.dtype, bits: Literal[8, 4], device: torch.device
) -> tuple[float, float]:
    layers, heads, tokens, head_dim = shape
    draw = _Draw(device)
    pages = [[draw(3, heads, tokens, head_dim).to(dtype) for _ in range(layers)] for _ in "kv"]
    results = []
    # The definition runs where there are no kernels: on the CPU.
    for place in (device, torch.device("cpu")):
        k_pages, v_pages = ([page.to(place) for page in half] for half in pages)
        packed = ops.pack(k_pages, v_pages, 1, bits)
        back = [[torch.full_like(page, -7) for page in half] for half in (k_pages, v_pages)]
        ops.unpack(packed, back[0], back[1], 2, bits)
        results.append(torch.stack([page for half in back for page in half]).double().cpu() + 7)
    # A code may fall on the other side of a half: one step of a few numbers.
    return _relative(*results), 1e-2


def _attend_cases(device: torch.device, thorough: bool, least_tokens: int) -> Iterator[Case]:
    shapes = [(2, 1, 15, 3, 64, 4), (1, 3, 70, 2, 128, 5), (2, 2, 100, 2, 64, 3), (1, 1, 257, 1, 128, 2)]
    shapes += [(1, 3, 1560, 12, 128, 12), (2, 3, 880, 24, 128, 12), (1, 3, 3600, 3, 128, 12)] * thorough
    for shape in shapes:
        if shape[2] < least_tokens:
            continue
        for dtype in HALF:
            yield Case(f"attend {_text(shape, dtype)}", partial(_attend, shape, dtype, device))


def _attend(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    batch, frames, tokens, heads, head_dim, entries = shape
    draw = _Draw(device)
    pool = batch * entries + 3
    q = draw(batch, frames * tokens, heads, head_dim).to(dtype)
    k_pages, v_pages = (draw(pool, heads, tokens, head_dim).to(dtype) for _ in "kv")
    order = torch.randperm(pool, generator=draw.generator, device=device).int()
    for pages in (k_pages, v_pages):
        pages[order[batch * entries :].long()] = torch.nan  # nobody's pages
    slots = torch.nn.functional.pad(order[: batch * entries].view(batch, entries), (1, 2), value=-5)
    positions = torch.arange(slots.shape[1], device=device, dtype=torch.int32).expand(batch, -1).contiguous()
    query_position = (20 + torch.arange(frames, device=device, dtype=torch.int32)).expand(batch, -1).contiguous()
    frequencies = rotary.temporal_frequencies(head_dim, device)
    arguments = Arguments(q, k_pages, v_pages, slots, positions, query_position, frequencies)
    scale = head_dim**-0.5
    got = ops.attend(*arguments, scale)
    if not bool(got.isfinite().all()):
        return float("inf"), 0.0
    peer = _portable.attend(arguments, scale)
    errors = []
    # One head and one frame at a time: the float64 scores of a whole block would not fit a small GPU.
    for head in sorted({0, heads - 1}):
        for frame in sorted({0, frames - 1}):
            rows, some = slice(frame * tokens, (frame + 1) * tokens), slice(head, head + 1)
            exact = ops.attend(
                q[:, rows, some].double(),
                k_pages[:, some].double(),
                v_pages[:, some].double(),
                slots,
                positions,
                query_position[:, frame : frame + 1].contiguous(),
                frequencies,
                scale,
            )
            errors.append([_relative(result[:, rows, some].double(), exact) for result in (got, peer)])
    ours, theirs = (max(column) for column in zip(*errors, strict=True))
    return ours, 2 * theirs


class _Draw:
    """Normal numbers in float32, the same on every run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)


def _relative(result: Tensor, exact: Tensor) -> float:
    return float((result - exact).norm() / exact.norm())


def _text(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
