"""A server on a port of its own, in a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

from longlive_rag.serve import listen
from longlive_rag.serve.studio import Studio


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
