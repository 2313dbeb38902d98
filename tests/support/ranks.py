"""Several ranks on this machine: functions of tests run in processes of their own, with gloo between them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imports once what the tests import, which takes seconds; every rank is a fork of it.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        "support.ranks",
        "pytest",
        "torch._dynamo.testing",
        "longlive_rag.generation.pipeline",
        "longlive_rag.small_world.measure",
    ]
)


def start_ranks(
    world: int, work: Callable[..., Any], *arguments: Any
) -> tuple[list[multiprocessing.context.ForkServerProcess], list[Connection]]:
    """`world` processes that call `work(rank, *arguments)` with a process group; and what each will say: (whether it
    returned, what it returned or its traceback)."""
    store = str(Path(tempfile.mkdtemp(prefix="ranks-")) / "store")
    processes, said = [], []
    for rank in range(world):
        receive, send = _processes.Pipe(duplex=False)
        process = _processes.Process(target=_be_rank, args=(rank, world, store, send, work, arguments), daemon=True)
        process.start()
        send.close()
        processes.append(process)
        said.append(receive)
    return processes, said


def run_ranks(world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """What `work(rank, *arguments)` returns on each of `world` ranks.

    Raises:
        AssertionError: one raised, died or took longer than `timeout` seconds.
    """
    processes, said = start_ranks(world, work, *arguments)
    results = []
    try:
        for rank, receive in enumerate(said):
            assert receive.poll(timeout), f"rank {rank} of {world} took more than {timeout} s"
            returned, result = receive.recv()
            assert returned, f"rank {rank} of {world}:\n{result}"
            results.append(pickle.loads(result))
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def _be_rank(
    rank: int, world: int, store: str, send: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world))
    said: tuple[bool, bytes | str]
    try:
        # Pickled here: torch would share the tensors through files that end with this process.
        said = True, pickle.dumps(work(rank, *arguments))
    except BaseException:
        said = False, traceback.format_exc()
    send.send(said)
    signal.pause()  # until `run_ranks` has heard all: others would take an end for a failure
