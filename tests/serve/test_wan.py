"""`serve` with a Wan checkpoint: the parts that `generate` loads, steered by any prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from longlive_rag.commands.serve import Serve
from longlive_rag.config import RetrievalConfig
from longlive_rag.models import CausalWanModel
from support.tiny_wan import save_original_folder
from support.video_files import read_video

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

POLICY = RetrievalConfig(context_frames=9, sink_frames=3, memory_frames=3, recency_guard=0, block_frames=3)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    save_original_folder(folder / "parts")
    torch.manual_seed(0)
    model = CausalWanModel(dim=128, ffn_dim=64, freq_dim=32, text_dim=24, num_heads=1, num_layers=2)
    torch.save({"generator_ema": {f"model.{name}": each for name, each in model.state_dict().items()}}, folder / "m.pt")
    serve = Serve(
        backbone="self-forcing", wan_dir=folder / "parts", checkpoint=folder / "m.pt", policy=POLICY,
        height=32, width=48, fps=4.0, prompt="a panda plays", output=folder,
    )  # fmt: skip
    return serve._wan()


def test_any_prompt_steers_it_and_memory_is_kept_for_each_policy(wan, open_studio, heard):
    studio = open_studio(scene=wan, ahead=12.0)
    heard.wait_for_block(1)
    at = studio.ask("the cat walks in the rain")["block"]
    heard.wait_for_block(4)
    studio.new_video(policies=("sliding_window", "retrieval"))
    record = heard.wait_for_block(4, video=2)
    assert record["shot"]["prompt"] == "the cat walks in the rain"
    assert record["retrieved"][0] is None and len(record["retrieved"][1]["frames"]) == 3
    frames, fps = read_video(studio.folder / "video-0001.mp4")
    assert frames.shape[1:] == (32, 48, 3) and fps == 4 and len(frames) >= 9 + 4 * 12
    assert read_video(studio.recording.path)[0].shape[1:] == (32, 96, 3)
    log = (Path(studio.folder) / "video-0001.jsonl").read_text().splitlines()
    assert '"a panda plays"' in log[at] and "the cat walks" in log[at + 1]  # the first line is about the video


def test_decoding_goes_on_seamlessly_after_a_restart(wan, open_studio, heard, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = open_studio(scene=wan, folder=tmp_path / "whole", ahead=11.0)
    heard.wait_for_block(3)
    heard.events.clear()
    first = open_studio(scene=wan, folder=tmp_path / "parts", ahead=5.0)
    heard.wait_for_block(1)
    first.stop()
    heard.events.clear()
    second = open_studio(scene=wan, folder=tmp_path / "parts", ahead=11.0, resume=True)
    heard.wait_for_block(3)
    frames, expected = (read_video(each.recording.path)[0] for each in (second, whole))
    assert np.array_equal(frames[: 9 + 3 * 12], expected[: 9 + 3 * 12])
