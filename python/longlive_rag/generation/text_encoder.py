"""Prompts to embeddings: UMT5 as Wan uses it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longlive_rag.generation.wan_files import WanFiles
from longlive_rag.models.checkpoints import load_strict
from longlive_rag.models.tensor_files import read_tensors

_TEXT_LENGTH = 512

# Wan's own layout; in a block, below.
_WAN_NAMES = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_WAN_BLOCK_NAMES = {
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


class PromptEncoder:
    """UMT5 encoder and tokenizer.

    Args:
        files: of a Wan folder, Wan's own layout or diffusers'.
        device, dtype: of the encoder; 5.7 billion parameters in the published one.

    Raises:
        ValueError: the files do not hold a UMT5 encoder.
    """

    def __init__(self, files: WanFiles, *, device: torch.device | str, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer, UMT5EncoderModel

        self.tokenizer = AutoTokenizer.from_pretrained(files.tokenizer, local_files_only=True)
        # Converted while it is read, since the published float32 file is twice the size of the model in bfloat16.
        tensors = read_tensors(files.text_encoder)
        state = {_umt5_name(name): tensor.to(device, dtype) for name, tensor in tensors}
        config = _config(files.text_encoder, state)
        with torch.device("meta"):
            self.encoder = UMT5EncoderModel(config)
        # The embedding table has two names, and files hold it under either or both.
        shared = "shared.weight" if "shared.weight" in state else "encoder.embed_tokens.weight"
        if shared in state:
            state["shared.weight"] = state["encoder.embed_tokens.weight"] = state[shared]
        load_strict(self.encoder, state, files.text_encoder)
        self.encoder.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        width: int = self.encoder.config.d_model
        return width

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Embeddings of a prompt, one per token, [up to 512, width]; a longer prompt is truncated."""
        tokens = self.tokenizer(clean_prompt(prompt), truncation=True, max_length=_TEXT_LENGTH, return_tensors="pt")
        tokens = tokens.to(self.encoder.device)
        # Without padding, since masked tokens do not affect the others' embeddings.
        return self.encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]


def clean_prompt(prompt: str) -> str:
    """Repair broken Unicode, resolve HTML entities and collapse white space, as Wan does before tokenising."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def _umt5_name(name: str) -> str:
    """A parameter's name in transformers' layout, given its name there or in Wan's own."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    if match and match[2] in _WAN_BLOCK_NAMES:
        return f"encoder.block.{match[1]}.{_WAN_BLOCK_NAMES[match[2]]}.weight"
    return _WAN_NAMES.get(name, name)


def _config(path: Path, state: dict[str, Tensor]) -> Any:
    """The UMT5 config: the folder's or, for Wan's single file, derived from the weights."""
    from transformers import UMT5Config

    if path.is_dir():
        try:
            return UMT5Config(**json.loads((path / "config.json").read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} has no readable config.json: {error}") from error
    block = "encoder.block.0.layer"
    query, bias = f"{block}.0.SelfAttention.q.weight", f"{block}.0.SelfAttention.relative_attention_bias.weight"
    gate = f"{block}.1.DenseReluDense.wi_0.weight"
    for name in ("shared.weight", query, bias, gate):
        if name not in state:
            raise ValueError(f"{path} holds no UMT5 encoder: it lacks {name}")
    buckets, heads = state[bias].shape
    return UMT5Config(
        vocab_size=state["shared.weight"].shape[0],
        d_model=state["shared.weight"].shape[1],
        d_kv=state[query].shape[0] // heads,
        d_ff=state[gate].shape[0],
        num_layers=1 + max(int(match[1]) for match in _blocks(state)),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


def _blocks(state: dict[str, Tensor]) -> Iterator[re.Match[str]]:
    for name in state:
        if match := re.match(r"encoder\.block\.(\d+)\.", name):
            yield match
