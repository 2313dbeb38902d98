"""pack and unpack: the pages of one frame, of all layers, as codes of 8 or 4 bits with their scales, and back."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longlive_rag.ops import _cuda
from longlive_rag.ops._library import FLOATING, Check, check_no_grad, define

Bits = Literal[8, 4]

TILE = {8: 24, 4: 16}
"""Tokens that share the scale of a channel, by bits; 24 divides the 1560 and 3600 tokens of Wan's frames."""
LARGEST = {8: 127, 4: 7}
"""Largest code, by bits; the smallest one is its negative."""
SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32, whose inverse is finite."""
ALIGNMENT = 16
"""Every layer's bytes begin at a multiple of this."""

_pack_check, _unpack_check = Check("pack", first="k_pages[0]"), Check("unpack", first="k_pages[0]")


class _Parts(NamedTuple):
    """Where the parts of a layer's bytes begin; codes of K at 0."""

    v_codes: int
    k_scales: int
    v_scales: int
    padding: int
    end: int


def packed_bytes(layers: int, heads: int, tokens: int, head_dim: int, bits: Bits) -> int:
    """Bytes of one packed frame, whatever the dtype of its pages.

    At 8 bits, 150.9 MB for a frame of Wan 1.3B at 480 x 832 (bfloat16 pages: 287.5 MB), at 4 bits 89.9 MB.
    """
    _check_bits("packed_bytes", bits, head_dim)
    return layers * _parts(heads, tokens, head_dim, bits).end


def layer_slice(layer: int, heads: int, tokens: int, head_dim: int, bits: Bits) -> slice:
    """Where the bytes of one layer are. They stand alone: `unpack` takes them with the pages of that layer."""
    size = packed_bytes(1, heads, tokens, head_dim, bits)
    return slice(layer * size, (layer + 1) * size)


def pack(
    k_pages: Sequence[Tensor],  # of each layer, [S, H, T, D]
    v_pages: Sequence[Tensor],  # of each layer, [S, H, T, D]
    slot: int,
    bits: Bits,
    out: Tensor | None = None,  # [packed_bytes(layers, H, T, D, bits)] uint8
) -> Tensor:
    """Quantise the pages of one slot, in one launch for all layers (of up to 64).

    A number becomes a signed code, ``round(x / scale)``, of at most 127 or 7; numbers that share a scale are a group:
    with 8 bits the keys of one head and channel over a tile of 24 tokens, and the values of one head and token; with 4
    bits keys and values of one head and channel over 16 tokens. The last tile of a frame may be shorter. A scale is the
    group's largest magnitude, divided by the largest code and rounded *up* to bfloat16, so that no code is cut off and
    every finite number comes back with an error of at most half a scale (and its rounding to the pages' dtype). A group
    with a NaN or an infinity comes back as NaN, all of it: what was not finite is never hidden.

    Bytes, layer by layer (`layer_slice`): codes of K and of V [H, T, D], at 4 bits two channels in a byte, the even one
    in the low half; scales of K and of V, [H, tiles, D] or [H, T]; zeros up to a multiple of 16.

    Args:
        k_pages, v_pages: the page pools of each layer.
        slot: the page of the frame.
        bits: 8 or 4.
        out: where to write.

    Returns:
        `out`, or a new tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout, or requires grad.

    Source: groups at 4 bits as in arXiv 2603.27469, whose keys are rotated by time; ours are not.
    """
    layers, heads, tokens, head_dim = _check_pages(_pack_check, k_pages, v_pages, slot, bits)
    size = layers * _parts(heads, tokens, head_dim, bits).end
    if out is None:
        out = k_pages[0].new_empty(size, dtype=torch.uint8)
    _check_packed(_pack_check, "out", out, k_pages[0], size)
    _pack(out, k_pages, v_pages, slot, bits)
    return out


def unpack(
    packed: Tensor,  # [packed_bytes(layers, H, T, D, bits)] uint8
    k_pages: Sequence[Tensor],  # of each layer, [S, H, T, D]
    v_pages: Sequence[Tensor],  # of each layer, [S, H, T, D]
    slot: int,
    bits: Bits,
) -> None:
    """Write the pages of one slot from what `pack` made of them, in one launch for all layers (of up to 64).

    A number is its code times its scale, rounded once to the pages' dtype and never beyond its largest number. The
    pages may have another dtype than those that were packed.

    Raises:
        TypeError, ValueError: as `pack`.
    """
    layers, heads, tokens, head_dim = _check_pages(_unpack_check, k_pages, v_pages, slot, bits)
    size = layers * _parts(heads, tokens, head_dim, bits).end
    _check_packed(_unpack_check, "packed", packed, k_pages[0], size)
    _unpack(packed, k_pages, v_pages, slot, bits)


def _check_bits(operation: str, bits: int, head_dim: int) -> None:
    if bits not in TILE:
        raise ValueError(f"{operation}: bits must be 8 or 4, got {bits}")
    if head_dim * bits % 8:
        raise ValueError(f"{operation}: head_dim must be even for 4 bits, two codes in a byte, got {head_dim}")


def _check_pages(
    check: Check, k_pages: Sequence[Tensor], v_pages: Sequence[Tensor], slot: int, bits: int
) -> tuple[int, int, int, int]:
    """Layers, heads, tokens and head_dim."""
    operation = check.operation
    if not k_pages or len(k_pages) != len(v_pages):
        raise ValueError(
            f"{operation}: k_pages and v_pages must hold the pages of each layer, "
            f"got {len(k_pages)} and {len(v_pages)} tensors"
        )
    form = "[S, H, T, D]"
    shape = check("k_pages[0]", k_pages[0], None, FLOATING, form, (None,) * 4)
    device, dtypes = k_pages[0].device, (k_pages[0].dtype,)
    for name, pools in (("k_pages", k_pages), ("v_pages", v_pages)):
        for layer, pool in enumerate(pools):
            check(f"{name}[{layer}]", pool, device, dtypes, form, shape)
            if not pool.is_contiguous():
                raise ValueError(f"{operation}: {name}[{layer}] must be contiguous, got strides {list(pool.stride())}")
            if torch.is_grad_enabled():
                check_no_grad(operation, **{f"{name}[{layer}]": pool})
    slots, heads, tokens, head_dim = shape
    _check_bits(operation, bits, head_dim)
    if not 0 <= slot < slots:
        raise ValueError(f"{operation}: slot must be 0 to {slots - 1}, one of the pages, got {slot}")
    return len(k_pages), heads, tokens, head_dim


def _check_packed(check: Check, name: str, packed: Tensor, pages: Tensor, size: int) -> None:
    check(name, packed, pages.device, (torch.uint8,), "[packed_bytes(layers, H, T, D, bits)]", (size,))
    if not packed.is_contiguous():
        raise ValueError(f"{check.operation}: {name} must be contiguous, got strides {list(packed.stride())}")


def _parts(heads: int, tokens: int, head_dim: int, bits: int) -> _Parts:
    codes = heads * tokens * head_dim * bits // 8
    by_channel = heads * -(-tokens // TILE[bits]) * head_dim * 2
    v_scales = 2 * codes + by_channel
    padding = v_scales + (heads * tokens * 2 if bits == 8 else by_channel)
    return _Parts(codes, 2 * codes, v_scales, padding, -(-padding // ALIGNMENT) * ALIGNMENT)


def _spread(scales: Tensor, page: Tensor, bits: int, by_token: bool) -> Tensor:
    """Scales [H, T] or [H, tiles, D], a number for each one of the page: [H, T, D] or [H, T, 1]."""
    if by_token:
        return scales[..., None]
    return scales.repeat_interleave(TILE[bits], dim=1)[:, : page.shape[1]]


def _quantise(page: Tensor, bits: int, by_token: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of one page [H, T, D], as bytes."""
    wide = page.float()
    if by_token:
        largest = wide.abs().amax(dim=-1)
    else:
        tiles = torch.nn.functional.pad(wide, (0, 0, 0, -page.shape[1] % TILE[bits])).unflatten(1, (-1, TILE[bits]))
        largest = tiles.abs().amax(dim=2)
    # 1 / 127 as float32 and not as Python's float64, by which a GPU would multiply otherwise than a CPU.
    inverse = torch.tensor(1 / LARGEST[bits], dtype=torch.float32, device=page.device)
    exact = (largest * inverse).clamp(min=SMALLEST_SCALE)
    rounded_up = (exact.view(torch.int32) + 0xFFFF) >> 16 << 16
    finite = largest.isfinite()
    scales = torch.where(finite, rounded_up.view(torch.float32), torch.nan)
    inverses = _spread(torch.where(finite, 1 / scales, 0.0), page, bits, by_token)
    # An infinity times 0 is NaN.
    codes = (wide * inverses).nan_to_num(nan=0.0).round().to(torch.int8)
    if bits == 4:
        even, odd = codes.unflatten(-1, (-1, 2)).unbind(-1)
        codes = (even & 15) | odd << 4
    stored = (scales.view(torch.int32) >> 16).to(torch.int16)
    return codes.view(torch.uint8).flatten(), stored.contiguous().flatten().view(torch.uint8)


def _dequantise(codes: Tensor, scales: Tensor, page: Tensor, bits: int, by_token: bool) -> Tensor:
    """The page of shape [H, T, D], from bytes."""
    heads, tokens, head_dim = page.shape
    # Copied, since a part may begin at an odd address.
    stored = scales.clone().view(torch.int16).view((heads, tokens) if by_token else (heads, -1, head_dim))
    wide_scales = _spread((stored.int() << 16).view(torch.float32), page, bits, by_token)
    signed = codes.view(torch.int8)
    if bits == 4:
        signed = torch.stack([signed << 4 >> 4, signed >> 4], dim=-1)
    limit = torch.finfo(page.dtype).max
    return (signed.view(heads, tokens, head_dim) * wide_scales).to(torch.float64).clamp(-limit, limit).to(page.dtype)


def _pack_reference(packed: Tensor, k_pages: Sequence[Tensor], v_pages: Sequence[Tensor], slot: int, bits: int) -> None:
    if packed.numel() == 0:
        return
    _, heads, tokens, head_dim = k_pages[0].shape
    parts = _parts(heads, tokens, head_dim, bits)
    for layer, k, v in zip(packed.view(len(k_pages), parts.end), k_pages, v_pages, strict=True):
        layer[: parts.v_codes], layer[parts.k_scales : parts.v_scales] = _quantise(k[slot], bits, by_token=False)
        values = _quantise(v[slot], bits, by_token=bits == 8)
        layer[parts.v_codes : parts.k_scales], layer[parts.v_scales : parts.padding] = values
        layer[parts.padding :] = 0


def _unpack_reference(
    packed: Tensor, k_pages: Sequence[Tensor], v_pages: Sequence[Tensor], slot: int, bits: int
) -> None:
    if packed.numel() == 0:
        return
    _, heads, tokens, head_dim = k_pages[0].shape
    parts = _parts(heads, tokens, head_dim, bits)
    for layer, k, v in zip(packed.view(len(k_pages), parts.end), k_pages, v_pages, strict=True):
        k_codes, v_codes = layer[: parts.v_codes], layer[parts.v_codes : parts.k_scales]
        k_scales, v_scales = layer[parts.k_scales : parts.v_scales], layer[parts.v_scales : parts.padding]
        k[slot] = _dequantise(k_codes, k_scales, k[slot], bits, by_token=False)
        v[slot] = _dequantise(v_codes, v_scales, v[slot], bits, by_token=bits == 8)


def _fake(packed: Tensor, *context: object) -> None:
    return None


def _takes(packed: Tensor, k_pages: Sequence[Tensor], v_pages: Sequence[Tensor], slot: int, bits: int) -> bool:
    """What csrc/cuda/pack.cuh handles."""
    head_dim = k_pages[0].shape[3]
    return (
        k_pages[0].dtype in _cuda.DTYPE_CODES
        and head_dim in (16, 32, 64, 128)
        and all(tensor.data_ptr() % 16 == 0 for tensor in (packed, *k_pages, *v_pages))
    )


def _arguments(
    packed: Tensor, k_pages: Sequence[Tensor], v_pages: Sequence[Tensor], slot: int, bits: int
) -> tuple[object, ...]:
    return (
        [pool.data_ptr() for pool in k_pages],
        [pool.data_ptr() for pool in v_pages],
        packed.data_ptr(),
        slot,
        k_pages[0].shape[1:],
        bits,
        _cuda.DTYPE_CODES[k_pages[0].dtype],
        *_cuda.queue(packed.device),
    )


def _pack_kernel(extension: ModuleType, *arguments: object) -> None:
    extension.pack(*_arguments(*arguments))  # type: ignore[arg-type]


def _unpack_kernel(extension: ModuleType, *arguments: object) -> None:
    extension.unpack(*_arguments(*arguments))  # type: ignore[arg-type]


# The packed bytes come first: an operation is chosen by the device of its first argument.
_pack = define(
    "pack(Tensor(a!) packed, Tensor[] k_pages, Tensor[] v_pages, int slot, int bits) -> ()",
    reference=_pack_reference,
    fake=_fake,
    kernel=_pack_kernel,
    takes=_takes,
    checked_as="pack",
)
_unpack = define(
    "unpack(Tensor packed, Tensor(a!)[] k_pages, Tensor(b!)[] v_pages, int slot, int bits) -> ()",
    reference=_unpack_reference,
    fake=_fake,
    kernel=_unpack_kernel,
    takes=_takes,
    checked_as="pack",
)
