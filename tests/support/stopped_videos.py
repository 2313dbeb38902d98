"""Tiny videos whose making is stopped: in this process, or by SIGKILL in a fork of another one.

    python -m support.stopped_videos

reads requests from stdin, a JSON object a line, and answers each with the exit status of the fork that carried it out:
`{"output": FOLDER, "step": N, "torn": BOOL, "seconds": S}`. It is killed before the N-th change to a file, in the
middle of it if torn (the file has its name and half its content, as after a power cut), or after S seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longlive_rag import RetrievalConfig, figures
from longlive_rag.embedding import AveragePool
from longlive_rag.generation.pipeline import Pipeline, video_journal
from longlive_rag.generation.sampling import Sampling
from longlive_rag.generation.settings import VideoSettings
from longlive_rag.generation.wan_vae import StreamingDecoder
from longlive_rag.models import CausalWanModel

CONFIG = RetrievalConfig(context_frames=4, sink_frames=1, memory_frames=2, recency_guard=0, block_frames=1)
BLOCKS = 12
FACTS = {"prompt": "a cat"}
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


class TinyDecoder(StreamingDecoder):
    """Decodes in no time. As of Wan's, a picture depends on a few latent frames before it."""

    channels = 16
    spatial_factor = 8
    temporal_factor = 4
    reach = 3

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._past: list[Tensor] = []

    def decode(self, latents: Tensor) -> Tensor:
        pictures = []
        for frame in latents:
            count = self.temporal_factor if self._past else 1
            self._past = [*self._past, frame][-1 - self.reach :]
            mean = torch.stack(self._past).mean(dim=(0, 1)).tanh()
            image = mean.repeat_interleave(8, 0).repeat_interleave(8, 1).add(1).mul(127).byte()
            pictures += [image.add(number)[..., None].expand(-1, -1, 3) for number in range(count)]
        return torch.stack(pictures)


def tiny_pipeline(**settings: Any) -> Pipeline:
    """A pipeline of random parts whose videos have `BLOCKS` blocks, 45 pictures and 6 segments."""
    torch.manual_seed(0)
    model = CausalWanModel(dim=32, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=2).eval()
    sampling = Sampling((1000, 500), seed=4)
    values = {"seconds": 45 / 4, "fps": 4.0, "height": 32, "width": 32, "sampling": sampling, "policy": CONFIG}
    return Pipeline(model, TinyDecoder(), AveragePool(), VideoSettings(**{**values, **settings}))


def make_video(pipeline: Pipeline, folder: Path, **options: Any) -> dict[str, bytes]:
    """Make, or go on with, the video of a folder, and return all that the folder holds then."""
    prompt = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    folder.mkdir(exist_ok=True)
    pipeline.generate(prompt, folder / "cat.mp4", FACTS, **options)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, hidden ones too."""
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


def _die_at(step: int, torn: bool, folder: str) -> None:
    left = step

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in CHANGES or (event == "open" and not _writes(arguments)):
            return
        below = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # a name in a folder that is being removed
        if not (below or str(arguments[0]).startswith(folder)):
            return
        left -= 1
        if left > 0:
            return
        if torn and event == "os.rename" and ".journal" in str(arguments[1]):
            source, target = arguments[:2]
            os.truncate(source, os.path.getsize(source) // 2)
            left = sys.maxsize  # for this renaming of our own
            os.rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return "w" in (mode or "") or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _serve() -> None:
    torch.set_num_threads(1)
    pipeline = tiny_pipeline()
    figures.figure(1, 1)  # imports what every fork will need
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(2, 1)
                if request.get("step"):
                    _die_at(request["step"], request.get("torn", False), request["output"])
                if not (Path(request["output"]) / "cat.mp4").is_file():
                    make_video(pipeline, Path(request["output"]))
                video_journal(
                    Path(request["output"]) / "cat.mp4",
                    FACTS,
                    pipeline.settings,
                    None,
                    pipeline.budget,
                    pipeline.device,
                ).remove_finished()
                status = 0
            finally:
                os._exit(status)
        if request.get("seconds"):
            time.sleep(request["seconds"])
            os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
