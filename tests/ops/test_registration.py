"""The operations as PyTorch sees them, and what they say to wrong input."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from longlive_rag import ops, rotary

B, F, T, H, D, S, N = 2, 3, 6, 2, 16, 9, 4


def insert_arguments(device: str = "cpu") -> dict[str, Any]:
    return {
        "k": torch.randn(B, F, T, H, D, device=device),
        "v": torch.randn(B, F, T, H, D, device=device),
        "k_weight": torch.randn(H * D, device=device),
        "rotation": rotary.spatial_rotation(2, 3, D, device),
        "k_pages": torch.zeros(S, H, T, D, device=device),
        "v_pages": torch.zeros(S, H, T, D, device=device),
        "slots": torch.tensor([[0, 3, -1], [7, 2, 5]], dtype=torch.int32, device=device),
        "eps": 1e-6,
        "q": torch.randn(B, F, T, H, D, device=device),
        "q_weight": torch.randn(H * D, device=device),
    }


def retrieve_arguments(device: str = "cpu") -> dict[str, Any]:
    keys = torch.randn(B, 20, 8, device=device)
    return {
        "query": torch.randn(B, 8, device=device),
        "keys": keys,
        "inverse_norms": 1 / keys.norm(dim=-1),
        "first": torch.tensor([1, 2], dtype=torch.int32, device=device),
        "last": torch.tensor([15, 20], dtype=torch.int32, device=device),
        "k": 4,
    }


def attend_arguments(device: str = "cpu") -> dict[str, Any]:
    return {
        "q": torch.randn(B, F * T, H, D, device=device),
        "k_pages": torch.randn(S, H, T, D, device=device),
        "v_pages": torch.randn(S, H, T, D, device=device),
        "slots": torch.tensor([[0, 3, -1, 8], [7, 2, 5, 1]], dtype=torch.int32, device=device),
        "positions": torch.randint(0, 12, (B, N), dtype=torch.int32, device=device),
        "query_position": torch.tensor([[9, 10, 11]] * B, dtype=torch.int32, device=device),
        "frequencies": rotary.temporal_frequencies(D, device),
        "scale": 0.25,
    }


def unpack_arguments(device: str = "cpu") -> dict[str, Any]:
    k, v = ([torch.randn(S, H, T, D, device=device) for _ in range(2)] for _ in "kv")
    packed = torch.randint(128, (ops.packed_bytes(2, H, T, D, 8),), dtype=torch.uint8, device=device)
    return {"packed": packed, "k_pages": k, "v_pages": v, "slot": 3, "bits": 8}


def pack_arguments(device: str = "cpu") -> dict[str, Any]:
    return {name: value for name, value in unpack_arguments(device).items() if name != "packed"}


ARGUMENTS = {
    "insert": insert_arguments,
    "retrieve": retrieve_arguments,
    "attend": attend_arguments,
    "pack": pack_arguments,
    "unpack": unpack_arguments,
}
# As registered, `pack` is given what it writes to.
REGISTERED_ARGUMENTS = {**ARGUMENTS, "pack": unpack_arguments}


# Every form of each schema: what is optional present and absent.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "insert": ("insert", {}),
    "insert without queries": ("insert", {"q": None, "q_weight": None}),
    "insert without weights": ("insert", {"k_weight": None, "q_weight": None}),
    "retrieve": ("retrieve", {}),
    "attend": ("attend", {"lse": False}),
    "attend with lse": ("attend", {"lse": True}),
    "pack": ("pack", {}),
    "unpack": ("unpack", {}),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("form", list(FORMS))
def test_opcheck(form: str, device: str) -> None:
    name, change = FORMS[form]
    arguments = {**REGISTERED_ARGUMENTS[name](device), **change}
    torch.library.opcheck(getattr(torch.ops.longlive_rag, name).default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("insert", {}),
        ("insert", {"q": None, "q_weight": None}),
        ("retrieve", {}),
        ("attend", {}),
        ("attend", {"return_lse": True}),
    ],
)
def test_compiles_whole(name: str, change: dict[str, Any], backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch.compiler.reset()
    operation, arguments = getattr(ops, name), {**ARGUMENTS[name](), **change}

    def run(**given: Any) -> Any:
        return operation(**given), given.get("k_pages")

    eager = run(**{key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()})
    compiled = torch.compile(run, backend=backend, fullgraph=True)(**arguments)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("insert", {"k": torch.randn(B, F, T, H)}, ValueError, r"k must be \[B, F, T, H, D\] = .*, got \[2, 3, 6, 2\]"),
        ("insert", {"v": torch.randn(B, F, T, H, 8)}, ValueError, r"insert: v must be .*got \[2, 3, 6, 2, 8\]"),
        ("insert", {"v": torch.randn(B, F, T, H, D).half()}, TypeError, "insert: v must be float32, got float16"),
        ("insert", {"k": torch.zeros(B, F, T, H, D).long()}, TypeError, "insert: k must be float32 or .*, got int64"),
        ("insert", {"k": torch.randn(B, F, T, D, H).mT}, ValueError, "insert: k must be contiguous over its last two"),
        ("insert", {"k_weight": torch.ones(D)}, ValueError, r"k_weight must be \[H \* D\] = \[32\], got \[16\]"),
        ("insert", {"rotation": torch.zeros(T, 9, 2)}, ValueError, "rotation turns 9 pairs, but a head of 16 has 8"),
        ("insert", {"k_pages": torch.zeros(S, T, H, D)}, ValueError, r"insert: k_pages must be \[S, H, T, D\]"),
        ("insert", {"v_pages": torch.zeros(S, H, T, 2 * D)[..., ::2]}, ValueError, "v_pages must be contiguous"),
        ("insert", {"slots": torch.zeros(B, F)}, TypeError, "insert: slots must be int32, got float32"),
        ("insert", {"k": [1.0]}, TypeError, "insert: k must be a tensor, got list"),
        ("insert", {"k_weight": torch.ones(H * D, requires_grad=True)}, ValueError, "insert: k_weight requires grad"),
        ("insert", {"slots": torch.zeros(B, F, device="meta")}, ValueError, "slots is on meta, but k is on cpu"),
        ("retrieve", {"k": 0}, ValueError, "retrieve: k must be 1 to 64, got 0"),
        ("retrieve", {"k": 65}, ValueError, "retrieve: k must be 1 to 64, got 65"),
        ("retrieve", {"keys": torch.randn(B, 20, 9)}, ValueError, r"retrieve: keys must be \[B, N, D\]"),
        ("retrieve", {"query": torch.randn(B, 8).double()}, TypeError, "retrieve: keys must be float64, got float32"),
        ("retrieve", {"first": torch.zeros(3, dtype=torch.int32)}, ValueError, r"first must be an int or have shape"),
        ("retrieve", {"last": torch.zeros(B)}, TypeError, "retrieve: last must be int32, got float32"),
        ("attend", {"q": torch.randn(B, 13, H, D)}, ValueError, "q must hold whole frames of 6 tokens .*, got 13"),
        ("attend", {"q": torch.randn(B, H, F * T, D).mT.mT.transpose(1, 2)}, ValueError, "q must be contiguous"),
        ("attend", {"k_pages": torch.randn(S, H, T, D).bfloat16()}, TypeError, "k_pages must be float32, got bfloat16"),
        ("attend", {"v_pages": torch.randn(S, H, T + 1, D)}, ValueError, r"attend: v_pages must be \[S, H, T, D\]"),
        ("attend", {"positions": torch.zeros(B, 3, dtype=torch.int32)}, ValueError, r"positions must be \[B, N\]"),
        ("attend", {"query_position": torch.zeros(B, 1, dtype=torch.int32)}, ValueError, r"query_position must be"),
        ("attend", {"slots": torch.zeros(B, N).long()}, TypeError, "attend: slots must be int32, got int64"),
        ("pack", {"k_pages": []}, ValueError, "pack: k_pages and v_pages must hold .* each layer, got 0 and 2 tensors"),
        ("pack", {"v_pages": [torch.zeros(S, H, T, 8)] * 2}, ValueError, r"pack: v_pages\[0\] must be \[S, H, T, D\]"),
        ("pack", {"k_pages": [torch.zeros(S, H, D, T).mT] * 2}, ValueError, r"pack: k_pages\[0\] must be contiguous"),
        ("pack", {"bits": 16}, ValueError, "pack: bits must be 8 or 4, got 16"),
        ("pack", {"slot": -1}, ValueError, "pack: slot must be 0 to 8, one of the pages, got -1"),
        ("pack", {"out": torch.zeros(16).byte()}, ValueError, r"pack: out must be \[packed_bytes.* got \[16\]"),
        ("unpack", {"slot": S}, ValueError, "unpack: slot must be 0 to 8, one of the pages, got 9"),
        ("unpack", {"bits": 4}, ValueError, r"unpack: packed must be \[packed_bytes"),
        ("attend", {"frequencies": torch.zeros(9).double()}, ValueError, "frequencies turns 9 pairs, but a head of 16"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(ops, name)(**{**ARGUMENTS[name](), **change})
