"""Imported by every Python that `longlive-rag run` starts: has the model patched once torch has been imported.

This folder comes first on PYTHONPATH. It does not import torch itself, which most of those processes never need.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence


class TorchFinder(importlib.abc.MetaPathFinder):
    """Lets torch be imported as usual, and starts the watch right after."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                from longlive_rag.backbones.run.watch import watch

                watch()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _hand_over() -> None:
    """Import the environment's own sitecustomize, which this one shadows."""
    here = os.path.dirname(os.path.abspath(__file__))
    own = sys.modules.pop("sitecustomize", None)
    path = sys.path[:]
    sys.path[:] = [entry for entry in path if os.path.abspath(entry) != here]
    try:
        importlib.import_module("sitecustomize")
    except ImportError:
        if own is not None:
            sys.modules["sitecustomize"] = own
    finally:
        sys.path[:] = path


def _watch_from_torch_on() -> None:
    if "torch" in sys.modules:  # a .pth file, which is read before this module, imported it
        from longlive_rag.backbones.run.watch import watch

        watch()
    else:
        sys.meta_path.insert(0, TorchFinder())


if "LONGLIVE_RAG_RUN" in os.environ:
    _watch_from_torch_on()
_hand_over()
