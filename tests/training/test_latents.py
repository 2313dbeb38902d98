"""Latent files: only what is asked for is read, and bad ones are named."""

import re
import resource
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longlive_rag.training.chunks import ChunkDataset, draw_chunks, fixed_chunks, split_videos
from longlive_rag.training.latents import LatentVideo, open_corpus, write_latents

LATENTS = torch.arange(20 * 3 * 2 * 2, dtype=torch.float32).view(20, 3, 2, 2)


@pytest.fixture(params=[".safetensors", ".pt"])
def video_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"video{request.param}"
    if request.param == ".pt":
        torch.save(LATENTS.bfloat16(), path)
    else:
        write_latents(path, LATENTS.bfloat16(), {"prompt": "a cat"})
    return path


def test_both_formats_give_the_same_frames(video_path: Path):
    video = LatentVideo.open(video_path)
    assert video.shape == (20, 3, 2, 2)
    assert video.metadata == ({} if video_path.suffix == ".pt" else {"prompt": "a cat"})
    assert torch.equal(video.read(5, 4), LATENTS[5:9].bfloat16().float())
    assert torch.equal(video.read(), LATENTS.bfloat16().float())
    with pytest.raises(ValueError, match="frames 18 to 22 .* it has 20"):
        video.read(18, 4)


def test_a_chunk_holds_its_own_memory_only(video_path: Path):
    chunk = ChunkDataset([LatentVideo.open(video_path)], 8)[0, 3]
    assert chunk.untyped_storage().nbytes() == chunk.numel() * 4


def test_a_chunk_of_a_large_file_does_not_bring_in_the_file(tmp_path: Path):
    """2 GB, sparse so that they take no room on the disk."""
    path = tmp_path / "long.safetensors"
    frames, size = 8192, 8192 * 16 * 64 * 64 * 4
    header = f'{{"latents":{{"dtype":"F32","shape":[{frames},16,64,64],"data_offsets":[0,{size}]}}}}'.encode()
    with path.open("wb") as file:
        file.truncate(8 + len(header) + size)
        file.write(len(header).to_bytes(8, "little") + header)
    video = LatentVideo.open(path)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert video.read(frames - 8, 8).shape == (8, 16, 64, 64)
    assert unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 200e6


def broken(folder: Path) -> dict[str, Path]:
    """One file for each fault, beside two good ones."""
    good = torch.ones(10, 4, 8, 8)
    for name in ("good_a", "good_b"):
        write_latents(folder / f"{name}.safetensors", good, {})
    nan = good.clone()
    nan[7, 2, 3, 3] = torch.nan
    paths = {
        fault: folder / f"bad_{fault}.safetensors"
        for fault in ("nan", "channels", "short", "truncated", "key", "integers", "shape")
    }
    paths |= {fault: folder / f"bad_{fault}.pt" for fault in ("pt_truncated", "pt_dict", "pt_pickle")}
    write_latents(paths["nan"], nan, {})
    write_latents(paths["channels"], good[:, :3], {})
    write_latents(paths["short"], good[:7], {})
    write_latents(paths["truncated"], good, {})
    save_file({"x": good}, paths["key"])
    write_latents(paths["integers"], good.int(), {})
    write_latents(paths["shape"], good[0], {})
    torch.save(good, paths["pt_truncated"])
    torch.save({"latents": good}, paths["pt_dict"])
    paths["pt_pickle"].write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for fault in ("truncated", "pt_truncated"):
        content = paths[fault].read_bytes()
        paths[fault].write_bytes(content[: len(content) // 2])
    return paths


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "has NaN or infinity in latent frame 7"),
        ("channels", "has latent frames of 3 x 8 x 8, expected 4 x 8 x 8 like the others"),
        ("short", "has 7 latent frames, expected at least 8"),
        ("truncated", "is damaged"),
        ("key", 'must hold a tensor "latents", got x'),
        ("integers", r"must hold floating-point latents \[T, C, H, W\], got I32"),
        ("shape", r"must hold floating-point latents \[T, C, H, W\], got F32 \[4, 8, 8\]"),
        ("pt_truncated", "is damaged"),
        ("pt_dict", r"must hold a tensor of latents \[T, C, H, W\], got a dict"),
        ("pt_pickle", "is damaged"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, fault: str, message: str):
    paths = broken(tmp_path)
    for other in paths:
        if other != fault:
            paths[other].unlink()
    with pytest.raises(ValueError, match=re.escape(str(paths[fault])) + ".*" + message) as refusal:
        open_corpus(tmp_path, shortest=8)
    assert "--bad-data skip" in str(refusal.value)


def test_bad_files_are_skipped_and_counted_on_request(tmp_path: Path):
    paths = broken(tmp_path)
    corpus = open_corpus(tmp_path, shortest=8, bad_data="skip")
    assert [video.path.stem for video in corpus.videos] == ["good_a", "good_b"]
    assert len(corpus.skipped) == len(paths)


def test_a_folder_without_usable_latents_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no folder of latents"):
        open_corpus(tmp_path / "missing", 8)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="holds no latents"):
        open_corpus(tmp_path, 8)
    write_latents(tmp_path / "short.safetensors", torch.ones(2, 4, 8, 8), {})
    with pytest.raises(ValueError, match="no usable latents: all 1 files are bad"):
        open_corpus(tmp_path, 8, "skip")


def test_videos_are_split_whole():
    training, validation = split_videos(50, 0.1, seed=3)
    assert len(validation) == 5 and sorted(training + validation) == list(range(50))
    assert split_videos(50, 0.1, seed=3) == (training, validation) != split_videos(50, 0.1, seed=4)
    assert list(map(len, split_videos(2, 0.1, 0))) == [1, 1] == list(map(len, split_videos(2, 0.99, 0)))
    with pytest.raises(ValueError, match="at least 2 videos"):
        split_videos(1, 0.1, 0)


def test_an_epoch_has_every_video_at_every_place_in_the_long_run(latents_folder: Path):
    videos = open_corpus(latents_folder, 8).videos
    generator = torch.Generator().manual_seed(0)
    epochs = [draw_chunks(videos, [0, 2, 5], 8, 2, generator) for _ in range(60)]
    assert all(sorted(video for video, _ in epoch) == [0, 0, 2, 2, 5, 5] for epoch in epochs)
    assert {start for epoch in epochs for _, start in epoch} == set(range(5))
    assert len({tuple(video for video, _ in epoch) for epoch in epochs}) > 10
    assert fixed_chunks(videos, [4], 8, 3) == [(4, 0), (4, 2), (4, 4)]
