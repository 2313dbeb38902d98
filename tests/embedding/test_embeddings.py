"""Embeddings and the files they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from longlive_rag.embedding import AveragePool, LatentAutoencoder


def autoencoder() -> LatentAutoencoder:
    torch.manual_seed(0)
    return LatentAutoencoder(in_channels=16, height=12, width=16, embedding_dim=32, hidden_dims=(16, 32)).eval()


def test_average_pool() -> None:
    latents = torch.randn(3, 16, 6, 8)
    torch.testing.assert_close(AveragePool().embed(latents), latents.mean(dim=(2, 3)))
    grid = AveragePool(grid=2).embed(latents)
    assert grid.shape == (3, 64)
    torch.testing.assert_close(grid.unflatten(1, (16, 2, 2))[:, :, 0, 1], latents[:, :, :3, 4:].mean(dim=(2, 3)))
    with pytest.raises(ValueError, match="at least 7 x 7"):
        AveragePool(grid=7).embed(latents)
    with pytest.raises(ValueError, match="grid must be at least 1"):
        AveragePool(grid=0)


def test_autoencoder_embeds_on_the_unit_sphere_and_reconstructs_the_size() -> None:
    model = autoencoder()
    latents = torch.randn(5, 16, 12, 16)
    embeddings = model.embed(latents)
    assert embeddings.shape == (5, 32)
    torch.testing.assert_close(torch.linalg.vector_norm(embeddings, dim=1), torch.ones(5))
    reconstruction, raw = model(latents)
    assert reconstruction.shape == latents.shape
    torch.testing.assert_close(F.normalize(raw, dim=1), embeddings)
    with pytest.raises(ValueError, match=r"latents must be \[N, 16, H, W\], got \[5, 8, 12, 16\]"):
        model.embed(latents[:, :8])


@pytest.mark.parametrize("size", [(12, 16), (60, 104), (30, 53)])
def test_sizes_that_do_not_halve_evenly(size: tuple[int, int]) -> None:
    model = LatentAutoencoder(in_channels=4, height=size[0], width=size[1], embedding_dim=8, hidden_dims=(8, 8, 8))
    assert model(torch.randn(1, 4, *size))[0].shape == (1, 4, *size)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoints_round_trip(tmp_path: Path, suffix: str) -> None:
    model, path = autoencoder(), tmp_path / f"encoder{suffix}"
    model.save(path)
    loaded = LatentAutoencoder.from_checkpoint(path)
    latents = torch.randn(2, 16, 12, 16)
    assert torch.equal(loaded.embed(latents), model.embed(latents))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_released_format_has_more_in_its_config(tmp_path: Path) -> None:
    """The published trainer stores its whole configuration beside the sizes."""
    model = autoencoder()
    config = {**model.config, "lr": 3e-4, "epochs": 400, "tag": "", "use_amp": True}
    torch.save({"model": model.state_dict(), "config": config, "epoch": 400}, tmp_path / "released.pt")
    assert LatentAutoencoder.from_checkpoint(tmp_path / "released.pt").config == model.config


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model, good = autoencoder(), tmp_path / "good.pt"
    model.save(good)
    content = good.read_bytes()
    cases = {
        "truncated.pt": (content[: len(content) // 2], "cannot be read as a checkpoint"),
        "empty.pt": (b"", "cannot be read as a checkpoint"),
        "text.safetensors": (b"not tensors at all", "cannot be read as safetensors"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            LatentAutoencoder.from_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no autoencoder checkpoint at"):
        LatentAutoencoder.from_checkpoint(tmp_path / "absent.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match='a dict with "model" and "config", got list'):
        LatentAutoencoder.from_checkpoint(tmp_path / "list.pt")


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    autoencoder().save(path)
    tensors = load_file(path)
    del tensors["encoder.fc.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="config lacks in_channels"):
        LatentAutoencoder.from_checkpoint(path)
    state = autoencoder().state_dict()
    del state["encoder.fc.bias"]
    torch.save({"model": state, "config": autoencoder().config}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"encoder\.fc\.bias"):
        LatentAutoencoder.from_checkpoint(tmp_path / "short.pt")
