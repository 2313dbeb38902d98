"""Runs the public repositories' own `inference.py`, unmodified, alone and by `longlive-rag run`, and compares.

    python tests/backbones/against_scripts.py ~/Self-Forcing ~/LongLive ...

Each folder is a checkout of a repository in the table `ARGUMENTS`; its files are not changed. The script runs on a CPU
in float32, with a tiny model of random weights, as `checkouts/script.py` says. It makes two videos four times: by
itself; by `run --native`; by `run`, with memory; and with `patch(pipeline)` called in its own process. The table that
docs/backbones.md shows is printed at the end, in Markdown. OmegaConf and einops have to be installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from backbones.checkouts.repositories import LIMIT, commit, largest_difference, options, recognised  # noqa: E402
from backbones.checkouts.script import Orders  # noqa: E402

SCRIPT = "inference.py"
PROMPTS = ("a cat", "a dog")
STARTUP = f"""import sys
if sys.orig_argv[1:2] == [{SCRIPT!r}]:
    sys.path.insert(0, {str(TESTS)!r})
    from backbones.checkouts.script import begin
    begin({SCRIPT!r})
"""
"""What Python imports first; a launcher such as `longlive-rag run` passes it by."""


def _in_a_file(config: str, **changes: Any) -> Callable[[Path, Path, int], list[str]]:
    """The arguments of a script that takes everything from its configuration, with some of its values changed."""

    def arguments(root: Path, folder: Path, frames: int) -> list[str]:
        values = yaml.safe_load((root / config).read_text()) | {
            "data_path": str(folder / "prompts.txt"), "output_folder": str(folder / "videos"),
            "num_output_frames": frames, "generator_ckpt": None, "lora_ckpt": None, "adapter": None,
            "skip_existing": False,
        }  # fmt: skip
        return ["--config_path", _written(values, changes, folder)]

    return arguments


def _by_options(config: str, **changes: Any) -> Callable[[Path, Path, int], list[str]]:
    """The arguments of a script that takes options, as Self-Forcing's does."""

    def arguments(root: Path, folder: Path, frames: int) -> list[str]:
        values = yaml.safe_load((root / config).read_text())
        return [
            "--config_path", _written(values, changes, folder), "--data_path", str(folder / "prompts.txt"),
            "--output_folder", str(folder / "videos"), "--num_output_frames", str(frames),
        ]  # fmt: skip

    return arguments


def _written(values: dict[str, Any], changes: dict[str, Any], folder: Path) -> str:
    values["model_kwargs"] = values["model_kwargs"] | changes
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True))
    return str(path)


WINDOW = {"local_attn_size": 12, "sink_size": 1}
ARGUMENTS = {
    "Self-Forcing": _by_options("configs/self_forcing_dmd.yaml", **WINDOW),
    "Causal-Forcing": _by_options("configs/causal_forcing_dmd_chunkwise.yaml", **WINDOW),
    "Rolling Forcing": _by_options("configs/rolling_forcing_dmd.yaml"),
    "Infinity-RoPE": _by_options("configs/self_forcing_dmd.yaml", **WINDOW),
    "LongLive 1": _in_a_file("configs/longlive_inference.yaml"),
    "LongLive-RAG": _in_a_file("configs/longlive_latentmem.yaml", compression_method="avg_pool"),
}
"""By repository. Its published configuration, but for what is given here; without weights, and so without LoRA."""


def main() -> int:
    arguments = options(__doc__, frames=30).parse_args()
    sizes = {"layers": arguments.layers, "heads": arguments.heads, "head_dim": arguments.head_dim}
    rows = []
    for checkout in arguments.checkouts:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(Comparison(checkout.resolve(), Path(folder), sizes).row(arguments.frames))
    print("\n" + table(rows))
    return 0 if all(row["difference"] < LIMIT and row["same"] for row in rows) else 1


class Comparison:
    """Of what one repository's script makes alone and with memory."""

    def __init__(self, root: Path, folder: Path, sizes: dict[str, int]) -> None:
        self._root, self._folder, self._sizes = root, folder, sizes
        self._repository = recognised(root).repository
        (folder / "sitecustomize.py").write_text(STARTUP)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))

    def row(self, frames: int) -> dict[str, Any]:
        command = [sys.executable, SCRIPT, *ARGUMENTS[self._repository](self._root, self._folder, frames)]
        run = [sys.executable, "-m", "longlive_rag", "run"]
        log, records = self._folder / "log.json", self._folder / "records.json"
        own = self._videos("its own attention", command)
        # LongLive-RAG has memory of its own, which `run` reads off it.
        native = [] if self._repository == "LongLive-RAG" else ["--native"]
        native_videos = self._videos("run --native", [*run, *native, "--", *command])
        with_memory = self._videos("run", [*run, "--log", str(log), "--", *command])
        patched = self._videos("patch", command, records)
        (report,) = json.loads(log.read_text())
        retrieved = [[[block["start"], block["frames"]] for block in video] for video in report["videos"]]
        config = report["config"]
        return {
            "repository": self._repository,
            "commit": commit(self._root),
            "context": f"{config['context_frames']}, {config['sink_frames']}, {config['memory_frames']}",
            "videos": f"{len(own)} of {frames}",
            "difference": max(map(largest_difference, native_videos, own)),
            "same": all(map(torch.equal, with_memory, patched)) and retrieved == json.loads(records.read_text()),
            "blocks": sum(map(len, retrieved)),
        }

    def _videos(self, name: str, command: list[str], records: Path | None = None) -> list[Tensor]:
        """What a run of the script generates.

        Raises:
            SystemExit: it failed.
        """
        print(f"{self._repository}: {name} ...", file=sys.stderr, flush=True)
        latents = self._folder / "latents.pt"
        latents.unlink(missing_ok=True)
        orders = Orders(str(latents), self._sizes, None if records is None else str(records))
        path = os.pathsep.join(filter(None, [str(self._folder), os.environ.get("PYTHONPATH")]))
        environment = os.environ | orders.environment() | {"PYTHONPATH": path}
        result = subprocess.run(command, cwd=self._root, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{self._repository}: {name} failed\n{result.stderr}")
        videos: list[Tensor] = torch.load(latents)
        assert len(videos) == len(PROMPTS)
        return videos


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| repository | commit | videos | `run --native` against its own | context, sink, memory of `run` | "
        "`run` against `patch(pipeline)` | blocks in the log |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = "bit for bit" if row["same"] else "other"
        lines.append(
            f"| {row['repository']} | `{row['commit'][:8]}` | {row['videos']} frames | {row['difference']:.1e} | "
            f"{row['context']} | {same} | {row['blocks']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
