"""retrieve: top k of N stored embeddings by cosine similarity."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longlive_rag import ops
from longlive_rag.bench.common import Machine, Row

COUNTS = [64, 1024, 4096, 65536, 1_000_000]
CPU_COUNTS = [64, 4096]
WIDTH = 1024
K = 6


def rows(machine: Machine) -> Iterator[Row]:
    dtype = torch.bfloat16 if machine.cuda else torch.float32
    for count in COUNTS if machine.cuda else CPU_COUNTS:
        read = count * (WIDTH * dtype.itemsize + 4)
        sets = machine.sets(read)
        keys = [torch.randn(1, count, WIDTH, device=machine.device).to(dtype) for _ in range(sets)]
        inverse_norms = [1 / key.norm(dim=-1, dtype=torch.float32) for key in keys]
        query = torch.randn(1, WIDTH, device=machine.device).to(dtype)
        bounds = torch.tensor([[0], [count]], dtype=torch.int32, device=machine.device)

        def ours(
            index: int,
            keys: list[Tensor] = keys,
            inverse_norms: list[Tensor] = inverse_norms,
            query: Tensor = query,
            bounds: Tensor = bounds,
        ) -> object:
            return ops.retrieve(query, keys[index], inverse_norms[index], bounds[0], bounds[1], K)

        def peer(
            index: int,
            keys: list[Tensor] = keys,
            inverse_norms: list[Tensor] = inverse_norms,
            query: Tensor = query,
        ) -> object:
            unit = torch.nn.functional.normalize(query.float(), dim=-1).to(query.dtype)
            return torch.topk((keys[index] @ unit[..., None])[..., 0] * inverse_norms[index], K)

        mine, theirs = machine.seconds([ours, peer], sets=sets)
        reading = read / machine.copy_rate
        limit = max((reading, "copy rate"), (machine.launch_time, "one launch"))
        yield Row("retrieve", f"N {count:,}, D {WIDTH}, k {K}", mine, *limit, {"normalise + matmul + topk": theirs})
