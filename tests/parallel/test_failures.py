"""A rank that dies, fails, hangs or stops ends all of them within seconds, with a line that names it."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longlive_rag import stream
from longlive_rag.generation.sampling import Sampling
from longlive_rag.parallel.watch import Watch
from parallel.test_one_video import CONFIG, STEPS, model, noise, prompt
from support.ranks import start_ranks

WAIT = 1.0
"""Seconds that a rank may keep the others waiting in these tests."""


def on_rank(rank: int, at_fault: int, how: str, folder: str) -> None:
    """Make a video of which one rank makes two blocks; every finished block leaves a file."""
    sys.stderr = open(f"{folder}/stderr-{rank}", "w", buffering=1)  # noqa: SIM115, until the process ends
    group: Any = dist.group.WORLD
    with Watch(group, timeout=WAIT):
        blocks = stream(model(), noise().split(2, dim=1), prompt(), CONFIG, sampling=Sampling(STEPS), group=group)
        for block in blocks:
            if rank == 0:
                torch.save(block.latents, f"{folder}/block-{block.start:02d}")
            if rank == at_fault and block.start == 2:
                if how == "memory":
                    raise torch.OutOfMemoryError("no room for 3 GB\nmore lines")
                if how == "hangs":
                    time.sleep(60)
                os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)


@pytest.mark.parametrize(
    ("how", "at_fault", "what"),
    [
        ("dies", 1, "died"),
        ("dies", 0, "died"),
        ("memory", 1, "failed: OutOfMemoryError: no room for 3 GB;"),
        ("hangs", 1, "has kept the others waiting for 1 s"),
        ("stops", 0, "has not answered for 1 s"),
    ],
)
def test_one_rank_ends_all_and_is_named(how: str, at_fault: int, what: str, tmp_path: Any) -> None:
    processes, _ = start_ranks(3, on_rank, at_fault, how, str(tmp_path))
    try:
        for rank, process in enumerate(processes):
            if rank != at_fault:
                process.join(30)
                assert process.exitcode == 1, f"rank {rank}"
                said = (tmp_path / f"stderr-{rank}").read_text().splitlines()
                named = [line for line in said if line.startswith(f"longlive-rag: rank {at_fault} of 3 (")]
                assert len(named) == 1 and what in named[0], said
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert torch.load(tmp_path / "block-00").shape == (1, 2, 4, 4, 10), "what was finished is kept"
