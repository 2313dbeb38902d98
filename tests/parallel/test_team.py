"""Teams of ranks make videos together: the first one writes, and what was stopped goes on with as many or others."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.torch_version import TorchVersion as Version

from longlive_rag.cli import main
from longlive_rag.generation.journal import Journal
from longlive_rag.generation.pipeline import Pipeline
from longlive_rag.models import CausalWanModel
from longlive_rag.parallel.team import Team, join_team
from longlive_rag.ranks import Ranks
from longlive_rag.tiers.device import DevicePool
from support.ranks import run_ranks
from support.stopped_videos import CONFIG, FACTS, contents, tiny_pipeline
from support.tiny_wan import save_original_folder

CPU = torch.device("cpu")


class Stopped(Exception):
    """Stands for a signal that reaches all ranks."""


def make(
    folder: Path, team: Team | None, passes: int | None = None, room: tuple[int, int] | None = None
) -> Tensor | None:
    """The video of a folder, which begins with latents that it is given and changes its prompt in frame 5.

    Args:
        passes: stopped before the model's pass of this number.
        room: latent frames for which the device and half of the host's available memory are measured to have room.

    Returns:
        The latents that this process decoded.
    """
    pipeline = tiny_pipeline(seconds=25 / 4)
    pipeline.team = team or Team()
    left = passes or 10**9
    decoded: list[Tensor] = []
    decode = pipeline.decoder.decode

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped

    def noted(latents: Tensor) -> Tensor:
        decoded.append(latents)
        return decode(latents)

    def begin() -> Tensor:
        assert pipeline.team.first, "the others need no picture"
        return torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(5))

    pipeline.model.register_forward_pre_hook(count)
    pipeline.decoder.decode = noted  # type: ignore[method-assign]
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(Stopped), measured(pipeline, *room) if room else contextlib.nullcontext():
        prompts = [(0.0, torch.ones(4, 8)), (4.0, -torch.ones(4, 8))]
        pipeline.generate(prompts, folder / "cat.mp4", FACTS, begin=begin)
    return torch.cat(decoded) if decoded else None


@contextlib.contextmanager
def measured(pipeline: Pipeline, device_frames: int, host_frames: int) -> Iterator[None]:
    available = 2 * host_frames * pipeline.frame_bytes * pipeline.team.ranks
    with (
        mock.patch("longlive_rag.budget.available_host_bytes", return_value=available),
        mock.patch("longlive_rag.generation.room.available_host_bytes", return_value=available),
        mock.patch.object(DevicePool, "_measured", lambda pool: device_frames),
    ):
        yield


def retrieved(log: Path) -> list[tuple[int, list[list[int]]]]:
    return [(entry["start"], entry["frames"]) for entry in json.loads(log.read_text())["retrieved"]]


def on_rank(rank: int, root: Path) -> tuple[list[str], int, Tensor | None]:
    group: Any = dist.group.WORLD
    team = Team(group)
    writes: list[str] = []
    if rank == 1:
        Journal.put_block = lambda self, index, block: writes.append("a block")  # type: ignore[method-assign]
    decoded = make(root / "whole", team)
    make(root / "stopped", team, passes=10)
    blocks = len(list((root / "stopped" / ".cat.journal").glob("block-*")))
    dist.barrier()
    make(root / "stopped", team)
    make(root / "fewer ranks", team, passes=10)
    make(root / "more ranks", team)
    make(root / "small machine", team, room=(5, 2))
    for folder in ("larger machine", "larger machine, fewer ranks"):
        make(root / folder, team, passes=13, room=(5, 2))
    make(root / "larger machine", team, room=(8, 20))
    with pytest.raises(OSError, match="no such folder"):
        team.from_first(lambda: (_ for _ in ()).throw(OSError("no such folder")))
    return writes, blocks, decoded


def test_the_first_rank_writes_and_stopped_videos_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "more ranks", None, passes=10)
    said = run_ranks(2, on_rank, tmp_path)
    assert [writes for writes, _, _ in said] == [[], []]
    assert 2 < said[0][1] < 5, "stopped between what was given and the prompt's change"
    whole = contents(tmp_path / "whole")
    assert set(whole) == {"cat.mp4", "cat.json", "cat.png"}
    assert contents(tmp_path / "stopped") == whole, "as many ranks as before: the same bytes"

    alone = make(tmp_path / "alone", None)
    assert said[1][2] is None, "the first rank decodes"
    # The same sums of float32; libraries may order them by the number of rows.
    torch.testing.assert_close(said[0][2], alone, rtol=0, atol=1e-6)
    assert retrieved(tmp_path / "alone" / "cat.json") == retrieved(tmp_path / "whole" / "cat.json") != []

    folder = tmp_path / "fewer ranks"
    kept = {path.name: path.read_bytes() for path in (folder / ".cat.journal").glob("block-*")}
    make(folder, None, passes=len(kept) + 1)
    now = {path.name: path.read_bytes() for path in (folder / ".cat.journal").glob("block-*")}
    assert kept == {name: now[name] for name in kept}, "another number of ranks: what is finished stays"
    assert "What is added may differ in its last bits: device '2 x cpu', now 'cpu'" in capsys.readouterr().out
    make(folder, None)
    assert set(contents(folder)) == set(contents(tmp_path / "more ranks")) == {"cat.mp4", "cat.json", "cat.png"}
    assert retrieved(tmp_path / "more ranks" / "cat.json") == retrieved(tmp_path / "whole" / "cat.json")
    assert CONFIG.block_frames == 1

    small = contents(tmp_path / "small machine")
    assert small["cat.json"] != whole["cat.json"], "a frame was forgotten"
    assert contents(tmp_path / "larger machine") == small, "what was measured at first holds"
    make(tmp_path / "larger machine, fewer ranks", None, room=(16, 40))
    names = ("larger machine, fewer ranks", "small machine")
    assert len({str(retrieved(tmp_path / name / "cat.json")) for name in names}) == 1, "for as many frames"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def launched(rank: int, world: int, ports: list[int], root: Path) -> tuple[int, int, int, bool]:
    """As torchrun would start this process, with teams of two."""
    dist.destroy_process_group()
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0]),
    }  # fmt: skip
    with (
        pytest.raises(ValueError, match="bad settings"),
        join_team(Ranks.from_environment(), 2, CPU) as team,
    ):
        team.from_first(lambda: int("bad settings"))
    os.environ["MASTER_PORT"] = str(ports[1])
    with join_team(Ranks.from_environment(), 2, CPU) as team:
        for number in range(2):
            if number % team.teams == team.number:
                make(root / f"video {number}", team, passes=4)
        return team.number, team.teams, team.ranks, team.first


def commanded(rank: int, world: int, port: int, arguments: list[str]) -> tuple[int, str, str]:
    """`longlive-rag generate` as torchrun would start it; exit status and output."""
    dist.destroy_process_group()
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


def test_the_command_makes_one_video_on_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    save_original_folder(tmp_path / "wan")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 256, "ffn_dim": 64, "freq_dim": 32, "text_dim": 24, "num_heads": 2}
    torch.save({"generator_ema": CausalWanModel(**sizes, num_layers=2).state_dict()}, tmp_path / "model.pt")
    Image.effect_mandelbrot((48, 32), (-2, -1, 1, 1), 50).save(tmp_path / "picture.png")
    files = ["--wan-dir", tmp_path / "wan", "--checkpoint", tmp_path / "model.pt", "--image", tmp_path / "picture.png"]
    length = ["--seconds", "6", "--fps", "4", "--height", "32", "--width", "48", "--denoising-steps", "1000"]
    policy = ["--context-frames", "3", "--memory-frames", "1", "--recency-guard", "0", "--block-frames", "1"]
    prompts = ["--prompt", "a cat", "--prompt-at", "3s", "the guitar"]
    arguments = ["generate", "--backbone", "self-forcing", *map(str, files), *length, *policy, *prompts]
    together = [*arguments, "--output", str(tmp_path / "videos"), "--sequence-parallel", "2"]
    if Version(torch.__version__) >= Version("2.6"):  # before, FSDP2 works on GPUs only
        together.append("--shard-weights")
    (status, said, _), (other_status, other_said, _) = run_ranks(2, commanded, 2, free_port(), together)
    assert status == other_status == 0
    assert "on 2 ranks, the first cpu" in said and "in all on each rank" in said and "Written" in said
    assert other_said == ""
    names = [f"0000-a-cat.{kind}" for kind in ("json", "mp4", "png")]
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == names

    ((status, _, _),) = run_ranks(1, commanded, 1, free_port(), [*arguments, "--output", str(tmp_path / "alone")])
    assert status == 0
    logs = [json.loads((tmp_path / folder / names[0]).read_text()) for folder in ("videos", "alone")]
    assert logs[0]["beginning"].startswith("image sha256:") and logs[0]["prompt_at"] == [[3, "the guitar"]]
    frames = [[entry["frames"] for entry in log.pop("retrieved")] for log in logs]
    assert frames[0] == frames[1] != []
    assert logs[0] == logs[1]


def test_weights_are_split_over_several_processes_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "generate",
        "--backbone",
        "wan",
        "--wan-dir",
        str(tmp_path),
        "--output",
        str(tmp_path),
        "--prompt",
        "a cat",
    ]
    assert main([*words, "--shard-weights"]) == 2
    assert "shard_weights needs several processes for a video: give sequence_parallel too" in capsys.readouterr().err


def test_teams_share_the_videos(tmp_path: Path) -> None:
    """And an error that all ranks of a team have reaches each of their callers: none is ended for another's."""
    said = run_ranks(4, launched, 4, [free_port(), free_port()], tmp_path)
    assert said == [(0, 2, 2, True), (0, 2, 2, False), (1, 2, 2, True), (1, 2, 2, False)]
    for number in range(2):
        assert list((tmp_path / f"video {number}" / ".cat.journal").glob("block-*"))


def test_a_team_must_divide_the_processes() -> None:
    with (
        pytest.raises(ValueError, match=r"sequence_parallel must divide the number of processes .*, 3, got 2"),
        join_team(Ranks(0, 3, 0), 2, CPU),
    ):
        pass
    with join_team(Ranks(1, 3, 1), 1, CPU) as team:
        assert (team.number, team.teams, team.ranks, team.first) == (1, 3, 1, True)
        assert team.from_first(lambda: 5) == 5
