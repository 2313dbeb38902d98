"""What the backbone is trained on is what the roll-out computes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import longlive_rag
import train_backbone
import train_codec
import training_data
from joint_attention import JointAttention
from longlive_rag import rotary
from longlive_rag.context import UNUSED, ContextPlan
from longlive_rag.memory import RetrievalMemory
from longlive_rag.selection import OracleSelection
from longlive_rag.small_world import world
from longlive_rag.small_world.backbone import SmallBackbone, load_backbone, load_codec, load_encoder
from longlive_rag.small_world.policies import POLICIES
from training_data import CHUNK, COLUMNS, NOISY, LatentWorld

EXAMPLE = Path(__file__).parents[2] / "examples" / "small_world"


@pytest.fixture(scope="module")
def latent_world() -> LatentWorld:
    return LatentWorld(load_codec())


def chosen_frames(start: int, batch: int) -> list[list[int]]:
    generator = np.random.default_rng(start)
    return [generator.permutation(np.arange(1, start))[:8].tolist() for _ in range(batch)]


@pytest.mark.parametrize("name", ["sliding_window", "sink_window", "oracle"])
@torch.no_grad()
def test_joint_attention_equals_the_cached_rollout(name):
    torch.manual_seed(0)
    model, config, batch = SmallBackbone(dim=64, ffn_dim=64, num_heads=1, num_layers=3), POLICIES[name].config, 2
    clean, noisy = torch.randn(2, batch, CHUNK, 16, 8, 8)
    views = torch.randint(world.VIEWS, (batch, CHUNK))
    memory = RetrievalMemory(
        config,
        batch=batch,
        layers=model.num_layers,
        heads=model.num_heads,
        head_dim=model.head_dim,
        grid=(4, 4),
        device="cpu",
        dtype=torch.float32,
        embedding=load_encoder(),
        selection=OracleSelection(chosen_frames),
    )
    context = torch.zeros(batch, CHUNK, COLUMNS, dtype=torch.long)
    distance, used = torch.zeros_like(context), torch.zeros_like(context, dtype=torch.bool)
    cached: dict[float, list[torch.Tensor]] = {0.0: [], 625.0: []}
    for start in range(CHUNK):
        prompt = model.prepare_prompt(model.prompts[views[:, start]])
        memory.begin_block(start, 1)
        for timestep, latents in ((625.0, noisy), (0.0, clean)):  # the clean pass is a block's last
            time = torch.full((batch, 1), timestep)
            cached[timestep].append(model.predict_clean(latents[:, start : start + 1], time, prompt, memory))
        memory.commit(clean[:, start : start + 1])
        plan = ContextPlan(config, start, 1)
        frames, positions = plan.fixed_entries()
        entries = [
            (f, plan.query_positions()[0] - p)
            for f, p in zip(frames, positions, strict=True)
            if f not in (UNUSED, start)
        ]
        for video in range(batch):
            recalled = [f for f in chosen_frames(start, batch)[video] if f in plan.candidates][: config.memory_frames]
            row = entries + [(f, plan.query_positions()[0]) for f in recalled]
            for column, (frame, apart) in enumerate(row):
                context[video, start, column], distance[video, start, column] = frame, apart
                used[video, start, column] = True
    attention = JointAttention(
        context,
        distance,
        used,
        rotary.spatial_rotation(4, 4, model.head_dim),
        rotary.temporal_frequencies(model.head_dim),
    )
    time = torch.tensor([0.0, 625.0])[None, :, None].expand(batch, -1, CHUNK).reshape(-1, 1)
    rows = views[:, None].expand(-1, 2, -1).flatten()
    prompt = [(k[rows], v[rows]) for k, v in model.prepare_prompt(model.prompts)]
    latents = torch.stack([clean, noisy], dim=1).flatten(0, 2)[:, None]
    joint = model.predict_clean(latents, time, prompt, attention).view(batch, 2, CHUNK, 16, 8, 8)
    for stream, timestep in enumerate(cached):
        expected = torch.cat(cached[timestep], dim=1)
        assert (joint[:, stream] - expected).norm() / expected.norm() < 1e-5


def test_composed_latents_equal_the_encoder_s(latent_world):
    generator = np.random.default_rng(0)
    views, phases = generator.integers(0, world.VIEWS, 40), generator.integers(0, world.PHASES, 40)
    cast = world.draw_cast(generator, 40)
    encoded = load_codec().encode(world.render(views, phases, cast))
    cells = latent_world.cell_latents(torch.from_numpy(cast), torch.from_numpy(phases))
    torch.testing.assert_close(latent_world.frames(torch.from_numpy(views), cells), encoded, rtol=0, atol=1e-5)


def test_coupled_noise_names_the_stranger_and_stays_gaussian(latent_world):
    torch.manual_seed(0)
    count, view = 4000, 12
    views = torch.full((count,), view)
    cast = torch.from_numpy(world.draw_cast(np.random.default_rng(0), count))
    strangers = latent_world.shows[views]
    plain = torch.randn(count, 16, 8, 8)
    noise = latent_world.couple(plain, views, cast, strangers)
    strength = torch.einsum("ksd,nd->nks", latent_world.codes[view], noise.flatten(1))
    assert (strength.argmax(dim=2) == cast)[strangers].all()
    assert noise.mean().abs() < 3 / (1024 * count) ** 0.5
    deviation = [(x.flatten(1).T @ x.flatten(1) / count - torch.eye(1024)).abs().max() for x in (noise, plain)]
    assert deviation[0] < 1.1 * deviation[1]
    untouched = latent_world.couple(plain, views, cast, torch.zeros_like(strangers))
    assert torch.equal(untouched, plain)


def test_a_batch_keeps_its_promises(latent_world):
    torch.manual_seed(0)
    batch = training_data.draw_batch(latent_world, np.random.default_rng(0), chunks=6)
    frame = torch.arange(CHUNK)[:, None]
    assert (batch.context < frame)[batch.used].all(), "a frame's context is its past"
    assert batch.latents.shape == (6 * (1 + NOISY) * CHUNK, 1, 16, 8, 8)
    level = batch.timestep.view(6, 1 + NOISY, CHUNK) / 1000
    assert (level[:, 0] == 0).all()
    for value in training_data.noise_levels():
        assert ((level[:, 1:] - value).abs() < 1e-5).any()
    assert torch.isfinite(batch.latents).all() and (batch.weight > 0).all()


def run_example(monkeypatch: pytest.MonkeyPatch, main, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    main()


def test_the_scripts_write_weights_that_load_into_the_folder_they_are_given(tmp_path, monkeypatch):
    output = tmp_path / "new" / "weights"
    run_example(monkeypatch, train_codec.main, "--output", output, "--steps", 2, "--batch", 2)
    codec = output / "codec.safetensors"
    load_codec(codec)
    for resume in ([], ["--resume"]):
        run_example(monkeypatch, train_backbone.main, "--output", output, "--codec", codec, "--steps", 0, *resume)
        load_backbone(output / "backbone.safetensors")
    assert {path.name for path in output.iterdir()} == {
        "codec.safetensors",
        "backbone.safetensors",
        "backbone.state",
    }


def test_the_wheel_holds_no_training_of_the_small_world():
    root, package = EXAMPLE.parents[1], Path(longlive_rag.__file__).parent
    # The wheel is the package's folder and nothing else.
    assert 'wheel.packages = ["python/longlive_rag"]' in (root / "pyproject.toml").read_text()
    scripts = {path.name for path in EXAMPLE.glob("*.py")}
    assert {"train_codec.py", "train_backbone.py"} < scripts
    assert not scripts & {path.name for path in package.rglob("*.py")}
    for path in (package / "small_world").glob("*.py"):
        assert "torch.optim" not in path.read_text(), path
