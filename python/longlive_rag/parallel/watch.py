"""Ends all ranks of a group, with a message that names the one at fault, if one dies, fails or hangs.

A rank waits for the others inside a collective operation, where it hears of nothing. So each has a thread that tells
the first rank once in a while how far it is; a process that ends closes its connection, which is noticed at once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from multiprocessing.connection import Client, Connection, Listener, wait
from types import TracebackType
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from longlive_rag.parallel.shards import exchanges_begun
from longlive_rag.ranks import from_all

_TICK = 0.2
"""Seconds between two messages of a rank."""
_GRACE = 3.0
"""Seconds that a rank with an error of the connection waits to hear who has caused it, and that messages have to get
through when a group ends."""

_OWN_ERROR = 1.0
"""Seconds that a rank has to find the same fault itself, before it is ended for another's."""
_DIED = "died"

Fault: TypeAlias = tuple[int, str] | None
"""A rank and what it did."""


class Watch:
    """While the block runs, this process ends with status 1, and a line on stderr, when another rank of its group does.

    Args:
        group: the ranks that make one video.
        timeout: seconds that a rank may not answer, or may keep the others waiting for an exchange.

    A rank is at fault if its process is gone, if it leaves the block with an error, or if it has begun fewer exchanges
    than the others for `timeout` seconds.
    """

    def __init__(self, group: ProcessGroup, timeout: float = 600.0) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, got {timeout}")
        self._group, self._timeout = group, timeout
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._names: list[str] = []
        self._over = threading.Event()
        self._heard = threading.Event()
        self._reason = ""

    def __enter__(self) -> Watch:
        if self._ranks == 1:
            return self
        first = dist.get_global_rank(self._group, 0)
        people = from_all((socket.gethostname(), os.getpid()), self._group)
        self._names = [f"{machine}, process {process}" for machine, process in people]
        box: list[Any] = [None]
        listener = None
        if self._rank == 0:
            key = secrets.token_bytes(16)
            address = _address_for(machines={machine for machine, _ in people})
            listener = Listener((address, 0), backlog=self._ranks, authkey=key)
            box[0] = address, listener.address[1], key
        dist.broadcast_object_list(box, src=first, group=self._group)
        host, port, key = box[0]
        if listener is not None:
            peers: dict[int, Connection] = {}
            for _ in range(self._ranks - 1):
                peer = listener.accept()
                peers[peer.recv()] = peer
            listener.close()
            work = threading.Thread(target=self._lead, args=(peers,), daemon=True)
        else:
            lead = Client((host, port), authkey=key)
            lead.send(self._rank)
            work = threading.Thread(target=self._follow, args=(lead,), daemon=True)
        self._thread = work
        work.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ranks == 1:
            return
        broken = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        if broken and self._heard.wait(_GRACE):
            self._thread.join()  # the connection is, by another's fault: the thread ends this process
        if error is not None:
            self._reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self._over.set()
        # The first rank stays for those that are still on their way: its end would be taken for a failure.
        self._thread.join(_GRACE if error is not None else self._timeout)

    def _lead(self, peers: dict[int, Connection]) -> None:
        """The first rank's thread: hears all, and tells all who is at fault."""
        begun = dict.fromkeys(range(self._ranks), 0)
        before, moved = dict(begun), time.monotonic()
        answered = dict.fromkeys(peers, moved)
        fault: Fault = None
        while peers and fault is None:
            begun[0] = exchanges_begun()
            ready = wait(list(peers.values()), _TICK)
            for rank in [rank for rank, peer in peers.items() if peer in ready]:
                try:
                    message = peers[rank].recv()
                except (EOFError, OSError):
                    message = _DIED
                answered[rank] = time.monotonic()
                if isinstance(message, int):
                    begun[rank] = message
                elif message:
                    fault = rank, message
                    break
                else:
                    peers.pop(rank).close()
                    del begun[rank]
            now = time.monotonic()
            if begun != before:
                before, moved = dict(begun), now
            fault = fault or self._own_failure() or self._late(begun, now - moved)
            for rank in peers:
                if fault is None and now - answered[rank] > self._timeout:
                    fault = rank, f"has not answered for {self._timeout:g} s"
            _tell(peers, fault)
        if fault is not None:
            self._end(fault)

    def _own_failure(self) -> Fault:
        return (0, self._reason) if self._over.is_set() and self._reason else None

    def _late(self, begun: dict[int, int], seconds: float) -> Fault:
        """The rank that has begun fewest exchanges, if none has begun another for that long; all may be busy alike."""
        if seconds <= self._timeout or len(set(begun.values())) == 1:
            return None
        return min(begun, key=lambda rank: begun[rank]), f"has kept the others waiting for {self._timeout:g} s"

    def _follow(self, lead: Connection) -> None:
        """Another rank's thread: says how far it is, and hears who is at fault."""
        answered = time.monotonic()
        leaves: float | None = None
        fault: Fault = None
        try:
            while fault is None:
                if leaves is None:
                    over = self._over.is_set()
                    lead.send(self._reason if over else exchanges_begun())
                    if over and not self._reason:
                        return
                    leaves = time.monotonic() + _GRACE if over else None
                while fault is None and lead.poll(_TICK):
                    fault, answered = lead.recv(), time.monotonic()
                now = time.monotonic()
                if leaves is not None and now > leaves:
                    return
                if fault is None and now - answered > self._timeout:
                    fault = 0, f"has not answered for {self._timeout:g} s"
        except (EOFError, OSError):
            fault = 0, _DIED
        self._end(fault)

    def _end(self, fault: tuple[int, str]) -> None:
        """End this process, unless the fault is its own too, which its own error tells: bad arguments, for example."""
        rank, what = fault
        self._heard.set()
        if rank == self._rank or self._over.wait(_OWN_ERROR):
            return
        name = f" ({self._names[rank]})" if self._names else ""
        print(
            f"longlive-rag: rank {rank} of {self._ranks}{name} {what}; all ranks end, and what is finished is kept",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _tell(peers: dict[int, Connection], fault: Fault) -> None:
    for peer in peers.values():
        with contextlib.suppress(OSError):
            peer.send(fault)


def _address_for(machines: set[str]) -> str:
    """Of this process, where those on these machines find it."""
    if len(machines) == 1:
        return "127.0.0.1"
    meeting = os.environ.get("MASTER_ADDR") or socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((meeting, 9))  # sends nothing, but chooses the interface
        address: str = probe.getsockname()[0]
    # Loopback: the meeting point is on this machine, under the name by which the others know it.
    return meeting if address.startswith("127.") else address
