"""Every name of torch and NumPy that the package uses exists in the oldest versions it supports.

Continuous integration runs with one torch. tests/support/oldest/*.txt lists names that were found in torch 2.5.1 and
NumPy 1.24.4; a new name is looked for there, and added:

    python -c 'import torch; torch.<name>'    # in an environment with torch==2.5.1
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LISTS = Path(__file__).parent / "support" / "oldest"
OLDEST = {"torch": ("2.5", "torch_2_5_1.txt"), "numpy": ("1.24", "numpy_1_24_4.txt")}
OWN = "torch.ops.longlive_rag"


def names_used(tree: ast.AST, package: str) -> Iterator[str]:
    """Whole dotted names of the package's modules, functions and classes in a file."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    aliases[alias.asname or package] = alias.name if alias.asname else package
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    # The longest chain of attributes counts: its inner nodes are walked too, and are names of their own.
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, *rest = ast.unparse(node).split(".")
            if root in aliases and all(part.isidentifier() for part in rest):
                yield ".".join([aliases[root], *rest])


def used(package: str) -> set[str]:
    files = (ROOT / "python" / "longlive_rag").rglob("*.py")
    names = {name for path in files for name in names_used(ast.parse(path.read_text(encoding="utf-8")), package)}
    return {name for name in names if not name.startswith(OWN) and name != package}


@pytest.mark.parametrize("package", sorted(OLDEST))
def test_every_name_is_old_enough(package: str) -> None:
    known = set((LISTS / OLDEST[package][1]).read_text().split())
    assert used(package) - known == set()


@pytest.mark.parametrize("package", sorted(OLDEST))
def test_the_list_is_of_the_version_that_may_be_installed(package: str) -> None:
    oldest, file = OLDEST[package]
    requirement = re.search(rf'"{package}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert requirement is not None and requirement.group(1) == oldest
    assert file.startswith(f"{package}_{oldest.replace('.', '_')}")
