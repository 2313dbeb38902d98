"""Reading and writing the retrieval autoencoder: the released `.pt` format and safetensors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longlive_rag.embedding.autoencoder import LatentAutoencoder
from longlive_rag.files import atomic_path

_SIZES = {
    "in_channels": "in_channels",
    "spatial_h": "height",
    "spatial_w": "width",
    "latent_dim": "embedding_dim",
    "hidden_dims": "hidden_dims",
}


def load_autoencoder(path: Path) -> LatentAutoencoder:
    """See `LatentAutoencoder.from_checkpoint`."""
    if not path.is_file():
        raise FileNotFoundError(f"no autoencoder checkpoint at {path}")
    state, config = _read_safetensors(path) if path.suffix == ".safetensors" else _read_released(path)
    missing = [name for name in _SIZES if name not in config]
    if missing:
        raise ValueError(
            f"{path}: the autoencoder's config lacks {', '.join(missing)}; it has {', '.join(map(str, config))}"
        )
    model = LatentAutoencoder(**{argument: config[name] for name, argument in _SIZES.items()})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return model.eval()


def save_autoencoder(model: LatentAutoencoder, path: Path) -> None:
    """See `LatentAutoencoder.save`."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary, metadata={"config": json.dumps(model.config)})
        else:
            torch.save({"model": state, "config": model.config}, temporary)


def _read_released(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error) or "it ends early").splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(content, dict) or not {"model", "config"} <= content.keys():
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path} must hold a dict with "model" and "config", got {found}')
    return content["model"], content["config"]


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, config
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
