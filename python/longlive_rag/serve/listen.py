"""From a studio to a port."""

from __future__ import annotations

import socket
from collections.abc import Collection

import uvicorn

from longlive_rag.serve.app import make_app
from longlive_rag.serve.protocol import LONGEST_MESSAGE
from longlive_rag.serve.studio import Studio


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there, before long work.

    Raises:
        OSError: the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host") from error
    return bound


def make_server(studio: Studio, *, token: str | None, hosts: Collection[str]) -> uvicorn.Server:
    """The server, not started yet, with limits on what strangers may send."""
    config = uvicorn.Config(
        make_app(studio, token=token, hosts=hosts),
        log_level="warning",
        ws="websockets-sansio",
        ws_max_size=2 * LONGEST_MESSAGE,
        timeout_graceful_shutdown=3,
        server_header=False,
        limit_concurrency=512,
        h11_max_incomplete_event_size=16 * 1024,
    )
    return uvicorn.Server(config)
