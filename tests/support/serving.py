"""A server on a port of its own, in a thread, and what its video shows."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av

from longlive_rag.serve import listen
from longlive_rag.serve.studio import Studio


def picture_times(video: bytes | Path) -> list[float]:
    """When each picture is shown, in seconds, after decoding them all."""
    source = io.BytesIO(video) if isinstance(video, bytes) else str(video)
    with av.open(source, "r") as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        return [float(frame.pts * stream.time_base) for frame in container.decode(stream) if frame.pts is not None]


@contextlib.contextmanager
def serving(studio: Studio) -> Iterator[str]:
    """Yields its address, `http://127.0.0.1:PORT/`."""
    bound = listen.bind("127.0.0.1", 0)
    server = listen.make_server(studio, token=None, hosts=())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        port = bound.getsockname()[1]
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(60)
        bound.close()
