"""Replaces the `forward`, or another method, of single module instances, and restores it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
_MARK = "_longlive_rag_patched"


class _Uncopied:
    """Stands on every patched module, and refuses to be copied with it.

    A copy would keep the replaced `forward`, which calls the layers of the original.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a patched model cannot be copied, pickled or saved as a whole: the copy would compute with the original's "
            "weights. First call unpatch() on what patch() returned; the state_dict() can be saved at any time"
        )


class Forwards:
    """The forwards that were replaced, and other methods."""

    def __init__(self) -> None:
        self._originals: list[tuple[nn.Module, str, Any]] = []

    def replace(
        self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]], name: str = "forward"
    ) -> None:
        """Replace a method of a module by what `make` returns for the present one."""
        present = getattr(module, name)
        method = functools.wraps(present)(make(present))
        self._originals.append((module, name, vars(module).get(name)))
        # The mark comes first, so that pickling meets its reason before it fails on a closure.
        setattr(module, _MARK, _Uncopied())
        setattr(module, name, method)

    def restore(self) -> None:
        """Restore all of them."""
        for module, name, original in reversed(self._originals):
            if original is None:
                delattr(module, name)
            else:
                setattr(module, name, original)
            vars(module).pop(_MARK, None)
        self._originals = []


def is_patched(module: nn.Module) -> bool:
    return hasattr(module, _MARK)


class GradientGuard:
    """Tells which calls need gradients, which memory does not give; says so once."""

    def __init__(self) -> None:
        self._warned = False

    def needed(self, module: nn.Module, x: Tensor) -> bool:
        """Whether a call of `module` with the input x needs gradients."""
        if not torch.is_grad_enabled():
            return False
        needed = x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())
        if needed and not self._warned:
            self._warned = True
            logger.warning("calls with gradients go to the model's own attention, without memory; use torch.no_grad()")
        return needed
