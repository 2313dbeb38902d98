"""Many viewers at once, those that vanish, those that do not read, and a server that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import websockets

from longlive_rag.serve.studio import Studio
from support.serving import picture_times, serving


def state(address: str) -> dict:
    with urllib.request.urlopen(f"{address}state", timeout=30) as answer:
        return json.load(answer)


def fetched(address: str) -> bytes:
    with urllib.request.urlopen(f"{address}video.mp4", timeout=30) as answer:
        return answer.read()


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[websockets.ClientConnection, list[float]]]:
    """A viewer that says how far it has watched, in seconds (the last of the list), as often as the docs advise."""
    async with websockets.connect(f"{address.replace('http', 'ws')}ws", close_timeout=1) as viewer:
        seconds = [0.0]

        async def tell() -> None:
            with contextlib.suppress(websockets.ConnectionClosed):
                while True:
                    await viewer.send(json.dumps({"type": "watching", "video": 1, "seconds": seconds[-1]}))
                    await asyncio.sleep(0.1)

        telling = asyncio.create_task(tell())
        yield viewer, seconds
        telling.cancel()


async def watch(address: str, seed: int) -> int:
    """Joins, watches a while, and leaves, thrice; hears no block twice and misses none. Returns how many it heard."""
    chance = random.Random(seed)
    heard = 0
    for _ in range(3):
        await asyncio.sleep(chance.random())
        async with connected(address) as (viewer, seconds):
            expected = json.loads(await viewer.recv())["state"]["blocks"]
            end = time.monotonic() + 0.5 + chance.random()
            while time.monotonic() < end:
                message = json.loads(await asyncio.wait_for(viewer.recv(), 30))
                if message["type"] == "block":
                    # One that was finished while we connected may be in the state already.
                    assert message["block"] in (expected, expected - 1)
                    expected = message["block"] + 1
                    seconds.append(expected / 10)
                    heard += 1
            if chance.random() < 0.5:
                viewer.transport.abort()  # a viewer that vanishes
    return heard


def test_twenty_viewers_come_and_go_while_it_grows(scene, tmp_path):
    async def all_of_them(address: str) -> list[int]:
        return await asyncio.gather(*(watch(address, seed) for seed in range(20)))

    with serving(Studio(scene, tmp_path, ahead=2.0)) as address:
        heard = asyncio.run(all_of_them(address))
        now = state(address)
        assert min(heard) > 0
        assert now["blocks"] > 20 and now["trouble"] is None
        assert len(picture_times(fetched(address))) >= now["frames"]


def test_who_does_not_read_holds_up_nobody(scene, tmp_path):
    with serving(Studio(scene, tmp_path, ahead=2.0)) as address:
        port = int(address.rsplit(":", 1)[1].rstrip("/"))
        while state(address)["blocks"] < 20:
            time.sleep(0.05)
        lazy = []
        for lines in (b"", b"GET /video.mp4 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"GET /video.mp4 HTTP/1.1\r\nHo"):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(lines)
            lazy.append(connection)

        async def watch_until_it_has_grown() -> None:
            never_reads = websockets.connect(f"ws://127.0.0.1:{port}/ws", close_timeout=1)
            async with never_reads, connected(address) as (viewer, seconds):
                seconds.append(1000)
                while True:
                    message = json.loads(await asyncio.wait_for(viewer.recv(), 30))
                    if message["type"] == "block" and message["block"] >= 60:
                        return

        asyncio.run(watch_until_it_has_grown())
        lazy[1].close()  # in mid-answer
        assert state(address)["trouble"] is None
        for connection in lazy:
            connection.close()


def test_the_client_in_the_docs_works(scene, tmp_path, capsys):
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    code = text[text.index("    import asyncio") : text.index("    asyncio.run(main())") + 23]
    with serving(Studio(scene, tmp_path, ahead=1.0)) as address:
        exec(textwrap.dedent(code).replace("127.0.0.1:8765", address.split("/")[2]), {})
    assert "20 here" in capsys.readouterr().out


def start(folder: Path, *more: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "longlive_rag", "serve", "--port", "0", "--output", str(folder), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("Open http://127.0.0.1:"), line
    return process, line.split()[1]


def wait_for_blocks(address: str, number: int) -> dict:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            now = state(address)
        except OSError:
            now = {"blocks": -1}
        if now["blocks"] >= number:
            return now
        time.sleep(0.1)
    raise AssertionError(f"{number} blocks were never made")


def test_a_killed_server_leaves_a_video_and_goes_on_with_it(tmp_path):
    process, address = start(tmp_path, "--ahead", "0.5")
    try:
        wait_for_blocks(address, 4)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = (tmp_path / "video-0001.mp4").read_bytes()
    assert len(picture_times(before)) == 4
    process, address = start(tmp_path, "--ahead", "0.75", "--resume")
    try:
        now = wait_for_blocks(address, 6)
        assert now["video"] == 1
        assert fetched(address).startswith(before)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, 130)
    assert len(picture_times((tmp_path / "video-0001.mp4").read_bytes())) == 6
