"""Where to download the public weights, and which of them a folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A published file.

    Attributes:
        repository: on huggingface.co.
        file: path in it.
        size: as text; "about" means computed from the number of parameters.
    """

    repository: str
    file: str
    size: str

    def __str__(self) -> str:
        return f"{self.file} ({self.size})"


@dataclass(frozen=True)
class PublishedFamily:
    """A family of published checkpoints that `CausalWanModel` can run.

    Attributes:
        checkpoint: the published file; None if there is no single one.
        weight_keys: entries of the file that may hold the weights, starting with the one that its authors evaluate.
        lora: the adapter that belongs to it, if any.
        repository: with the text encoder, tokenizer and VAE that belong to it.
        settings: of the video, by the names of options, that its authors publish where they are not the defaults.
        image_is_a_frame: whether it goes on from a picture as the first latent frame, within the first block.
    """

    checkpoint: Source | None
    weight_keys: tuple[str, ...]
    lora: Source | None = None
    repository: str = "Wan-AI/Wan2.1-T2V-1.3B"
    settings: Mapping[str, object] = field(default_factory=dict)
    image_is_a_frame: bool = False


WAN_5B = "Wan-AI/Wan2.2-TI2V-5B"
BACKBONES = {
    "self-forcing": PublishedFamily(
        Source("gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt", "about 5.7 GB"),
        ("generator_ema", "generator", "model"),
    ),
    "causal-forcing": PublishedFamily(
        Source("zhuhz22/Causal-Forcing", "chunkwise/causal_forcing.pt", "about 5.7 GB"),
        ("generator", "generator_ema", "model"),
    ),
    "longlive": PublishedFamily(
        Source("Efficient-Large-Model/LongLive-1.3B", "models/longlive_base.pt", "about 5.7 GB"),
        ("generator", "generator_ema", "model"),
        Source("Efficient-Large-Model/LongLive-1.3B", "models/lora.pt", "about 1.4 GB"),
    ),
    "longlive2": PublishedFamily(
        Source("Efficient-Large-Model/LongLive-2.0-5B", "model_bf16.pt", "about 10 GB"),
        ("generator", "generator_ema", "model"),
        repository=WAN_5B,
        settings={
            "height": 704,
            "width": 1280,
            "fps": 24.0,
            "solver": "unipc",
            "denoising_steps": (999.0, 749.25, 499.5, 249.75),
            "context_frames": 32,
            "sink_frames": 8,
            "block_frames": 8,
            "positions": "absolute",
        },
        image_is_a_frame=True,
    ),
    "wan": PublishedFamily(None, ("generator_ema", "generator", "model", "state_dict")),
}

_VAES = {"Wan-AI/Wan2.1-T2V-1.3B": ("Wan2.1_VAE.pth", "0.5 GB"), WAN_5B: ("Wan2.2_VAE.pth", "about 2.8 GB")}
"""Of each repository: the VAE's file, and its size, that of the 5B model's in float32 by its number of parameters."""


def _sources(repository: str, *, diffusers: bool) -> tuple[Source, Source, Source]:
    """Text encoder, tokenizer and VAE."""
    vae, size = _VAES[repository]
    if diffusers:
        text_size = "11.4 or 22.7 GB" if repository == WAN_5B else "22.7 GB"
        repository = f"{repository}-Diffusers"
        parts = ("text_encoder", text_size), ("tokenizer", "21 MB"), ("vae", size)
    else:
        parts = ("models_t5_umt5-xxl-enc-bf16.pth", "11.4 GB"), ("google/umt5-xxl", "21 MB"), (vae, size)
    text_encoder, tokenizer, autoencoder = (Source(repository, file, size) for file, size in parts)
    return text_encoder, tokenizer, autoencoder


def _repository(folder: Path, backbone: str) -> str:
    """Whose text encoder, tokenizer and VAE the folder is to hold."""
    repository = BACKBONES[backbone].repository
    if backbone != "wan" or (folder / _VAES[repository][0]).exists() or not (folder / _VAES[WAN_5B][0]).exists():
        return repository
    return WAN_5B


@dataclass(frozen=True)
class WanFiles:
    """The parts other than the transformer.

    Attributes:
        text_encoder, vae: a file in Wan's own layout, or a folder in diffusers'.
        tokenizer: a folder.
    """

    text_encoder: Path
    tokenizer: Path
    vae: Path


def find_wan_files(folder: Path, backbone: str = "self-forcing") -> WanFiles:
    """Find text encoder, tokenizer and VAE in a folder of Wan's own or diffusers' layout, without reading them.

    Args:
        backbone: a name of `BACKBONES`. "wan" takes Wan 2.2's VAE where it is the only one.

    Raises:
        FileNotFoundError: one is missing; the message says which one, where to download it, and its size.
    """
    diffusers = any((folder / part).exists() for part in ("model_index.json", "text_encoder", "vae"))
    sources = _sources(_repository(folder, backbone), diffusers=diffusers)
    missing = [source for source in sources if not (folder / source.file).exists()]
    if missing:
        lacks = (
            f"the Wan folder {folder} lacks" if folder.is_dir() else f"the Wan folder {folder} does not exist; it takes"
        )
        raise FileNotFoundError(f"{lacks} {from_where(missing, folder)}")
    return WanFiles(*(folder / source.file for source in sources))


def find_tiny_decoder(folder: Path, backbone: str = "self-forcing") -> Path:
    """The tiny decoder in a Wan folder: taew2_2 for Wan 2.2's 5B, taew2_1 otherwise.

    Raises:
        FileNotFoundError: there is none; the message says where it is published.
    """
    stem = "taew2_2" if _repository(folder, backbone) == WAN_5B else "taew2_1"
    names = (f"{stem}.safetensors", f"{stem}.pth")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"decoder tiny needs {' or '.join(names)} (about 45 MB) in {folder}; it is published at "
            f"https://github.com/madebyollin/taehv"
        )
    return found


def find_checkpoint(backbone: str, checkpoint: Path | None) -> Path:
    """The transformer's checkpoint, if it exists.

    Raises:
        FileNotFoundError: it does not; the message says where to download the published one, and its size.
        ValueError: none was given.
    """
    published = BACKBONES[backbone].checkpoint
    where = f"; {backbone} takes {from_where([published], Path('.'))}" if published else ""
    if checkpoint is None:
        raise ValueError(f"checkpoint must name the transformer's weights, got none{where}")
    if not checkpoint.exists():
        raise FileNotFoundError(f"checkpoint {checkpoint} does not exist{where}")
    return checkpoint


def from_where(sources: list[Source], folder: Path) -> str:
    """Files of one repository with their sizes, and the command that downloads them into `folder`."""
    repository = sources[0].repository
    # hf download takes a pattern for a part that is a folder in the repository.
    patterns = " ".join(source.file if Path(source.file).suffix else f"'{source.file}/*'" for source in sources)
    files = ", ".join(map(str, sources))
    return (
        f"{files} from https://huggingface.co/{repository}: "
        f"hf download {repository} --include {patterns} --local-dir {folder}"
    )
