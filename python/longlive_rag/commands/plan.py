"""`longlive-rag plan`: what fits where over the length of a video, and what moves, before a GPU is rented."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from longlive_rag.budget import Budget, parse_bytes
from longlive_rag.config import RetrievalConfig

if TYPE_CHECKING:
    from longlive_rag.planning import Outlook

_GPUS = ("24GB", "48GB", "141GB")
_ENOUGH = 2**60


@dataclass(frozen=True)
class Plan:
    """Say what fits where over the length of a video, and what moves between GPU and host in each block.

    Weights and a block's working memory come first (in bfloat16, the text encoder has left); keys and values take what
    the GPU has left, then host memory, then disk. What fits nowhere can be rebuilt from its latents, or is forgotten.
    Without --model or --gpu: a table of all three sizes, on 24 GB and 48 GB cards and an H200 (141 GB).

    Examples:
      longlive-rag plan --seconds 60
      longlive-rag plan --model 1.3B --seconds 600 --gpu 24GB --host 64GB \\
          --disk 100GB --plot plan.png
      longlive-rag plan --model 5B --gpu 48GB --page-bits 8 --json
      longlive-rag plan --model 14B --gpu 24GB --sequence-parallel 4 \\
          --shard-weights
    """

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "what to make": ("model", "seconds", "fps", "height", "width"),
        "machine": ("gpu", "sequence_parallel", "shard_weights", "host", "disk", "page_bits", "link", "rate"),
        "context policy": ("policy",),
        "what to print": ("json", "plot"),
    }

    model: Literal["1.3B", "5B", "14B"] | None = None
    """Size of the transformer. Default: all of them."""
    seconds: float = 60.0
    """Length of the video, rounded up to whole blocks."""
    fps: float | None = None
    """Frames per second of the video. Default: 16, for 5B 24."""
    height: int | None = None
    """Default: 480, for 5B 704."""
    width: int | None = None
    """Default: 832, for 5B 1280."""
    gpu: str | None = None
    """Memory of the GPU, such as 24GB. Default: 24GB, 48GB and 141GB."""
    sequence_parallel: int = 1
    """GPUs that make the video together; must divide the attention heads. --gpu, --host, --disk and --link are of each,
    and so is what is printed."""
    shard_weights: bool = False
    """With --sequence-parallel: each GPU holds a share of the transformer's weights."""
    host: str | None = None
    """Host memory for keys and values, such as 64GB. Default: as much as it takes."""
    disk: str = "0"
    """Disk for keys and values, such as 500GB."""
    page_bits: Literal["16", "8", "4"] = "16"
    """Bits of each number below the GPU."""
    link: str = "25GB"
    """Bytes a second between host and GPU, each way: 25GB is a PCIe 4.0 x16 slot in practice."""
    rate: float | None = None
    """Pictures a second that the GPU makes without memory. Default: those of the video, so that it can be watched
    while it grows."""
    policy: RetrievalConfig = field(default_factory=RetrievalConfig)
    """The context policy."""
    json: bool = False
    """Print JSON; needs --model and --gpu."""
    plot: Path | None = None
    """Picture of what lies where over the length of the video; needs --model and --gpu."""

    def run(self) -> int:
        if (self.json or self.plot is not None) and (self.model is None or self.gpu is None):
            option = "--json" if self.json else "--plot"
            raise ValueError(f"{option} shows one plan: give --model and --gpu too")
        for name in ("fps", "rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be positive, got {value}")
        if parse_bytes(self.link) == 0:
            raise ValueError(f"--link must be positive, got {self.link}")

        from longlive_rag import plan_report

        outlooks = [self._outlook(model, gpu) for model in self._models for gpu in self._gpus]
        (first, *others) = outlooks
        if self.json:
            import json

            print(json.dumps(plan_report.as_json(first), indent=2))
        elif others:
            print(plan_report.comparison(outlooks))
        else:
            print(plan_report.description(first))
        if self.plot is not None:
            plan_report.draw(first, self.plot)
            if not self.json:
                print(f"\nWritten: {self.plot}")
        return 0

    @property
    def _models(self) -> tuple[str, ...]:
        from longlive_rag.planning import FAMILIES

        return tuple(FAMILIES) if self.model is None else (self.model,)

    @property
    def _gpus(self) -> tuple[str, ...]:
        return _GPUS if self.gpu is None else (self.gpu,)

    def _outlook(self, model: str, gpu: str) -> Outlook:
        from longlive_rag.planning import Outlook, Video

        video = Video.of(
            model,
            self.seconds,
            self.policy,
            height=self.height,
            width=self.width,
            fps=self.fps,
            ranks=self.sequence_parallel,
            shard_weights=self.shard_weights,
        )
        budget = Budget(
            device=0,
            host=_ENOUGH if self.host is None else parse_bytes(self.host),
            disk=parse_bytes(self.disk),
            bits={"16": 16, "8": 8, "4": 4}[self.page_bits],  # type: ignore[arg-type]
        )
        return Outlook(video, parse_bytes(gpu), budget, parse_bytes(self.link), self.rate or video.settings.fps)
