"""A Wan folder with tiny random parts, in the public layouts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

TRACES = Path(__file__).resolve().parents[1] / "generation" / "traces"
WORDS = ["<pad>", "</s>", "<unk>", "a", "panda", "plays", "the", "guitar", "in", "rain", "cat", "walks"]


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of words that ends a prompt with </s>, as UMT5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def trace(name: str, prefix: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters (float32) and the other tensors of a recorded trace."""
    tensors = load_file(TRACES / f"{name}.safetensors")
    state = {key.removeprefix(prefix): value.float() for key, value in tensors.items() if key.startswith(prefix)}
    return state, {key: value for key, value in tensors.items() if not key.startswith(prefix)}


def save_original_folder(folder: Path) -> None:
    """Text encoder, tokenizer and VAE as in Wan-AI/Wan2.1-T2V-1.3B."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(trace("wan_text_encoder", "t5.")[0], folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(trace("wan_vae", "vae.")[0], folder / "Wan2.1_VAE.pth")
    save_tokenizer(folder / "google" / "umt5-xxl")


def save_5b_folder(folder: Path) -> None:
    """Text encoder, tokenizer and VAE as in Wan-AI/Wan2.2-TI2V-5B."""
    save_original_folder(folder)
    (folder / "Wan2.1_VAE.pth").unlink()
    torch.save(trace("wan22_vae", "vae.")[0], folder / "Wan2.2_VAE.pth")


def save_diffusers_folder(folder: Path) -> None:
    """The same parts as in Wan-AI/Wan2.1-T2V-1.3B-Diffusers."""
    from longlive_rag.generation.text_encoder import PromptEncoder
    from longlive_rag.generation.wan_files import find_wan_files
    from longlive_rag.generation.wan_vae import load_vae

    save_original_folder(folder / "original")
    files = find_wan_files(folder / "original")
    PromptEncoder(files, device="cpu", dtype=torch.float32).encoder.save_pretrained(folder / "text_encoder")
    load_vae(files, device="cpu", dtype=torch.float32).save_pretrained(folder / "vae")
    save_tokenizer(folder / "tokenizer")
