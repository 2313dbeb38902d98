"""A video that is stopped, in whatever way, and gone on with is the video that was never stopped, to the last byte."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from longlive_rag import Budget, archive
from longlive_rag.budget import format_bytes
from longlive_rag.generation.journal import Journal
from longlive_rag.generation.pipeline import Pipeline
from longlive_rag.generation.video import VideoWriter
from longlive_rag.generation.wan_files import find_wan_files
from longlive_rag.generation.wan_vae import StreamingDecoder
from longlive_rag.tiers.device import DevicePool
from support.stopped_videos import BLOCKS, CONFIG, contents, make_video, tiny_pipeline
from support.tiny_wan import save_original_folder
from support.video_files import read_video

RANDOM_KILLS = 60


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def uninterrupted(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    made = make_video(pipeline, tmp_path_factory.mktemp("uninterrupted"))
    assert set(made) == {"cat.mp4", "cat.json", "cat.png"}
    assert len(json.loads(made["cat.json"])["retrieved"]) == BLOCKS - 5
    return made


@pytest.fixture
def stopped(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a video that was stopped after eight blocks."""
    return stop(pipeline, tmp_path / "stopped", 8, monkeypatch)


def stop(pipeline: Pipeline, folder: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    put_block = Journal.put_block

    def interrupted(self: Journal, index: int, made: Any) -> None:
        if index == block:
            raise KeyboardInterrupt
        put_block(self, index, made)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "put_block", interrupted)
        make_video(pipeline, folder)
    return folder


class KilledRuns:
    """The process whose forks are killed."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "support.stopped_videos"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def __call__(self, **request: Any) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture
def run() -> Iterator[KilledRuns]:
    runs = KilledRuns()
    yield runs
    assert runs.process.stdin is not None and runs.process.stdout is not None
    runs.process.stdin.close()
    runs.process.wait(60)
    runs.process.stdout.close()


def test_killed_at_random_moments(run: KilledRuns, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    assert run(output=str(plain)) == 0
    generator = random.Random(0)
    kills = {"step": 0, "torn": 0, "seconds": 0}
    latest = 0.5  # of the moments in seconds; follows this machine's speed, so that most fall within the making
    for video in count():
        folder = tmp_path / str(video)
        kind = list(kills)[video % len(kills)]
        for _ in range(8):
            request: dict[str, Any] = {"output": str(folder)}
            if kind == "seconds":
                request["seconds"] = latest * generator.random()
            else:
                request |= {"step": generator.randint(1, 20), "torn": kind == "torn"}
            status = run(**request)
            assert status in (0, -signal.SIGKILL)
            if kind == "seconds":
                latest *= 1.1 if status else 0.7
            if status == 0:
                break
            kills[kind] += 1
        assert run(output=str(folder)) == 0
        assert contents(folder) == contents(plain), (video, kind)
        shutil.rmtree(folder)
        if sum(kills.values()) >= RANDOM_KILLS and min(kills.values()) > 10:
            break


def test_killed_at_each_of_the_last_changes_to_a_file(run: KilledRuns, tmp_path: Path) -> None:
    """From one of the last blocks to the removal of the journal."""
    plain, almost, folder = tmp_path / "plain", tmp_path / "almost", tmp_path / "again"
    assert run(output=str(plain)) == 0
    assert run(output=str(almost), step=48) == -signal.SIGKILL
    for step in count(1):
        shutil.copytree(almost, folder)
        killed = run(output=str(folder), step=step) != 0
        if killed:
            assert run(output=str(folder)) == 0
        assert contents(folder) == contents(plain), step
        shutil.rmtree(folder)
        if not killed:
            break
    assert step > 40


def test_it_says_that_it_goes_on_and_from_where(
    pipeline: Pipeline, stopped: Path, uninterrupted: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.name for path in stopped.iterdir()} == {".cat.journal", "cat.partial.mp4"}
    assert len(read_video(stopped / "cat.partial.mp4")[0]) == 4 * 8 - 3
    assert make_video(pipeline, stopped) == uninterrupted
    assert f"cat.mp4 goes on after 8 of {BLOCKS} blocks, at 7.2 s" in capsys.readouterr().out


@pytest.mark.parametrize("query", ["latest", "draft"])
@pytest.mark.parametrize("device_frames", [None, 4])
def test_finished_blocks_are_computed_again_bit_by_bit(
    query: Any, device_frames: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_pipeline(policy=dataclasses.replace(CONFIG, query=query))
    plain = make_video(pipeline, tmp_path / "plain")
    if device_frames is not None:
        pipeline.budget = Budget(device=device_frames * pipeline.frame_bytes)
    folder = stop(pipeline, tmp_path / "stopped", 10, monkeypatch)
    assert make_video(pipeline, folder) == plain


def machine(pipeline: Pipeline, device_frames: int, host_frames: int) -> ExitStack:
    """A machine on which so much is measured: what is free on the device, and half of what is available of the host."""
    stack = ExitStack()
    available = 2 * host_frames * pipeline.frame_bytes
    stack.enter_context(mock.patch("longlive_rag.budget.available_host_bytes", return_value=available))
    stack.enter_context(mock.patch("longlive_rag.generation.room.available_host_bytes", return_value=available))
    stack.enter_context(mock.patch.object(DevicePool, "_measured", lambda pool: device_frames))
    return stack


def test_the_room_that_was_measured_holds_for_the_whole_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = tiny_pipeline()
    with machine(pipeline, 6, 2):
        plain = make_video(pipeline, tmp_path / "plain")
        folder = stop(pipeline, tmp_path / "stopped", 10, monkeypatch)
        early = stop(pipeline, tmp_path / "early", 2, monkeypatch)  # nothing has been measured
    with machine(pipeline, 8, 20):
        roomy = make_video(pipeline, tmp_path / "roomy")
        assert roomy["cat.json"] != plain["cat.json"], "other frames are forgotten"
        assert make_video(pipeline, folder) == plain
        assert make_video(pipeline, early) == roomy
    assert "forgotten" not in capsys.readouterr().out


def test_less_room_than_it_was_begun_with_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = tiny_pipeline()
    page = pipeline.frame_bytes
    with machine(pipeline, 6, 20):
        plain = make_video(pipeline, tmp_path / "plain")
        folder = stop(pipeline, tmp_path / "stopped", 8, monkeypatch)
    with machine(pipeline, 6, BLOCKS // 2):  # all the video is here, if half of what is available would not do
        shutil.copytree(folder, tmp_path / "enough")
        assert make_video(pipeline, tmp_path / "enough") == plain
    with machine(pipeline, 6, 1):
        wanted = (
            rf"cat.mp4 was begun with room for {format_bytes(BLOCKS * page)} of keys and values in host memory, and "
            rf"now {format_bytes(2 * page)} are available there: .* set budget.host \(--host-memory\)"
        )
        with pytest.raises(ValueError, match=wanted):
            make_video(pipeline, folder)
        pipeline.budget = Budget(host=7 * page)
        assert make_video(pipeline, folder) == plain
    changed = f"host {format_bytes(20 * page)}, now {format_bytes(7 * page)}"
    assert f"Other frames may be forgotten or come back otherwise: {changed}\n" in capsys.readouterr().out


@pytest.mark.parametrize("frames", [7, 12])
def test_a_video_may_forget_all_that_a_block_could_retrieve(tmp_path: Path, frames: int) -> None:
    """In a video of 7 frames all blocks retrieve nothing, of 12 only some: what was retrieved is drawn."""
    pipeline = tiny_pipeline(seconds=(4 * frames - 3) / 4)
    pipeline.budget = Budget(device=5 * pipeline.frame_bytes, host=pipeline.frame_bytes)
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    made = make_video(pipeline, tmp_path / "video", begin=lambda: latents)
    entries = json.loads(made["cat.json"])["retrieved"]
    assert any(not entry["frames"] for entry in entries)
    assert ("cat.png" in made) == any(entry["frames"] for entry in entries)


def test_the_decoder_of_wan_forgets_what_is_out_of_its_reach(tmp_path: Path) -> None:
    """So that it may begin in the middle of a video."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    save_original_folder(tmp_path)
    decoder = StreamingDecoder.from_files(find_wan_files(tmp_path), device="cpu", dtype=torch.float32)
    latents = torch.randn(decoder.reach + 4, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    whole = decoder.decode(latents)
    assert len(whole) == decoder.pictures(len(latents))
    decoder.reset()
    later = decoder.decode(latents[2:])
    assert torch.equal(later[-8:], whole[-8:])
    decoder.reset()
    assert not torch.equal(decoder.decode(latents[-8:])[-8:], whole[-8:])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def exchange(path: Path) -> None:
    kind, index = path.stem.split("-")
    shutil.copy(path.with_name(f"{kind}-{int(index) - 1:08d}.safetensors"), path)


@pytest.mark.parametrize("damage", [Path.unlink, truncate, alter, exchange])
@pytest.mark.parametrize("name", ["block-00000005", "segment-00000001"])
def test_what_is_damaged_is_made_again(
    pipeline: Pipeline,
    stopped: Path,
    uninterrupted: dict[str, bytes],
    damage: Any,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(stopped / ".cat.journal" / f"{name}.safetensors")
    assert make_video(pipeline, stopped) == uninterrupted
    out = capsys.readouterr().out
    assert ("Going on before block 5: " in out) == name.startswith("block")
    assert f"goes on after {5 if name.startswith('block') else 8} of" in out


def test_a_block_of_an_earlier_version_is_made_again(
    pipeline: Pipeline,
    stopped: Path,
    uninterrupted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read = Journal._read

    def without_budget(journal: Journal, kind: str, index: int) -> Any:
        return {name: tensor for name, tensor in read(journal, kind, index).items() if (name, index) != ("budget", 3)}

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_read", without_budget)
        assert make_video(pipeline, stopped) == uninterrupted
    assert "Going on before block 3: " in capsys.readouterr().out


def test_the_settings_file_may_vanish_but_its_loss_is_no_licence(
    pipeline: Pipeline, stopped: Path, uninterrupted: dict[str, bytes]
) -> None:
    settings = stopped / ".cat.journal" / "settings.json"
    settings.write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json cannot be read .* restore it, or --overwrite"):
        make_video(tiny_pipeline(fps=5.0), stopped)
    assert make_video(pipeline, stopped) == uninterrupted


def test_other_settings_do_not_go_on(pipeline: Pipeline, stopped: Path, tmp_path: Path) -> None:
    other = tiny_pipeline(seconds=6.0, height=48)
    with pytest.raises(ValueError, match=r"begun with other settings \(seconds 11.25, now 6.0; height 32, now 48\)"):
        make_video(other, stopped)
    assert make_video(other, stopped, overwrite=True) == make_video(other, tmp_path / "other")


def test_a_disk_that_is_full_is_said_and_nothing_is_lost(
    pipeline: Pipeline, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each journal entry in turn."""
    write = archive.write
    folder = tmp_path / "full"
    for room in (0, 1, 4, 2, 3):
        left = room

        def full(path: Path, *arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                path.with_name(f".{path.stem}.01234567{path.suffix}").write_bytes(b"the beginning")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write(path, *arguments)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
            patch.setattr(archive, "write", full)
            make_video(pipeline, folder)
    assert make_video(pipeline, folder) == uninterrupted


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can mount a small disk")
def test_a_small_disk(pipeline: Pipeline, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        with pytest.raises(OSError, match="No space left on device"):
            make_video(pipeline, disk / "videos")
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        assert make_video(pipeline, disk / "videos") == uninterrupted
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_video_in_two_goes_is_one_to_the_last_byte(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    source = tmp_path / "source.mp4"
    source.write_bytes(uninterrupted["cat.mp4"])
    frames, _ = read_video(source)

    class Store(list[Any]):
        def put_segment(self, index: int, segment: Any) -> None:
            assert index == len(self)
            self.append(segment)

    store = Store()
    with VideoWriter(tmp_path / "whole.mp4", fps=4, store=store) as writer:
        writer.write(frames)
    assert len(store) == len(frames) // writer.segment_frames
    for done in range(len(store) + 1):
        with VideoWriter(tmp_path / "two.mp4", fps=4, size=(32, 32), finished=store[:done]) as writer:
            assert writer.frames_written == 8 * done
            for frame in frames[8 * done :]:
                writer.write(frame[None])
        assert (tmp_path / "two.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
