"""The thread that makes the video: how far it runs ahead, what commands do, and that nothing is lost."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from longlive_rag.selection import OracleSelection
from longlive_rag.serve.recording import Recording
from support.serving import picture_times


def latents(recording: Recording) -> torch.Tensor:
    return torch.stack([recording.latents(block) for block in range(recording.blocks)])


def test_it_makes_a_beginning_and_waits_until_somebody_watches(open_studio, heard):
    studio = open_studio(ahead=0.5)
    heard.wait_for_block(4)
    time.sleep(0.5)
    assert studio.recording.blocks == 5  # half a second at ten pictures a second
    studio.watches("viewer", 0.3)
    heard.wait_for_block(7)
    time.sleep(0.5)
    assert studio.recording.blocks == 8
    studio.watches("slower viewer", 0.1)
    time.sleep(0.3)
    assert studio.recording.blocks == 8, "the foremost one counts"


def test_a_command_holds_from_the_block_it_was_told(open_studio, heard):
    studio = open_studio()
    heard.wait_for_block(3)
    answer = studio.ask("there")
    studio.watches("viewer", 10)
    heard.wait_for_block(answer["block"] + 2)
    prompts = [record["shot"]["prompt"] for record in studio.recording.records(0, studio.recording.blocks)]
    assert prompts.index("there") == answer["block"]


def test_both_policies_start_from_the_same_noise(open_studio, heard):
    studio = open_studio()
    heard.wait_for_block(9)
    made = latents(studio.recording)
    assert torch.equal(made[0, 0], made[0, 1])  # the first block has no past that could be forgotten
    assert not torch.equal(made[9, 0], made[9, 1])


def test_a_new_video_keeps_the_newest_prompt_and_takes_another_seed(open_studio, heard, tmp_path):
    studio = open_studio()
    heard.wait_for_block(2)
    studio.ask("there")
    answer = studio.new_video(policies=("remembers",))
    assert (answer["video"], answer["block"]) == (2, 0)
    record = heard.wait_for_block(1, video=2)
    assert record["shot"]["prompt"] == "there"
    assert studio.state()["policies"] == ["remembers"]
    assert studio.recording.facts.seed == 1
    assert picture_times(tmp_path / "video-0001.mp4"), "the first video is still there"


def test_a_prompt_that_means_nothing_changes_nothing(open_studio):
    studio = open_studio()
    with pytest.raises(ValueError, match="Only here and there"):
        studio.ask("elsewhere")
    assert studio.state()["prompt"] == "here"


def test_a_policy_may_choose_its_frames_itself(open_studio, heard, scene):
    own = OracleSelection(lambda start, batch: [[1]] * batch)
    scene.policies = {**scene.policies, "remembers": replace(scene.policies["remembers"], selection=own)}
    studio = open_studio()
    heard.wait_for_block(8)
    retrieved = studio.recording.record(8)["retrieved"]
    assert retrieved[scene.default_policies.index("remembers")]["frames"] == [1]


@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), OSError(28, "No space left on device")])
def test_a_failed_block_leaves_everything_as_it_was(open_studio, heard, scene, tmp_path, error):
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "failing").mkdir()
    undisturbed = open_studio(folder=tmp_path / "undisturbed")
    heard.wait_for_block(9)
    heard.events.clear()
    studio = open_studio(folder=tmp_path / "failing", ahead=0.5)
    heard.wait_for_block(4)
    scene.fails = error
    studio.watches("viewer", 10)
    message = heard.wait(lambda e: e["type"] == "trouble")["message"]
    assert studio.state()["trouble"] == message
    assert str(error.args[-1]) in message
    assert studio.recording.blocks == 5
    studio.resume()
    heard.wait_for_block(9)
    studio.pause()
    assert torch.equal(latents(studio.recording)[:10], latents(undisturbed.recording)[:10])
    for block in range(10):
        again, before = studio.recording.record(block), undisturbed.recording.record(block)
        assert again["retrieved"] == before["retrieved"]


def test_a_disk_that_is_full_in_mid_block_leaves_no_part_of_it(open_studio, heard, monkeypatch):
    studio = open_studio(ahead=0.5)
    heard.wait_for_block(4)
    write = studio.recording._write

    def full(kind: str, data: bytes) -> None:
        if kind == "thumbs":
            monkeypatch.undo()
            raise OSError(28, "No space left on device")
        write(kind, data)

    monkeypatch.setattr(studio.recording, "_write", full)
    studio.watches("viewer", 10)
    heard.wait(lambda e: e["type"] == "trouble")
    assert len(picture_times(studio.recording.path)) == 5
    studio.resume()
    heard.wait_for_block(8)
    studio.pause()
    assert picture_times(studio.recording.path)[:9] == pytest.approx([n / 10 for n in range(9)])


def test_what_was_stopped_goes_on_as_if_it_had_not_been(open_studio, heard, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = open_studio(folder=tmp_path / "whole", ahead=1.2)
    heard.wait_for_block(11)
    first = open_studio(folder=tmp_path / "parts", ahead=0.6)
    deadline = time.monotonic() + 60
    while first.recording.blocks < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    first.stop()
    before = first.recording.path.read_bytes()
    with first.recording.path.open("ab") as file:
        file.write(b"half a fragment")  # what a killed process may leave
    with (tmp_path / "parts" / "video-0001.jsonl").open("ab") as file:
        file.write(b'{"block": 6, "fra')
    heard.events.clear()
    second = open_studio(folder=tmp_path / "parts", ahead=1.2, resume=True)
    heard.wait_for_block(11)
    assert second.recording.path.read_bytes()[: len(before)] == before
    assert torch.equal(latents(second.recording)[:12], latents(whole.recording)[:12])
    assert picture_times(second.recording.path)[:12] == pytest.approx([n / 10 for n in range(12)])


def test_going_on_with_another_scene_is_refused(open_studio, heard, scene, tmp_path):
    open_studio().stop()
    scene.name = "another"
    with pytest.raises(ValueError, match="start without --resume"):
        open_studio(resume=True)
