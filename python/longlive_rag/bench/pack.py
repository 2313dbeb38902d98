"""pack and unpack: one frame's pages of all layers as codes of 8 or 4 bits, and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from longlive_rag import ops
from longlive_rag.bench.common import Case, Machine, Row
from longlive_rag.ops.pack import Bits

# layers, heads, tokens; head_dim 128
CASES = {
    "Wan 1.3B, 480x832": (30, 12, 1560),
    "Wan 14B, 480x832": (40, 40, 1560),
}
CPU_CASES = {"2 layers, 2 heads, 96 tokens": (2, 2, 96)}
HEAD_DIM = 128
ALL_BITS: tuple[Bits, ...] = (8, 4)


def cases(machine: Machine) -> dict[str, Case]:
    sizes = CASES if machine.cuda else CPU_CASES
    return {
        f"{operation.__name__} {name}, {bits} bits": partial(operation, machine, f"{name}, {bits} bits", *size, bits)
        for name, size in sizes.items()
        for bits in ALL_BITS
        for operation in (pack, unpack)
    }


def _pages(machine: Machine, layers: int, heads: int, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    dtype = torch.bfloat16 if machine.cuda else torch.float32
    pages = torch.randn(2, layers, 1, heads, tokens, HEAD_DIM, device=machine.device, dtype=dtype)
    return list(pages[0].unbind()), list(pages[1].unbind())


def _moved(pages: Sequence[Tensor], packed: Tensor) -> int:
    """Bytes read and written: both halves of the pages, and the packed ones."""
    return 2 * sum(page.nbytes for page in pages) + packed.nbytes


def pack(machine: Machine, case: str, layers: int, heads: int, tokens: int, bits: Bits) -> Row:
    sets = machine.sets(2 * 2 * layers * heads * tokens * HEAD_DIM)
    pages = [_pages(machine, layers, heads, tokens) for _ in range(sets)]
    packed = [ops.pack(k, v, 0, bits) for k, v in pages]

    def ours(index: int) -> object:
        k, v = pages[index]
        return ops.pack(k, v, 0, bits, out=packed[index])

    def eager(index: int) -> object:
        return [_quantise(pool[0], bits) for pools in pages[index] for pool in pools]

    mine, theirs = machine.seconds([ours, eager], sets=sets)
    limit = _moved(pages[0][0], packed[0]) / machine.copy_rate
    return Row("pack", case, mine, limit, "copy rate", {"PyTorch": theirs})


def unpack(machine: Machine, case: str, layers: int, heads: int, tokens: int, bits: Bits) -> Row:
    sets = machine.sets(2 * 2 * layers * heads * tokens * HEAD_DIM)
    pages = [_pages(machine, layers, heads, tokens) for _ in range(sets)]
    packed = [ops.pack(k, v, 0, bits) for k, v in pages]
    quantised = [[_quantise(pool[0], bits) for pools in pair for pool in pools] for pair in pages]

    def ours(index: int) -> None:
        ops.unpack(packed[index], *pages[index], 0, bits)

    def eager(index: int) -> object:
        pools = [*pages[index][0], *pages[index][1]]
        return [
            pool[0].copy_((codes * scales).view(pool.shape[1:]))
            for pool, (codes, scales) in zip(pools, quantised[index], strict=True)
        ]

    mine, theirs = machine.seconds([ours, eager], sets=sets)
    limit = _moved(pages[0][0], packed[0]) / machine.copy_rate
    return Row("unpack", case, mine, limit, "copy rate", {"PyTorch": theirs})


def _quantise(page: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """What one does without the operation: groups of 24 tokens, codes of a byte each whatever the bits."""
    groups = page.unflatten(1, (-1, 24))
    scales = groups.abs().amax(dim=2, keepdim=True) / (127 if bits == 8 else 7)
    return (groups / scales).round().to(torch.int8), scales
