"""Where to download the public weights, and which of them a folder holds."""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    checkpoint: Source | None
    weight_keys: tuple[str, ...]
    lora: Source | None = None


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
    "wan": PublishedFamily(None, ("generator_ema", "generator", "model", "state_dict")),
}

_REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B"
_TEXT_ENCODER = Source(_REPOSITORY, "models_t5_umt5-xxl-enc-bf16.pth", "11.4 GB")
_TOKENIZER = Source(_REPOSITORY, "google/umt5-xxl", "21 MB")
_VAE = Source(_REPOSITORY, "Wan2.1_VAE.pth", "0.5 GB")
_DIFFUSERS_REPOSITORY = f"{_REPOSITORY}-Diffusers"
_DIFFUSERS_TEXT_ENCODER = Source(_DIFFUSERS_REPOSITORY, "text_encoder", "22.7 GB")
_DIFFUSERS_TOKENIZER = Source(_DIFFUSERS_REPOSITORY, "tokenizer", "21 MB")
_DIFFUSERS_VAE = Source(_DIFFUSERS_REPOSITORY, "vae", "0.5 GB")


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


def find_wan_files(folder: Path) -> WanFiles:
    """Find text encoder, tokenizer and VAE in a folder of Wan's own or diffusers' layout, without reading them.

    Raises:
        FileNotFoundError: one is missing; the message says which one, where to download it, and its size.
    """
    diffusers = any((folder / part).exists() for part in ("model_index.json", "text_encoder", "vae"))
    if diffusers:
        sources = (_DIFFUSERS_TEXT_ENCODER, _DIFFUSERS_TOKENIZER, _DIFFUSERS_VAE)
    else:
        sources = (_TEXT_ENCODER, _TOKENIZER, _VAE)
    missing = [source for source in sources if not (folder / source.file).exists()]
    if missing:
        lacks = (
            f"the Wan folder {folder} lacks" if folder.is_dir() else f"the Wan folder {folder} does not exist; it takes"
        )
        raise FileNotFoundError(f"{lacks} {from_where(missing, folder)}")
    return WanFiles(*(folder / source.file for source in sources))


_TINY_DECODERS = ("taew2_1.safetensors", "taew2_1.pth")


def find_tiny_decoder(folder: Path) -> Path:
    """The tiny decoder in a Wan folder.

    Raises:
        FileNotFoundError: there is none; the message says where it is published.
    """
    found = next((folder / name for name in _TINY_DECODERS if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"decoder tiny needs {' or '.join(_TINY_DECODERS)} (about 45 MB) in {folder}; it is published at "
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
