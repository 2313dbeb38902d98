"""Arguments of `ops.attend` for tests and checks, and what it has to return for them."""

from __future__ import annotations

import torch
from torch import Tensor

from longlive_rag import rotary
from longlive_rag.ops._attend_arguments import Arguments


class Case(Arguments):
    """Arguments of `ops.attend`, and variations of them."""

    def sample(self, index: int) -> Case:
        """One sample alone, over the same pools."""
        one = slice(index, index + 1)
        return self._replace(
            q=self.q[one],
            slots=self.slots[one],
            positions=self.positions[one],
            query_position=self.query_position[one],
        )

    def with_pages_moved(self) -> Case:
        """The same pages elsewhere in the pool."""
        places = torch.randperm(len(self.k_pages), device=self.k_pages.device)
        k_pages, v_pages = torch.empty_like(self.k_pages), torch.empty_like(self.v_pages)
        k_pages[places], v_pages[places] = self.k_pages, self.v_pages
        slots = torch.where(self.slots < 0, self.slots, places[self.slots.clamp(min=0).long()].int())
        return self._replace(k_pages=k_pages, v_pages=v_pages, slots=slots)

    def with_unused_entries(self, before: int, after: int) -> Case:
        """More unused entries at both ends of the table."""
        slots = torch.nn.functional.pad(self.slots, (before, after), value=-1)
        positions = torch.nn.functional.pad(self.positions, (before, after), value=2**31 - 1)
        return self._replace(slots=slots, positions=positions)


def make_case(
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    frames: int = 1,
    tokens: int = 72,
    heads: int = 1,
    head_dim: int = 64,
    entries: int = 2,
    spare: int = 2,
    pairs: int | None = None,
    distance: int = 30,
    seed: int = 0,
) -> Case:
    """Random pages in random slots; unused table entries hold huge negative and positive integers, unused pages NaN.

    Args:
        entries: used by each sample, at positions 0 to 29.
        spare: unused entries of each sample, and unused pages.
        pairs: that turn with time, at random frequencies; default: as many as Wan has.
        distance: position of the first query frame.
    """
    torch.manual_seed(seed)
    pool = batch * entries + spare
    k_pages, v_pages = (
        torch.full((pool, heads, tokens, head_dim), torch.nan, device=device, dtype=dtype) for _ in "kv"
    )
    slots = torch.randperm(pool)[: batch * entries].view(batch, entries)
    for pages in (k_pages, v_pages):
        for slot in slots.flatten().tolist():  # page by page: the largest pools are gigabytes
            pages[slot] = torch.randn(heads, tokens, head_dim, device=device)
    slots = torch.cat([slots, torch.full((batch, spare), -(2**31))], dim=1)
    positions = torch.cat([torch.randint(0, 30, (batch, entries)), torch.full((batch, spare), 2**31 - 1)], dim=1)
    order = torch.randperm(slots.shape[1])
    frequencies = rotary.temporal_frequencies(head_dim) if pairs is None else torch.rand(pairs, dtype=torch.float64)
    return Case(
        torch.randn(batch, frames * tokens, heads, head_dim, device=device).to(dtype),
        k_pages,
        v_pages,
        slots[:, order].int().to(device),
        positions[:, order].int().to(device),
        (distance + torch.arange(frames)).expand(batch, -1).int().contiguous().to(device),
        frequencies.to(device),
    )


def exact(case: Case, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64: for each query frame the gathered keys, turned to where they stand from it.

    Computed where the case is, returned on the CPU.
    """
    q, k_pages, v_pages, slots, positions, query_position, frequencies = case
    batch, length, heads, head_dim = q.shape
    tokens, pairs = k_pages.shape[2], frequencies.shape[0]
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, length, heads, head_dim, dtype=torch.float64, device=q.device)
    lse = torch.full((batch, length, heads), -torch.inf, dtype=torch.float64, device=q.device)
    for b in range(batch):
        used = slots[b] >= 0
        if not used.any():
            continue
        pages = slots[b][used].long()
        keys, values = (pool[pages].double().transpose(0, 1).flatten(1, 2) for pool in (k_pages, v_pages))
        for f, position in enumerate(query_position[b].tolist()):
            # Turning the key by its position less the query's is turning the query by the opposite.
            angle = (positions[b][used].double() - position)[:, None] * frequencies
            turn = torch.polar(torch.ones_like(angle), angle).repeat_interleave(tokens, dim=0)
            complex_keys = torch.view_as_complex(keys.unflatten(-1, (-1, 2)).clone())
            complex_keys[..., :pairs] *= turn
            turned = torch.view_as_real(complex_keys).flatten(-2)
            rows = slice(f * tokens, (f + 1) * tokens)
            for h in range(heads):  # one at a time: scores of video sizes in float64 are large
                scores = q[b, rows, h].double() @ turned[h].T * scale
                out[b, rows, h] = scores.softmax(dim=-1) @ values[h]
                lse[b, rows, h] = scores.logsumexp(dim=-1)
    return out.cpu(), lse.cpu()
