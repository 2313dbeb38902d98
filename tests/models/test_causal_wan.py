"""Our transformer has the public checkpoints' parameters, and does what each of its arguments says."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_rag.models import CausalWanModel


def public_shapes(
    dim: int, ffn_dim: int, freq_dim: int, text_dim: int, layers: int, channels: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a public Wan 2.1 text-to-video checkpoint."""

    def linear(name: str, out: int, inside: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}

    shapes = {"patch_embedding.weight": (dim, channels, 1, 2, 2), "patch_embedding.bias": (dim,)}
    shapes |= linear("text_embedding.0", dim, text_dim) | linear("text_embedding.2", dim, dim)
    shapes |= linear("time_embedding.0", dim, freq_dim) | linear("time_embedding.2", dim, dim)
    shapes |= linear("time_projection.1", 6 * dim, dim)
    for layer in range(layers):
        block = f"blocks.{layer}"
        for attention in ("self_attn", "cross_attn"):
            for projection in "qkvo":
                shapes |= linear(f"{block}.{attention}.{projection}", dim, dim)
            shapes |= {f"{block}.{attention}.norm_{which}.weight": (dim,) for which in "qk"}
        shapes |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,)}
        shapes |= linear(f"{block}.ffn.0", ffn_dim, dim) | linear(f"{block}.ffn.2", dim, ffn_dim)
        shapes |= {f"{block}.modulation": (1, 6, dim)}
    return shapes | linear("head.head", 4 * channels, dim) | {"head.modulation": (1, 2, dim)}


@pytest.mark.parametrize(
    ("size", "dim", "ffn_dim", "layers", "billions"), [("1.3B", 1536, 8960, 30, 1.42), ("14B", 5120, 13824, 40, 14.29)]
)
def test_parameters_are_those_of_the_public_checkpoints(
    size: str, dim: int, ffn_dim: int, layers: int, billions: float
) -> None:
    with torch.device("meta"):
        model = CausalWanModel.from_size(size)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == public_shapes(dim, ffn_dim, 256, 4096, layers, 16)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_unknown_size_and_bad_widths_are_named() -> None:
    with pytest.raises(ValueError, match=r"size must be one of 1.3B, 5B, 14B, got '2B'"):
        CausalWanModel.from_size("2B")
    with pytest.raises(ValueError, match="dim=30, num_heads=4"):
        CausalWanModel(dim=30, num_heads=4)
    with pytest.raises(ValueError, match="patch_size must keep latent frames apart"):
        CausalWanModel(patch_size=(2, 2, 2))


class Alone:
    """Attention of every token to itself: frames and tokens cannot mix."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **norm: object) -> Tensor:
        return v.flatten(1, 2)


def tiny(channels: int = 4) -> CausalWanModel:
    torch.manual_seed(0)
    return CausalWanModel(
        dim=32, ffn_dim=48, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=2, in_dim=channels,
        out_dim=channels,
    ).eval()  # fmt: skip


@torch.no_grad()
def test_each_patch_goes_where_it_came_from() -> None:
    """With attention that mixes nothing, changing one patch of one frame changes that patch and no other."""
    model = tiny()
    prompt = model.prepare_prompt(torch.randn(1, 4, 8))
    latents = torch.randn(1, 3, 4, 6, 8)
    changed = latents.clone()
    changed[0, 1, :, 2:4, 4:6] += 1
    timestep = torch.tensor([[900.0, 500.0, 0.0]])
    moved = (model(changed, timestep, prompt, Alone()) - model(latents, timestep, prompt, Alone())).abs().amax(dim=2)
    assert bool((moved[0, 1, 2:4, 4:6] > 0).all())
    moved[0, 1, 2:4, 4:6] = 0
    assert moved.max() == 0


@torch.no_grad()
def test_every_frame_has_its_own_timestep() -> None:
    model = tiny()
    prompt = model.prepare_prompt(torch.randn(2, 4, 8))
    latents = torch.randn(2, 3, 4, 4, 4)
    times = torch.tensor([[900.0, 500.0, 0.0], [100.0, 200.0, 300.0]])
    together = model(latents, times, prompt, Alone())
    for frame in range(3):
        alone = model(latents[:, frame : frame + 1], times[:, frame], prompt, Alone())
        torch.testing.assert_close(together[:, frame : frame + 1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_short_prompt_is_padded_with_zeros() -> None:
    model = tiny()
    embeds = torch.randn(1, 2, 8)
    short, padded = model.prepare_prompt(embeds), model.prepare_prompt(F.pad(embeds, (0, 0, 0, 2)))
    assert all(
        torch.equal(a, b) for one, other in zip(short, padded, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_weights_keep_the_dtype_of_the_latents(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    prompt = model.prepare_prompt(torch.randn(1, 4, 8))
    out = model(torch.randn(1, 1, 4, 4, 4), torch.tensor([500.0]), prompt, Alone())
    assert out.dtype == torch.float32
    assert bool(out.isfinite().all())


@torch.no_grad()
def test_fused_projections_are_the_same_model() -> None:
    model, latents, timestep = tiny(), torch.randn(1, 2, 4, 4, 4), torch.tensor([500.0])
    prompt = model.prepare_prompt(torch.randn(1, 4, 8))
    fused = copy.deepcopy(model)
    fused.fuse()
    fused.fuse()  # once is enough
    assert "blocks.0.self_attn.qkv.weight" in dict(fused.named_parameters())
    expected = model(latents, timestep, prompt, Alone())
    # One product of 96 columns in place of three of 32: the same sums, perhaps in another order.
    torch.testing.assert_close(fused(latents, timestep, prompt, Alone()), expected, rtol=1e-5, atol=1e-6)
    assert fused(latents, timestep, prompt, Alone()).equal(copy.deepcopy(fused)(latents, timestep, prompt, Alone()))


@torch.no_grad()
def test_a_state_dict_does_not_know_whether_projections_are_fused() -> None:
    model = tiny()
    fused = copy.deepcopy(model)
    fused.fuse()
    state = model.state_dict()
    assert fused.state_dict().keys() == state.keys()
    assert all(torch.equal(fused.state_dict()[name], tensor) for name, tensor in state.items())
    changed = {name: tensor + 1 for name, tensor in state.items()}
    names = set(changed)
    for assign in (False, True):
        fused.load_state_dict(changed, assign=assign)
        assert set(changed) == names  # the caller's own stays whole
        assert all(torch.equal(fused.state_dict()[name], tensor) for name, tensor in changed.items())
        changed = {name: tensor + 1 for name, tensor in changed.items()}
    assert {tensor.dtype for tensor in fused.to(torch.bfloat16).state_dict().values()} == {torch.bfloat16}
    del changed["blocks.1.self_attn.k.bias"]
    with pytest.raises(RuntimeError, match=r"blocks\.1\.self_attn"):
        fused.load_state_dict(changed)
