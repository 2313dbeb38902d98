"""Strict loading of public Wan-family checkpoints into a `CausalWanModel`.

Both Wan's own layout (which Self-Forcing, Causal-Forcing, LongLive and most others keep) and that of diffusers'
``WanTransformer3DModel`` can be read, whole or sharded, with any prefixes that training wrappers leave.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longlive_rag.models.causal_wan import CausalWanModel
from longlive_rag.models.tensor_files import checkpoint_file, read_tensors
from longlive_rag.parallel.shards import Group, own_rows

WEIGHT_KEYS = ("generator_ema", "generator", "model", "state_dict")
LORA_KEYS = ("generator_lora", "lora", "state_dict")

# Of every published Wan model; it cannot be derived from the weights.
_HEAD_DIM = 128
_WRAPPERS = {
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_orig_mod",
    "base_model",
    "diffusion_model",
    "generator",
    "model",
    "module",
    "transformer",
}
_DIFFUSERS_NAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("proj_out", "head.head"),
    ("scale_shift_table", "head.modulation"),
)
# Within a block. The norm between self- and cross-attention, the only one with weights, is Wan's third.
_DIFFUSERS_BLOCK_NAMES = (
    ("attn1.to_out.0", "self_attn.o"),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn1.to_", "self_attn."),
    ("attn2.to_", "cross_attn."),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),
    ("scale_shift_table", "modulation"),
)


def load_causal_wan(
    path: str | Path,
    *,
    weight_keys: Sequence[str] = WEIGHT_KEYS,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    group: Group | None = None,
) -> CausalWanModel:
    """Build the model that a checkpoint holds; its sizes follow from the weights.

    Weights are read one at a time, so that there is never a second copy of the model in memory, and with a group not
    even one. The model is then fused (`CausalWanModel.fuse`), unless its weights are split. The number of heads comes
    from a ``config.json`` next to safetensors; without one, every head is taken to be 128 wide.

    Args:
        path: file, index of shards, or folder; see `tensor_files.checkpoint_file`.
        weight_keys: entries of a `.pt` file to look for, in order of preference.
        lora: adapter to merge, with peft's names (``lora_A``, ``lora_B``).
        lora_alpha: its scale times its rank; default the alpha stored in the file or, if there is none, the rank.
        device, dtype: of the model.
        group: ranks over which the weights are split, all with the same arguments; each holds a share of every tensor,
            and a block's are gathered while it works (FSDP2). All ranks must then run the model together, as `rollout`
            with a group does.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or a weight is missing, unexpected or misshapen; the message names it.
    """
    path = Path(path)
    adapter = _read_lora(Path(lora), lora_alpha) if lora is not None else {}
    state: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}  # shapes only
    for raw_name, tensor in read_tensors(path, weight_keys):
        name = wan_name(raw_name)
        if name in state:
            raise ValueError(f"{path} holds {name} twice, the second time as {raw_name}")
        whole[name] = tensor.to("meta")
        if name in adapter:
            up, down, scale = adapter.pop(name)
            tensor = _merge(name, tensor.to(device), up.to(device), down.to(device), scale)
        if group is not None:
            tensor = own_rows(tensor, group).clone()  # a view would keep the whole
        state[name] = tensor.to(device).to(dtype)
    if adapter:
        raise ValueError(f"{lora} adapts {_some(adapter)}, which the checkpoint {path} does not hold")
    with torch.device("meta"):
        model = CausalWanModel(**_sizes(whole, path))
    if group is None:
        load_strict(model, state, path)
        state.clear()  # so that fusing needs room for one layer's projections, not for all
        model.fuse()
    else:
        from longlive_rag.parallel.weights import load_shares  # torch's FSDP takes long to import

        _check_strict(model, whole, path)
        methods = [(model, "prepare_prompt"), *((block, "prepare_prompt") for block in model.blocks)]
        load_shares(model, state, group, blocks=model.blocks, methods=methods)
    return model.eval().requires_grad_(False)


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Put the tensors of `state` into `model`, without copying them.

    Raises:
        ValueError: one is missing, unexpected or misshapen; the message names it.
    """
    _check_strict(model, state, source)
    model.load_state_dict(state, assign=True)


def _check_strict(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    problems = []
    if missing:
        problems.append(f"lacks {_some(missing)}")
    if extra:
        problems.append(f"holds {_some(extra)}, which the model does not have")
    if problems:
        raise ValueError(f"{source} {' and '.join(problems)}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: {name} must be {list(tensor.shape)} by the other weights, got {list(state[name].shape)}"
            )


def wan_name(name: str) -> str:
    """A parameter's name in Wan's own layout, given its name there or in diffusers' layout, with any wrappers.

    >>> wan_name("model._fsdp_wrapped_module.blocks.3._fsdp_wrapped_module.self_attn.q.weight")
    'blocks.3.self_attn.q.weight'
    >>> wan_name("blocks.3.attn1.to_q.weight")
    'blocks.3.self_attn.q.weight'
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts.pop(0)
    parts = [part for part in parts if not (part.startswith("_") and part in _WRAPPERS)]
    name = ".".join(parts)
    block = re.match(r"blocks\.\d+\.", name)
    start = block.end() if block else 0
    for theirs, ours in _DIFFUSERS_BLOCK_NAMES if block else _DIFFUSERS_NAMES:
        if name.startswith(theirs, start):
            return name[:start] + ours + name[start + len(theirs) :]
    return name


def _sizes(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Arguments of `CausalWanModel`, from the shapes and, if there is one, the config next to the weights."""

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ValueError(f"{path} lacks {name}; it holds {_some(state)}")
        return state[name].shape

    dim, in_dim, *patch_size = shape("patch_embedding.weight")
    # Counted by two names, so that if a checkpoint lacks one of them, the error can still name what it lacks.
    layers = [
        int(match[1]) for name in state if (match := re.fullmatch(r"blocks\.(\d+)\.(ffn\.0|norm3)\.weight", name))
    ]
    config = _config_near(path)
    heads = config.get("num_heads", config.get("num_attention_heads"))
    if heads is None:
        if dim % _HEAD_DIM:
            raise ValueError(
                f"the number of heads of {path} is unknown: there is no config.json next to it, and its width {dim} is "
                f"not a multiple of {_HEAD_DIM}"
            )
        heads = dim // _HEAD_DIM
    return {
        "dim": dim,
        "ffn_dim": shape("blocks.0.ffn.0.weight")[0],
        "freq_dim": shape("time_embedding.0.weight")[1],
        "text_dim": shape("text_embedding.0.weight")[1],
        "text_len": config.get("text_len", 512),
        "num_heads": heads,
        "num_layers": max(layers) + 1,
        "in_dim": in_dim,
        "out_dim": shape("head.head.weight")[0] // math.prod(patch_size),
        "patch_size": tuple(patch_size),
        "eps": config.get("eps", 1e-6),
    }


def _config_near(path: Path) -> dict[str, Any]:
    config = checkpoint_file(path).parent / "config.json"
    # The config.json in the folder of a `.pt` file may belong to anything.
    if not config.is_file() or path.suffix in (".pt", ".pth", ".bin"):
        return {}
    try:
        content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{config} cannot be read as JSON: {error}") from error
    return content


def _read_lora(path: Path, alpha: float | None) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Name of each adapted weight -> up [out, rank], down [rank, in], scale."""
    parts: dict[str, dict[str, Tensor]] = {}
    for raw_name, tensor in read_tensors(path, LORA_KEYS):
        match = re.fullmatch(r"(.+)\.(lora_A|lora_B|alpha)(\.default)?(\.weight)?", raw_name)
        if match is None:
            raise ValueError(f"{path} must hold lora_A and lora_B matrices in peft's names, got {raw_name}")
        parts.setdefault(wan_name(f"{match[1]}.weight"), {})[match[2]] = tensor
    adapter = {}
    for name, matrices in parts.items():
        for part in ("lora_A", "lora_B"):
            if part not in matrices:
                raise ValueError(f"{path} lacks {part} of {name.removesuffix('.weight')}")
        rank = matrices["lora_A"].shape[0]
        stored = matrices["alpha"].item() if "alpha" in matrices else rank
        adapter[name] = (matrices["lora_B"], matrices["lora_A"], (stored if alpha is None else alpha) / rank)
    return adapter


def _merge(name: str, weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    if up.ndim != 2 or down.ndim != 2 or (up.shape[0], down.shape[1]) != weight.shape or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"the LoRA of {name} must multiply to {list(weight.shape)}, got {list(up.shape)} and {list(down.shape)}"
        )
    # In float32: a product of rank 256 summed in bfloat16 would lose what the adapter has learned.
    return weight.float() + scale * (up.float() @ down.float())


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(listed[:4]) + more
