"""retrieve: top k of N stored embeddings by cosine similarity."""

from __future__ import annotations

from functools import partial

import torch

from longlive_rag import ops
from longlive_rag.bench.common import Case, Machine, Row

COUNTS = [64, 1024, 4096, 65536, 1_000_000]
CPU_COUNTS = [64, 4096]
WIDTH = 1024
K = 6


def cases(machine: Machine) -> dict[str, Case]:
    return {f"N {count:,}": partial(measure, machine, count) for count in (COUNTS if machine.cuda else CPU_COUNTS)}


def measure(machine: Machine, count: int) -> Row:
    dtype = torch.bfloat16 if machine.cuda else torch.float32
    read = count * (WIDTH * dtype.itemsize + 4)
    sets = machine.sets(read)
    keys = [torch.randn(1, count, WIDTH, device=machine.device).to(dtype) for _ in range(sets)]
    inverse_norms = [1 / key.norm(dim=-1, dtype=torch.float32) for key in keys]
    query = torch.randn(1, WIDTH, device=machine.device).to(dtype)
    first, last = torch.tensor([[0], [count]], dtype=torch.int32, device=machine.device)

    def ours(index: int) -> object:
        return ops.retrieve(query, keys[index], inverse_norms[index], first, last, K)

    def peer(index: int) -> object:
        unit = torch.nn.functional.normalize(query.float(), dim=-1).to(query.dtype)
        return torch.topk((keys[index] @ unit[..., None])[..., 0] * inverse_norms[index], K)

    mine, theirs = machine.seconds([ours, peer], sets=sets)
    reading = read / machine.copy_rate
    limit = max((reading, "copy rate"), (machine.launch_time, "one launch")) if machine.cuda else (reading, "copy rate")
    return Row("retrieve", f"N {count:,}, D {WIDTH}, k {K}", mine, *limit, {"normalise + matmul + topk": theirs})
