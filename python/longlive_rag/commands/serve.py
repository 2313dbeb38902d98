"""`longlive-rag serve`: a video that grows in the browser while people watch, steer it and see what it remembers."""

from __future__ import annotations

import importlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from longlive_rag.files import output_folder


@dataclass(frozen=True)
class Serve:
    """Show a video that grows while people watch it, steer it with prompts, and see what it remembers.

    Without --backbone it is the bundled small world: no GPU, no download. Leaves video-0001.mp4 and so on in --output,
    each of which can be played at any time, even after a crash.

    Examples:
      longlive-rag serve
      longlive-rag serve --resume
    """

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "server": ("host", "port", "allow_host", "output", "resume", "ahead", "seed"),
    }

    host: str = "127.0.0.1"
    """Address to listen on. One that other machines can reach asks its visitors for a token."""
    port: int = 8765
    """Port to listen on."""
    allow_host: tuple[str, ...] = ()
    """Further names that this machine is called by, such as those of a proxy in front."""
    output: Path = Path("serve_output")
    """Folder for the videos; created if it is missing."""
    resume: bool = False
    """Go on with the newest video in the folder."""
    ahead: float = 1.5
    """Seconds that may be made before the foremost viewer has seen them."""
    seed: int = 0
    """Seed of the first video."""

    def run(self) -> int:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be from 0 to 65535, got {self.port}")
        if not 0 < self.ahead <= 3600:
            raise ValueError(f"--ahead must be above 0 and at most 3600 seconds, got {self.ahead}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        for package in ("starlette", "uvicorn", "websockets"):
            importlib.import_module(package)
        import torch

        from longlive_rag.serve import listen
        from longlive_rag.serve.guard import is_loopback
        from longlive_rag.serve.small_scene import SmallScene
        from longlive_rag.serve.studio import Studio

        socket = listen.bind(self.host, self.port)
        folder = output_folder(self.output)
        torch.set_num_threads(1)  # matrices this small are multiplied faster by one
        studio = Studio(SmallScene(), folder, ahead=self.ahead, seed=self.seed, resume=self.resume)
        token = None if is_loopback(self.host) else secrets.token_urlsafe(16)
        host = f"[{self.host}]" if ":" in self.host else self.host
        address = f"http://{host}:{socket.getsockname()[1]}/"
        print(f"{address}{f'?token={token}' if token else ''}   (Ctrl+C ends it; the video is {studio.recording.path})", flush=True)
        listen.serve(studio, socket, token=token, hosts=self.allow_host)
        print(f"Written: {studio.recording.path} ({studio.recording.seconds:.1f} s)")
        return 0
