"""Many places that look alike: twins differ in one attribute, and the track says whose guests came back."""

import numpy as np
import pytest
import torch

import crowd_data
import train_backbone
from longlive_rag.small_world import bench_memory, crowd, world
from longlive_rag.small_world.backbone import ASSETS, load_backbone, load_codec
from longlive_rag.small_world.measure import Recall
from longlive_rag.small_world.policies import CONTEXT
from longlive_rag.small_world.tracks.crowd import CROWD, DWELL, LAP, same_place
from longlive_rag.small_world.tracks.track import Cell, Size
from training_data import CHUNK, NOISY, LatentWorld

VISITED = np.arange(crowd.PLACES)


def test_twins_differ_in_one_attribute():
    crowds = crowd.draw_crowds(np.random.default_rng(0), 20).reshape(20, world.PLACES, crowd.TWINS, -1)
    for one in range(crowd.TWINS):
        for other in range(one):
            shapes, colours = (
                f(crowds[:, :, one]) != f(crowds[:, :, other]) for f in (lambda s: s // 4, lambda s: s % 4)
            )
            assert (shapes ^ colours).all()
            assert colours[..., crowd.HOST].all()


def test_what_is_rendered_is_read():
    truth = crowd.draw_crowds(np.random.default_rng(1), 1)[0]
    frames = crowd.render(VISITED, VISITED % world.PHASES, truth)
    assert (crowd.decode(frames, VISITED) == truth).all()
    for frame, spots, place in zip(frames, crowd.corners(VISITED), VISITED, strict=True):
        assert (spots >= 0).all() and (spots <= world.SIZE - world.CELL).all()
        x, y = spots[crowd.HOST]
        cell = world.sprite_cells()[place // crowd.TWINS * crowd.SPOTS_PER_PLACE + crowd.HOST, place]
        assert (frame[y : y + world.CELL, x : x + world.CELL] == cell[place % world.PHASES]).all()


def test_every_lap_shows_every_place_and_returns_have_left_the_window():
    walk = CROWD.walk(4)
    assert all(set(lap) == set(VISITED) for lap in walk.views.reshape(4, LAP))
    for place in VISITED:
        gaps = np.diff(np.flatnonzero(walk.views == place))
        assert (gaps > 1).sum() == 3 and gaps[gaps > 1].min() > CONTEXT
    assert walk.views.max() < len(load_backbone().prompts)


def test_the_oracle_takes_frames_of_this_very_place():
    walk = CROWD.walk(3)
    for start in (LAP, 2 * LAP + 1):
        (row,) = same_place(walk, 0).answer(start, 1)
        assert len(row) >= DWELL and (walk.views[row] == walk.views[start]).all()
        apart = np.abs(walk.phases[row] - walk.phases[start])
        assert (np.diff(np.minimum(apart, world.PHASES - apart)) >= 0).all()


def videos_of(truth: np.ndarray) -> np.ndarray:
    walk = CROWD.walk(2)
    return np.stack([CROWD.render(walk, np.arange(len(walk.views)), each) for each in truth])


def test_true_videos_are_right_and_a_twin_s_guests_are_told():
    walk, truth = CROWD.walk(2), CROWD.draw(3, 4)
    frames = videos_of(truth)
    for given in (True, False):
        values = CROWD.measure(walk, truth, given, frames).values
        assert all(values[name].shape == (4, DWELL) for name in ("right", "twin", "host", "chance"))
        assert (values["right"] == 1).all() and (values["host"] == 1).all() and (values["twin"] == 0).all()
        assert values["chance"].mean() < 0.2
    mistaken = truth.reshape(4, world.PLACES, crowd.TWINS, -1)[:, :, ::-1].reshape(truth.shape).copy()
    mistaken[..., crowd.HOST] = truth[..., crowd.HOST]
    frames[:, LAP:] = videos_of(mistaken)[:, LAP:]
    values = CROWD.measure(walk, truth, True, frames).values
    assert (values["right"] == 0).all() and (values["twin"] == 1).all() and (values["host"] == 1).all()


def test_precision_and_recall_by_frame_of_the_visit():
    walk = CROWD.walk(2)
    start = next(time for time in range(LAP, 2 * LAP, DWELL) if walk.views[time] != walk.views[0])
    here = int(np.flatnonzero(walk.views == walk.views[start])[0])
    alike = walk.views // crowd.TWINS == walk.views[start] // crowd.TWINS
    twin = int(np.flatnonzero(alike & (walk.views != walk.views[start]))[0])
    other = int(np.flatnonzero(~alike)[0])
    rows = [[[here, twin]], [[twin, other]], [[here, here + 1]], [[other, other]]]
    recalls = [Recall(start + i, row, [[1.0, 1.0]]) for i, row in enumerate(rows)]
    found = CROWD.retrieval(walk, recalls, videos=1)
    assert found["precision"].tolist() == [[0.5, 0, 1, 0]]
    assert found["recall"].tolist() == [[1, 0, 1, 0]]
    assert found["twin_retrieved"].tolist() == [[0.5, 0.5, 0, 0]]


def test_training_batches_name_places_and_come_back():
    torch.manual_seed(0)
    codec = load_codec()
    latent_world = LatentWorld(codec)
    batch = crowd_data.draw_batch(latent_world, np.random.default_rng(0), chunks=2)
    assert batch.latents.shape == (2 * (1 + NOISY) * CHUNK, 1, 16, 8, 8)
    assert torch.isfinite(batch.latents).all() and (batch.weight > 0).all()
    places = batch.views.view(2, 1 + NOISY, CHUNK)[:, 0].numpy()
    for chunk, walk in zip(
        codec.decode(batch.target[:, 0].flatten(0, 1)).reshape(2, CHUNK, 64, 64, 3), places, strict=True
    ):
        assert len(set(walk)) < len(walk) / 2
        assert (crowd.decode(chunk, walk)[:, crowd.HOST] == walk).mean() > 0.9


def test_prompts_begin_with_their_landscape_s():
    prompts = load_backbone().prompts.detach()
    begun = crowd_data.start_prompts(prompts)
    assert begun.shape == prompts.shape
    apart = torch.cdist(begun[: crowd.PLACES].flatten(1), prompts.flatten(1)).argmin(dim=1)
    assert apart.tolist() == crowd.views(VISITED).tolist()


def test_training_of_words_writes_words(tmp_path, monkeypatch):
    options = {"output": tmp_path, "inhabitants": "crowd", "start": ASSETS / "backbone.safetensors", "steps": 0}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["train", *arguments, "--words-only"])
    train_backbone.main()
    begun, plain = load_backbone(words=tmp_path / "backbone.safetensors"), load_backbone()
    expected = crowd_data.start_prompts(plain.prompts)
    torch.testing.assert_close(begun.prompts, expected, rtol=0, atol=2e-3)  # half precision
    assert (tmp_path / "backbone.safetensors").stat().st_size < 1.5e6


def test_words_replace_only_themselves():
    plain, crowded = load_backbone(), load_backbone(words=ASSETS / "crowd_words.safetensors")
    assert not torch.equal(plain.prompts, crowded.prompts)
    assert torch.equal(plain.patch_embedding.weight, crowded.patch_embedding.weight)
    with pytest.raises(ValueError, match="holds other weights"):
        load_backbone(words=ASSETS / "codec.safetensors")


def test_memory_of_the_right_place_keeps_the_guests():
    """A short run of the benchmark itself; chance is one in sixteen."""
    outcome, _ = bench_memory.do(bench_memory.Job(Cell("crowd", "oracle", "given", 0), Size(laps=2, videos=2), 3))
    assert outcome.values["right"].mean() > 0.8 and outcome.values["host"].mean() > 0.8
    assert outcome.values["recall"].min() == 1
    assert outcome.pictures.shape == (2 * crowd.TWINS, world.SIZE, world.SIZE, 3)
