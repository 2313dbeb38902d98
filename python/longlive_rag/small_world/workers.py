"""Jobs in worker processes of one thread each, with progress and a clean stop.

A roll-out of the small world is a long chain of tiny operations: two processes use two cores where two threads would
not.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")
Tick = Callable[[int], object]
MAX_WORKERS = 4  # of about 0.5 GB each


def in_processes(
    work: Callable[[Job, Tick], Result], jobs: Sequence[Job], tick: Tick, workers: int | None = None
) -> Iterator[tuple[Job, Result]]:
    """Do every job, and yield each with its result as soon as it is there.

    Args:
        work: a function of a module, of a job and a tick for its own progress.
        tick: called with the progress of all jobs since its last call.
        workers: processes; default one for each core that may be used, at most `MAX_WORKERS`.

    Raises:
        Whatever a job raises; the others are stopped.
    """
    workers = workers or min(_cores(), MAX_WORKERS)
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("l", 0), context.Event()
    executor = ProcessPoolExecutor(workers, context, _start, (counter, stop))
    told = 0
    try:
        futures = {executor.submit(_do, work, job): job for job in jobs}
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            now = counter.value
            tick(now - told)
            told = now
            for future in done:
                yield futures[future], future.result()
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(counter: Any, stop: Any) -> None:
    global _shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles an interrupt, by setting `stop`
    torch.set_num_threads(1)
    _shared = counter, stop


def _do(work: Callable[[Any, Tick], Any], job: Any) -> Any:
    counter, stop = _shared

    def tick(amount: int) -> None:
        if stop.is_set():
            raise InterruptedError("the measurement was stopped")
        with counter.get_lock():
            counter.value += amount

    return work(job, tick)


_shared: Any = None
