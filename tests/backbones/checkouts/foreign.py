"""Imports a repository's own code at a tiny size on a CPU, without changing its files or keeping any of it.

Replaced while it runs: flash-attention, by PyTorch's scaled_dot_product_attention; constants of the published size, as
the 1560 tokens of a latent frame or 12 heads of 128; "cuda"; and packages that are not installed, by empty doubles.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import Tensor

PUBLISHED_TOKENS = {1560: 1, 3120: 2, 4680: 3, 32760: 21}
"""Constants of the published size, in latent frames."""
PUBLISHED_HEADS = (12, 128)
NEVER_DOUBLED = {
    "cublas_ops", "flash_attn", "flash_attn_interface", "intel_extension_for_pytorch", "sageattention",
    "torch_directml", "torch_mlu", "torch_npu", "transformer_engine", "triton", "xformers",
}  # fmt: skip
"""Packages whose absence the repositories handle themselves."""

LOADING = {"low_cpu_mem_usage", "torch_dtype", "device_map"}
"""Options of `from_pretrained` that say how to load."""


@dataclass
class Sizes:
    """Of the tiny models. `tokens` is read whenever the code meets one of its constants, so it may change."""

    layers: int = 3
    heads: int = 12
    head_dim: int = 128
    ffn_dim: int = 256
    freq_dim: int = 16
    text_dim: int = 16
    text_len: int = 8
    tokens: int = 8

    @property
    def model(self) -> dict[str, int]:
        """Arguments of the repositories' causal models."""
        return {
            "dim": self.heads * self.head_dim, "ffn_dim": self.ffn_dim, "freq_dim": self.freq_dim,
            "text_dim": self.text_dim, "text_len": self.text_len, "num_heads": self.heads, "num_layers": self.layers,
        }  # fmt: skip


class _TinySizes(ast.NodeTransformer):
    """Constants of the published size become expressions of the tiny one."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value in ("cuda", "cuda:"):  # the second stands before a number, which is "cpu" here
            return ast.copy_location(ast.Constant("cpu" if node.value == "cuda" else ""), node)
        if type(node.value) is int and node.value in PUBLISHED_TOKENS:
            frames = ast.Constant(PUBLISHED_TOKENS[node.value])
            call = ast.Call(ast.Name("__tokens_of__", ast.Load()), [frames], [])
            return ast.fix_missing_locations(ast.copy_location(call, node))
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        # What is moved off the GPU is a copy; on a CPU, it would be a view of what is overwritten next.
        to = isinstance(node.func, ast.Attribute) and node.func.attr == "to"
        if to and node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == "cpu":
            node.keywords.append(ast.keyword("copy", ast.Constant(True)))
        return ast.fix_missing_locations(node)

    def visit_List(self, node: ast.List) -> ast.AST:
        self.generic_visit(node)
        last = tuple(entry.value for entry in node.elts[-2:] if isinstance(entry, ast.Constant))
        if len(node.elts) == 4 and last == PUBLISHED_HEADS:
            node.elts[-2:] = [ast.Constant(self._sizes.heads), ast.Constant(self._sizes.head_dim)]
        return ast.fix_missing_locations(node)


class _Loader(importlib.machinery.SourceFileLoader):
    sizes: Sizes

    def get_code(self, fullname: str) -> types.CodeType:
        tree = ast.parse(self.get_data(self.path), self.path)
        double_missing(tree)
        return compile(_TinySizes(self.sizes).visit(tree), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        sizes = self.sizes
        vars(module)["__tokens_of__"] = lambda frames: frames * sizes.tokens
        super().exec_module(module)
        if module.__name__.endswith("modules.attention"):
            vars(module).update(attention=_attention, flash_attention=_attention, FLASH_ATTN_2_AVAILABLE=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of one checkout."""

    def __init__(self, root: Path, sizes: Sizes) -> None:
        self._root, self._sizes = f"{root}{os.sep}", sizes

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, [self._root] if path is None else path)
        if spec is None or spec.origin is None or not spec.origin.startswith(self._root):
            return None
        loader = _Loader(fullname, spec.origin)
        loader.sizes = self._sizes
        spec.loader = loader
        return spec


def double_missing(tree: ast.AST) -> None:
    """Doubles in the place of whatever the code imports that is not installed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _double_if_missing(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            _double_if_missing(node.module, [alias.name for alias in node.names])


def _double_if_missing(name: str, parts: Sequence[str] = ()) -> None:
    """An empty double in the place of a module that is not installed, or of what a newer transformers lacks."""
    if name.split(".")[0] in NEVER_DOUBLED:
        return
    for end in range(1, name.count(".") + 2):
        part = ".".join(name.split(".")[:end])
        try:
            if part in sys.modules or importlib.util.find_spec(part) is not None:
                continue
        except (ImportError, ValueError):
            pass
        double: Any = MagicMock(name=part)
        double.__spec__, double.__path__ = importlib.machinery.ModuleSpec(part, None), []
        sys.modules[part] = double
    if name.startswith("transformers."):
        module = importlib.import_module(name)
        for each in parts:
            if not hasattr(module, each):
                setattr(module, each, MagicMock(name=each))


def _attention(q: Tensor, k: Tensor, v: Tensor, q_lens: Any = None, k_lens: Any = None, **_: Any) -> Tensor:
    """q [B, L, H, D], k and v [B, M, H, D] to [B, L, H, D], in their own precision."""
    assert q_lens is None and k_lens is None, "the tiny prompts have no padding"
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def enter(root: Path, sizes: Sizes) -> None:
    """Make the checkout's modules importable in this process, once for all."""
    os.environ |= {"LLV2_TRITON_ROPE": "0", "LLV2_TRITON_ADALN": "0"}  # LongLive 2's own switches
    import diffusers  # noqa: F401  (it looks for optional packages, and must not find a double)
    import transformers  # noqa: F401

    vars(torch)["compile"] = lambda model=None, **_: model if model is not None else lambda function: function
    vars(torch.cuda).update(current_device=lambda: "cpu", synchronize=lambda *_: None)
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    sys.meta_path.insert(0, _Finder(root, sizes))
    sys.path.insert(0, str(root))  # for folders without an __init__.py


def use_tiny(model_class: Any, sizes: Sizes, fill: Any, **fixed: Any) -> None:
    """Let `from_pretrained` of one of the checkout's classes give a tiny model, its parameters filled by `fill`."""

    def from_pretrained(_: Any, *__: Any, **options: Any) -> Any:
        options = {name: value for name, value in options.items() if name not in LOADING}
        model = model_class(**sizes.model, **fixed, **options)
        fill(model)
        return model.eval().requires_grad_(False)

    model_class.from_pretrained = classmethod(from_pretrained)


class Settings(dict[str, Any]):
    """A configuration whose keys are attributes too, as OmegaConf's."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None
