"""Hides installed packages, so that what runs shows what it needs."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from gpu_plan import CARRIED, ON_THE_MACHINE

NEEDED_BY_THEM = {
    "torch": (
        "torchgen functorch filelock fsspec jinja2 markupsafe mpmath networkx sympy typing_extensions triton nvidia "
        "cuda"
    ),
    "pytest": "_pytest exceptiongroup iniconfig packaging pluggy py pygments tomli",
    "hypothesis": "_hypothesis_ftz_detector _hypothesis_globals _hypothesis_pytestplugin attr attrs sortedcontainers",
    "diffusers": (
        "PIL accelerate anyio certifi charset_normalizer click h11 hf_xet httpcore httpx huggingface_hub idna "
        "importlib_metadata regex requests shellingham sniffio socksio typer urllib3 yaml zipp"
    ),
}
"""What each needs in turn and brings, or does without."""
FOR_EVERYONE = ("longlive_rag", "pip", "setuptools", "_distutils_hack", "_virtualenv")


class Filter:
    """A finder of modules that does not find what is hidden.

    Args:
        finder: whose place it takes in `sys.meta_path`.
        allowed: top-level packages in site-packages that it still finds.
    """

    def __init__(self, finder: Any, allowed: Collection[str]) -> None:
        self.finder, self.allowed = finder, allowed

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec: ModuleSpec | None = self.finder.find_spec(name, path, target)
        if spec is None or name.partition(".")[0] in self.allowed:
            return spec
        places = [spec.origin or "", *(spec.submodule_search_locations or ())]
        installed = any("site-packages" in place or "dist-packages" in place for place in places)
        return None if installed else spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def allowed(*, with_carried: bool) -> frozenset[str]:
    """Packages that a machine has to have; with those that only the part end-to-end needs."""
    named = [*ON_THE_MACHINE, *(CARRIED if with_carried else ())]
    brought = [package for name in named for package in NEEDED_BY_THEM.get(name, "").split()]
    return frozenset([*named, *brought, *FOR_EVERYONE])


def import_only(packages: Collection[str]) -> None:
    """From now on, hide every other package in site-packages. What has been imported stays."""
    sys.meta_path[:] = [Filter(finder, packages) for finder in sys.meta_path]
