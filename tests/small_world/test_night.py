"""Light and weather change the look of the world, not what there is to know of it."""

import numpy as np
import pytest
import torch

from longlive_rag.config import RetrievalConfig
from longlive_rag.embedding import AveragePool, LayoutPool
from longlive_rag.memory import RetrievalMemory
from longlive_rag.small_world import bench_memory, light, world
from longlive_rag.small_world.backbone import load_backbone, load_codec
from longlive_rag.small_world.bench_memory import Job
from longlive_rag.small_world.corpus import WorldSource
from longlive_rag.small_world.tracks.night import ENCODERS, NIGHT, load_night_encoder, returns
from longlive_rag.small_world.tracks.track import Cell, Size

MIDNIGHT = light.CYCLE // 2


def test_the_light_can_be_undone():
    latents = torch.randn(2, light.CYCLE, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    lights = light.lights()
    seen = lights.cast(latents, first=7)
    # float32, divided by a clearness of at least .16
    torch.testing.assert_close(lights.lift(seen, first=7), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(lights.cast(latents)[:, 0], latents[:, 0], rtol=0, atol=1e-6)  # noon


def test_places_are_alike_at_night_and_differ_by_day():
    cast = np.zeros(len(world.SPOTS), int)
    views = np.arange(world.PLACES) * world.VIEWS_PER_PLACE
    day = world.render(views, np.zeros(world.PLACES, int), cast)
    night = light.shine(day, np.full(world.PLACES, MIDNIGHT))

    def apart(frames: np.ndarray) -> float:
        wide = frames.astype(float)
        return float(np.abs(wide[:, None] - wide[None]).mean())

    assert np.array_equal(light.shine(day, np.zeros(world.PLACES, int)), day)
    assert apart(night) < 0.25 * apart(day)
    assert apart(np.stack([day[0], night[0]])) > apart(night), "one place by day and night, places at night"


def test_every_visit_has_the_light_of_another_place_s_last_one():
    walk = NIGHT.walk(NIGHT.size.laps)
    starts = np.arange(0, len(walk.views), world.DWELL)
    for place in range(world.PLACES):
        own = starts[walk.views[starts] == place * world.VIEWS_PER_PLACE] % light.CYCLE
        assert len(set(own.tolist())) == len(own)
    later = starts[starts >= light.CYCLE]
    assert (walk.views[later] != walk.views[later - light.CYCLE]).all()
    assert all(event.spot not in world.visible_spots(0) for event in returns(walk))


@torch.no_grad()
def test_the_backbone_answers_through_the_light():
    """With the same signal in the same noise, the answer at midnight is the answer by day, seen at midnight."""
    lit, plain = NIGHT.models(0).backbone, load_backbone()
    lights, words = light.lights(), plain.prompts.shape[2]
    share, veil = lights.clear[MIDNIGHT], lights.veil[MIDNIGHT]
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 1, 16, 8, 8, generator=generator)
    level = 0.5
    by_day = level / (share * (1 - level) + level)  # the same ratio of signal to noise
    prompt = torch.cat([plain.prompts[8], light.moment(MIDNIGHT, words)])[None]
    answers = []
    for model, latents, time, text in (
        (plain, (1 - by_day) * clean + by_day * noise, by_day, plain.prompts[8][None]),
        (lit, (1 - level) * (share * clean + veil) + level * noise, level, prompt),
    ):
        memory = RetrievalMemory(
            RetrievalConfig(context_frames=6, sink_frames=0, memory_frames=0, recency_guard=0, block_frames=1),
            batch=1,
            layers=model.num_layers,
            heads=model.num_heads,
            head_dim=model.head_dim,
            grid=(4, 4),
            device="cpu",
            dtype=torch.float32,
            embedding=AveragePool(),
        )
        memory.begin_block(0, 1)
        timestep = torch.full((1, 1), 1000 * float(time))
        answers.append(model.predict_clean(latents, timestep, model.prepare_prompt(text), memory))
    # Rounding of the timestep and of the division by the share.
    torch.testing.assert_close(answers[1], share * answers[0] + veil, rtol=0, atol=1e-3)


def test_memory_of_the_place_survives_the_night_and_memory_of_the_colour_does_not():
    size = Size(laps=2, videos=2)
    found = {
        policy: bench_memory.do(Job(Cell("night", policy, "given", 0), size, seed=5000))[0].values
        for policy in ("average_pool", "oracle")
    }
    kept = {name: (values["now"] == values["truth"]).mean() for name, values in found.items()}
    assert kept["oracle"] == 1
    assert kept["average_pool"] < 0.8
    assert found["average_pool"]["found"].mean() < 0.5 < found["oracle"]["found"].min()


def test_results_become_a_table_and_a_picture(tmp_path):
    record = bench_memory.Record(tmp_path / "night.json", {"night": Size(2, 2)}, tmp_path)
    walk = NIGHT.walk(2)
    truth = NIGHT.draw(0, 2)
    frames = np.stack([NIGHT.render(walk, np.arange(len(walk.views)), video) for video in truth])
    outcome = NIGHT.measure(walk, truth, True, frames)
    found = np.ones((2, 3))
    for policy in ("sliding_window", "layout", "oracle"):
        values = dict(outcome.values) if policy == "sliding_window" else {**outcome.values, "found": found}
        record.add(Cell("night", policy, "given", 0), bench_memory.Outcome(values, outcome.pictures), 1.0)
    facts = record.facts["tracks"]["night"]
    assert facts["policies"]["oracle"]["given"]["kept"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert facts["policies"]["oracle"]["given"]["kept_by_hour"] == {"noon": 1.0, "evening": 1.0, "night": 1.0}
    assert facts["pairs"]["given"]["oracle - layout"]["found"]["mean"] == 0
    assert "1.000 [1.000, 1.000]" in NIGHT.headline(facts["policies"])
    picture = record.draw("night")
    assert picture is not None and picture.stat().st_size > 20_000


def test_layout_does_not_see_an_even_light():
    latents = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    lit = latents * torch.rand(1, 16, 1, 1).add(0.1) + torch.randn(1, 16, 1, 1)
    before, after = LayoutPool().embed(latents), LayoutPool().embed(lit)
    assert before.shape == (3, 256)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)  # float32 of values up to 4
    assert (AveragePool(4).embed(lit) - AveragePool(4).embed(latents)).abs().max() > 0.1
    assert LayoutPool().embed(torch.zeros(1, 16, 8, 8)).isfinite().all()
    with pytest.raises(ValueError, match="grid must be at least 2, got 1"):
        LayoutPool(grid=1)


def test_the_corpus_of_the_night_is_the_world_s_in_another_light():
    codec = load_codec()
    day, night = (WorldSource(codec, 9, seed=3, night=night).make([4])[0] for night in (False, True))
    assert day[1]["cast"] == night[1]["cast"] and night[1]["source"] == "night"
    lifted = light.lights().lift(night[0], int(night[1]["begin"]))
    torch.testing.assert_close(lifted, day[0], rtol=0, atol=1e-5)  # as above


def test_the_encoders_are_there():
    for name in ENCODERS:
        assert load_night_encoder(name).embed(torch.zeros(1, 16, 8, 8)).shape == (1, 64)
