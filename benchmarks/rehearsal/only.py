"""Hides installed packages, so that what runs shows what it needs."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from gpu_plan import CARRIED, ON_THE_MACHINE

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
    """What can be imported on a machine that has the named packages: they, and what they require.

    Args:
        with_carried: also those that only the part end-to-end needs.
    """
    named = [*ON_THE_MACHINE, *(CARRIED if with_carried else ())]
    holders = {name: {_normal(holder) for holder in found} for name, found in metadata.packages_distributions().items()}
    todo = [holder for name in named for holder in {_normal(name), *holders.get(name, ())}]
    wanted: set[str] = set()
    while todo:
        distribution = todo.pop()
        if distribution not in wanted:
            wanted.add(distribution)
            todo += _required(distribution)
    return frozenset([*named, *FOR_EVERYONE, *(name for distribution in wanted for name in _holds(distribution))])


def _holds(distribution: str) -> set[str]:
    """Top-level names of what a distribution has installed. Python 3.10 does not tell them for all distributions."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return set()
    return {file.parts[0].partition(".")[0] for file in files if file.suffix in (".py", ".so")}


def _required(distribution: str) -> list[str]:
    try:
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []
    names = (re.match(r"[\w.-]+", requirement) for requirement in requirements if "extra ==" not in requirement)
    return [_normal(name[0]) for name in names if name is not None]


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def import_only(packages: Collection[str]) -> None:
    """From now on, hide every other package in site-packages. What has been imported stays."""
    sys.meta_path[:] = [Filter(finder, packages) for finder in sys.meta_path]
