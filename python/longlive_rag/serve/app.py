"""The server: the page, the video so far, and the WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from longlive_rag.serve import protocol
from longlive_rag.serve.guard import Guard
from longlive_rag.serve.studio import Studio
from longlive_rag.serve.take import Event

STATIC = Path(__file__).parent / "static"
MOST_VIEWERS = 64
_QUEUED = 256  # events that wait for a slow viewer before it is let go
_MESSAGES_PER_SECOND, _BURST = 20, 60
_CHUNK = 256 * 1024
_MOST_BLOCKS = 1000  # in one answer


class Viewer:
    """One WebSocket."""

    def __init__(self, socket: WebSocket) -> None:
        self.socket = socket
        self.events: asyncio.Queue[Event | None] = asyncio.Queue(_QUEUED)
        self._allowance, self._asked = float(_BURST), time.monotonic()

    def tell(self, event: Event | None) -> None:
        """Queue an event; a viewer that does not read is let go, and can come back."""
        try:
            self.events.put_nowait(event)
        except asyncio.QueueFull:
            while not self.events.empty():
                self.events.get_nowait()
            self.events.put_nowait(None)

    def may_speak(self) -> bool:
        now = time.monotonic()
        self._allowance = min(_BURST, self._allowance + (now - self._asked) * _MESSAGES_PER_SECOND)
        self._asked = now
        self._allowance -= 1
        return self._allowance >= 0


class Server:
    """The routes around a studio."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.viewers: set[Viewer] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        studio.emit = self._from_studio

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self.studio.start()
        yield
        await run_in_threadpool(self.studio.stop)

    def _from_studio(self, event: Event) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._broadcast, event)

    def _broadcast(self, event: Event) -> None:
        for viewer in list(self.viewers):
            viewer.tell(event)

    # ---- requests ---------------------------------------------------------------------------------------------------

    async def state(self, request: Request) -> Response:
        return JSONResponse(self.studio.state())

    async def schema(self, request: Request) -> Response:
        return JSONResponse(protocol.schema())

    async def blocks(self, request: Request) -> Response:
        first = _whole(request.query_params.get("from", "0"))
        last = _whole(request.query_params.get("to", str(first + _MOST_BLOCKS)))
        recording = self.studio.recording
        if request.query_params.get("video", str(recording.number)) != str(recording.number):
            raise HTTPException(404, "That video has ended.")
        records = await run_in_threadpool(recording.records, first, min(last, first + _MOST_BLOCKS))
        for record in records:
            del record["thumbnails"]
        return JSONResponse({"video": recording.number, "blocks": records})

    async def video(self, request: Request) -> Response:
        recording = self.studio.recording
        number = _whole(request.query_params.get("video", str(recording.number)))
        if number == recording.number:
            path, size = recording.path, recording.size
        else:
            path = recording.folder / f"video-{number:04d}.mp4"
            if not path.is_file():
                raise HTTPException(404, "There is no such video.")
            size = path.stat().st_size
        if size == 0:
            raise HTTPException(503, "The first block is being made.", {"Retry-After": "1"})
        return _ranged(request, path, size)

    async def thumbnail(self, request: Request) -> Response:
        recording = self.studio.recording
        video, frame, panel = (_whole(request.path_params[name]) for name in ("video", "frame", "panel"))
        if video != recording.number:
            raise HTTPException(404, "That video has ended.")
        try:
            data = await run_in_threadpool(recording.thumbnail, frame, panel)
        except IndexError as error:
            raise HTTPException(404, str(error)) from None
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})

    async def saved(self, request: Request) -> Response:
        video, blocks = (_whole(request.path_params[name]) for name in ("video", "blocks"))
        path = self.studio.folder / f"saved-{video:04d}-{blocks:06d}.mp4"
        if not path.is_file():
            raise HTTPException(404, "There is no such file.")
        return FileResponse(path, media_type="video/mp4", filename=path.name)

    # ---- the WebSocket ----------------------------------------------------------------------------------------------

    async def socket(self, socket: WebSocket) -> None:
        await socket.accept()
        if len(self.viewers) >= MOST_VIEWERS:
            await socket.close(1013, f"{MOST_VIEWERS} people are watching already; try again later.")
            return
        viewer = Viewer(socket)
        viewer.tell({"type": "hello", "state": self.studio.state()})
        self.viewers.add(viewer)
        self.studio.watches(viewer, 0.0)
        self._tell_viewers()
        writer = asyncio.create_task(self._write(viewer))
        try:
            await self._read(viewer)
        finally:
            self.viewers.discard(viewer)
            self.studio.watches(viewer, None)
            writer.cancel()
            self._tell_viewers()

    def _tell_viewers(self) -> None:
        self._broadcast({"type": "viewers", "viewers": len(self.viewers)})

    async def _write(self, viewer: Viewer) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while (event := await viewer.events.get()) is not None:
                await viewer.socket.send_text(json.dumps(event, separators=(",", ":")))
            await viewer.socket.close(1013, "The connection is too slow; come back.")

    async def _read(self, viewer: Viewer) -> None:
        while True:
            try:
                message = await viewer.socket.receive()
            except (WebSocketDisconnect, RuntimeError):
                return
            if message["type"] != "websocket.receive":
                return
            if not viewer.may_speak():
                with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                    await viewer.socket.close(1008, "Too many messages.")
                return
            await self._obey(viewer, message.get("text"))

    async def _obey(self, viewer: Viewer, text: str | None) -> None:
        number: int | None = None
        try:
            if text is None:
                raise protocol.BadMessage("A message must be text.")
            command = protocol.parse(text)
            number = command.pop("id")
            kind = command.pop("type")
            if kind == "watching":
                if command["video"] == self.studio.recording.number:
                    self.studio.watches(viewer, min(command["seconds"], self.studio.recording.seconds))
                return
            done = await run_in_threadpool(self._do, kind, command)
        except (ValueError, OSError) as error:
            at = error.number if isinstance(error, protocol.BadMessage) else number
            viewer.tell({"type": "error", "id": at, "message": str(error)})
            return
        viewer.tell({"type": "ack", "id": number, "command": kind, **done})
        if kind in ("prompt", "pause", "resume"):
            self._broadcast({"type": kind, **done})

    def _do(self, kind: str, command: dict[str, Any]) -> Event:
        studio = self.studio
        if kind == "prompt":
            return studio.ask(command.get("text"), command.get("camera"))
        if kind == "pause":
            return studio.pause()
        if kind == "resume":
            return studio.resume()
        if kind == "new":
            policies = command.get("policies")
            return studio.new_video(command.get("seed"), None if policies is None else tuple(dict.fromkeys(policies)))
        recording = studio.recording
        path = recording.save()
        video, blocks = re.fullmatch(r"saved-(\d+)-(\d+)\.mp4", path.name).groups()  # type: ignore[union-attr]
        return {"video": int(video), "block": int(blocks), "file": path.name, "url": f"saved/{video}/{blocks}.mp4"}


def make_app(studio: Studio, *, token: str | None = None, hosts: Collection[str] = ()) -> Starlette:
    """The application: `GET /`, `/state`, `/blocks`, `/video.mp4`, thumbnails, and the WebSocket `/ws`."""
    server = Server(studio)
    # By name, so that no part of an address ever becomes a part of a path.
    pages = {f"/{path.name}": path for path in STATIC.iterdir() if path.is_file() and path.name != "index.html"}
    pages["/"] = STATIC / "index.html"

    def page(path: Path) -> Any:
        async def answer(request: Request) -> Response:
            return FileResponse(path)

        return answer

    return Starlette(
        routes=[
            *(Route(name, page(path)) for name, path in pages.items()),
            Route("/state", server.state),
            Route("/schema.json", server.schema),
            Route("/blocks", server.blocks),
            Route("/video.mp4", server.video),
            Route("/thumbnails/{video:int}/{frame:int}/{panel:int}.jpg", server.thumbnail),
            Route("/saved/{video:int}/{blocks:int}.mp4", server.saved),
            WebSocketRoute("/ws", server.socket),
        ],
        middleware=[Middleware(Guard, token=token, hosts=hosts)],
        lifespan=server.lifespan,
    )


def _ranged(request: Request, path: Path, size: int) -> Response:
    """The first `size` bytes of a file that grows, or the range of them that is asked for."""
    start, end, status = 0, size, 200
    asked = request.headers.get("range")
    if (
        asked is not None
        and (match := re.fullmatch(r"bytes=(\d{0,16})-(\d{0,16})", asked.strip()))
        and any(match.groups())
    ):
        first, last = match.groups()
        if first:
            start, end = int(first), min(size, int(last) + 1) if last else size
        else:
            start = max(0, size - int(last))
        if start >= end:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        status = 206
    headers = {"Accept-Ranges": "bytes", "Content-Length": str(end - start)}
    if status == 206:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    if "download" in request.query_params:
        headers["Content-Disposition"] = f'attachment; filename="{path.name}"'

    async def pieces() -> AsyncIterator[bytes]:
        with path.open("rb") as file:
            file.seek(start)
            left = end - start
            while left > 0:
                piece = await run_in_threadpool(file.read, min(_CHUNK, left))
                if not piece:
                    return
                left -= len(piece)
                yield piece

    body = StreamingResponse(pieces(), status, headers, "video/mp4")
    return Response(status_code=status, headers=headers, media_type="video/mp4") if request.method == "HEAD" else body


def _whole(text: Any) -> int:
    if isinstance(text, int):
        return text
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise HTTPException(400, "Expected a whole number.")
    return int(text)
