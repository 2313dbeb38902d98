"""Public checkpoint layouts: all load to the same model, and what does not fit is named."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longlive_rag.models import CausalWanModel
from longlive_rag.models.checkpoints import load_causal_wan, wan_name

SIZES: dict[str, Any] = {
    "dim": 128, "ffn_dim": 48, "freq_dim": 32, "text_dim": 24, "text_len": 512, "num_heads": 1, "num_layers": 2
}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return {name: torch.randn_like(tensor) for name, tensor in CausalWanModel(**SIZES).state_dict().items()}


def assert_same(model: CausalWanModel, state: dict[str, torch.Tensor]) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


def in_diffusers_layout(name: str) -> str:
    """Written from diffusers' published parameter names, the other way round than the loader."""
    replacements = [
        (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
        (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
        (r"^time_projection\.1", "condition_embedder.time_proj"),
        (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
        (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
        (r"^head\.head", "proj_out"),
        (r"^head\.modulation", "scale_shift_table"),
        (r"self_attn\.([qkv])\.", r"attn1.to_\1."),
        (r"cross_attn\.([qkv])\.", r"attn2.to_\1."),
        (r"self_attn\.o\.", "attn1.to_out.0."),
        (r"cross_attn\.o\.", "attn2.to_out.0."),
        (r"self_attn\.norm", "attn1.norm"),
        (r"cross_attn\.norm", "attn2.norm"),
        (r"ffn\.0", "ffn.net.0.proj"),
        (r"ffn\.2", "ffn.net.2"),
        (r"norm3", "norm2"),
        (r"^(blocks\.\d+)\.modulation", r"\1.scale_shift_table"),
    ]
    for pattern, replacement in replacements:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module.", "_orig_mod.model.", "module."])
@pytest.mark.parametrize("key", [None, "generator", "generator_ema", "model"])
def test_pt_files_load_under_every_key_and_prefix(tmp_path, state, prefix, key):
    content = {
        prefix + name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): t for name, t in state.items()
    }
    torch.save(content if key is None else {key: content, "step": 700}, tmp_path / "model.pt")
    assert_same(load_causal_wan(tmp_path / "model.pt", dtype=torch.float32), state)


def test_preferred_key_wins(tmp_path, state):
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"generator": state, "generator_ema": other}, tmp_path / "model.pt")
    path = tmp_path / "model.pt"
    assert_same(load_causal_wan(path, dtype=torch.float32), other)
    assert_same(load_causal_wan(path, weight_keys=["generator"], dtype=torch.float32), state)


def test_old_pickled_files_load(tmp_path, state):
    torch.save(state, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    assert_same(load_causal_wan(tmp_path / "model.pth", dtype=torch.float32), state)


def test_wan_folder_with_shards_and_config_loads(tmp_path, state):
    # Two heads of 64, which only the config can tell.
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, "text_len": 40, "eps": 1e-5}))
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: state[name] for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    model = load_causal_wan(tmp_path, dtype=torch.float32)
    assert_same(model, state)
    assert (model.num_heads, model.text_len, model.eps) == (2, 40, 1e-5)

    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks b\.safetensors"):
        load_causal_wan(tmp_path)


def test_diffusers_layout_loads(tmp_path, state):
    save_file({in_diffusers_layout(name): tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert_same(load_causal_wan(tmp_path / "model.safetensors", dtype=torch.float32), state)


def test_diffusers_model_loads_and_agrees(tmp_path):
    """One block that holds the whole video, all frames at one timestep, is the bidirectional Wan transformer."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from longlive_rag import RetrievalConfig, RetrievalMemory
    from longlive_rag.embedding import AveragePool

    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=20,
        freq_dim=32,
        ffn_dim=56,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path)
    model = load_causal_wan(tmp_path, dtype=torch.float32)
    assert (model.num_heads, model.head_dim) == (2, 24)

    frames, height, width = 3, 6, 8
    latents, text = torch.randn(2, frames, 16, height, width), torch.randn(2, 512, 20)
    config = RetrievalConfig(3, 0, 0, 0, frames, positions="absolute")
    memory = RetrievalMemory(
        config,
        batch=2,
        layers=2,
        heads=2,
        head_dim=24,
        grid=(3, 4),
        device="cpu",
        dtype=torch.float32,
        embedding=AveragePool(),
    )
    memory.begin_block(0, frames)
    timestep = torch.tensor([700.0, 250.0])
    with torch.no_grad():
        ours = model(latents, timestep, model.prepare_prompt(text), memory)
        expected = theirs(latents.transpose(1, 2), timestep, text, return_dict=False)[0].transpose(1, 2)
    assert (ours - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("name", ["blocks.1.self_attn.norm_k.weight", "head.modulation", "blocks.0.ffn.0.weight"])
def test_missing_weight_is_named(tmp_path, state, name):
    save_file({key: tensor for key, tensor in state.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"lacks {re.escape(name)}"):
        load_causal_wan(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["blocks.1.self_attn.extra.weight", "img_emb.proj.0.weight", "blocks.7.extra"])
def test_extra_weight_is_named(tmp_path, state, name):
    torch.save({"generator": {**state, name: torch.zeros(2)}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"holds {re.escape(name)}, which the model does not have"):
        load_causal_wan(tmp_path / "model.pt")


def test_wrong_shape_is_named(tmp_path, state):
    save_file({**state, "blocks.1.ffn.2.bias": torch.zeros(64)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.2\.bias must be \[128\] by the other weights, got \[64\]"):
        load_causal_wan(tmp_path / "model.safetensors")


def test_weight_under_two_names_is_refused(tmp_path, state):
    torch.save({**state, "model.head.modulation": state["head.modulation"]}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"head\.modulation twice"):
        load_causal_wan(tmp_path / "model.pt")


class NotATensor:
    """Something that a checkpoint must not be able to bring in."""


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_unreadable_files_are_refused(tmp_path, state, suffix):
    path = tmp_path / f"model{suffix}"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_causal_wan(path)
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=rf"model{re.escape(suffix)} cannot be read"):
        load_causal_wan(path)


def test_files_that_hold_no_tensors_are_refused(tmp_path):
    torch.save({"generator": {"a": 1}}, tmp_path / "numbers.pt")
    with pytest.raises(ValueError, match=r"must hold tensors.*got a"):
        load_causal_wan(tmp_path / "numbers.pt")
    torch.save({"generator": NotATensor()}, tmp_path / "object.pt")
    with pytest.raises(ValueError, match=r"object\.pt cannot be read as a checkpoint of tensors"):
        load_causal_wan(tmp_path / "object.pt")
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a \.safetensors"):
        load_causal_wan(tmp_path / "model.ckpt")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_causal_wan(tmp_path)


LORA_TARGETS = ["blocks.0.self_attn.q", "blocks.1.ffn.2", "blocks.1.cross_attn.o"]


def lora_for(state, suffix=".weight", prefix="base_model.model."):
    rank = 4
    matrices = {}
    for target in LORA_TARGETS:
        out, inner = state[f"{target}.weight"].shape
        matrices[f"{prefix}{target}.lora_A{suffix}"] = torch.randn(rank, inner)
        matrices[f"{prefix}{target}.lora_B{suffix}"] = torch.randn(out, rank)
    return matrices


@pytest.mark.parametrize(
    ("suffix", "prefix"), [(".weight", "base_model.model."), (".default.weight", "diffusion_model.")]
)
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_lora_is_merged(tmp_path, state, suffix, prefix, alpha):
    matrices = lora_for(state, suffix, prefix)
    torch.save({"generator": state}, tmp_path / "base.pt")
    torch.save({"generator_lora": matrices}, tmp_path / "lora.pt")
    model = load_causal_wan(tmp_path / "base.pt", lora=tmp_path / "lora.pt", lora_alpha=alpha, dtype=torch.float32)
    expected = dict(state)
    for target in LORA_TARGETS:
        up, down = (matrices[f"{prefix}{target}.{part}{suffix}"] for part in ("lora_B", "lora_A"))
        expected[f"{target}.weight"] = state[f"{target}.weight"] + (1 if alpha is None else alpha / 4) * (up @ down)
    # The merge multiplies matrices mapped from the file, at addresses for which the CPU's library may add up in another
    # order: five terms, the base's and those of rank 4.
    rounding, loaded = 5 * torch.finfo(torch.float32).eps, model.state_dict()
    for name in (f"{target}.weight" for target in LORA_TARGETS):
        merged = expected.pop(name)
        torch.testing.assert_close(loaded[name], merged, rtol=0, atol=rounding * float(merged.abs().max()))
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def test_lora_that_does_not_fit_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "base.pt")

    def load(matrices):
        torch.save(matrices, tmp_path / "lora.pt")
        load_causal_wan(tmp_path / "base.pt", lora=tmp_path / "lora.pt")

    matrices = lora_for(state)
    with pytest.raises(ValueError, match=r"adapts blocks\.9\.self_attn\.q\.weight, which the checkpoint"):
        load({name.replace("blocks.0", "blocks.9"): tensor for name, tensor in matrices.items()})
    first = next(iter(matrices))
    with pytest.raises(ValueError, match=r"lacks lora_A of blocks\.0\.self_attn\.q"):
        load({name: tensor for name, tensor in matrices.items() if name != first})
    with pytest.raises(ValueError, match=r"must multiply to \[128, 128\]"):
        load({**matrices, first: torch.zeros(4, 64)})
    with pytest.raises(ValueError, match=r"peft's names, got blocks\.0\.lora_down"):
        load({"blocks.0.lora_down": torch.zeros(2, 2)})


def test_names_of_both_layouts_meet(state):
    assert {wan_name(in_diffusers_layout(name)) for name in state} == set(state)
