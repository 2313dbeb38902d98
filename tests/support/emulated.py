"""The extension with its CUDA kernels compiled for the CPU, over the emulator in csrc/emulator.

The kernels' own bodies, launchers and binding run; only the `.cu` compiler and the GPU are replaced. With an edited
copy of the sources, a test can show that it would catch the fault.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

from longlive_rag.ops import _choice
from longlive_rag.ops._library import CUDA_IMPLEMENTATIONS

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CACHE = CSRC.parent / "build" / "emulated"
FLAGS = [
    *["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"],
    '-DLONGLIVE_RAG_CUDA_VERSION="emulated"',
    '-DLONGLIVE_RAG_CUDA_ARCHITECTURES="host"',
    "-DLONGLIVE_RAG_SM90",
]
Edit = tuple[str, str, str]
"""A file below csrc, a text that occurs in it exactly once, however it is broken into lines, and what stands there
instead."""


@functools.cache
def build(*edits: Edit) -> ModuleType:
    """Compile and import the emulated extension. Objects are kept by content, so only what changed is compiled.

    Skips the test where there is no C++ compiler or no pybind11.
    """
    compiler = _compiler()
    pybind11 = pytest.importorskip("pybind11", reason="the emulated kernels are bound with pybind11")
    includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    source = _edited(edits) if edits else CSRC
    command = [*compiler, *FLAGS, f"-I{source}"]
    objects = [_compile(command, file, []) for file in sorted(source.glob("cuda/*.cu"))]
    objects.append(_compile(command, source / "bindings.cpp", includes))
    library = CACHE / f"_C_{digest(*objects)}.so"
    if not library.exists():
        _run([*compiler, "-shared", *map(str, objects), "-o"], library)
    return _load(library)


def program(name: str, source: str) -> Path:
    """Compile a program over the emulator; skips the test where there is no C++ compiler."""
    file = CACHE / f"{name}.cpp"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    command = [*_compiler(), *FLAGS, f"-I{CSRC}"]
    target = _compile(command, file, []).with_suffix("")
    if not target.exists():
        _run([*_compiler(), str(target.with_suffix(".o")), "-o"], target)
    return target


@contextlib.contextmanager
def backend(module: ModuleType, hopper: bool = False) -> Iterator[list[str]]:
    """Let `longlive_rag.ops` run on CPU tensors with the emulated kernels, on a GPU for sm_80 or on Hopper. Yields the
    list of calls so far."""
    calls: list[str] = []

    class Recorded:
        def __init__(self, recorded: object, names: dict[str, str]) -> None:
            self._recorded, self._names = recorded, names

        def __getattr__(self, name: str) -> object:
            calls.append(self._names.get(name, name))
            return getattr(self._recorded, name)

        def AttendPlan(self, *sizes: object) -> object:
            return Recorded(module.AttendPlan(*sizes), {"launch": "attend"})

    recorded, library = Recorded(module, {}), torch.library.Library("longlive_rag", "IMPL")
    for operation, implementation in CUDA_IMPLEMENTATIONS.items():
        library.impl(operation, implementation, "CPU")
    try:
        with (
            mock.patch("longlive_rag.native.kernels_on", lambda device: recorded),
            mock.patch("longlive_rag.ops._cuda.queue", lambda device: (0, 0)),
            mock.patch("longlive_rag.ops._cuda.workspace", _poisoned),
            mock.patch.dict(os.environ, SIMT_CAPABILITY="90" if hopper else "80"),
            mock.patch.dict(_choice._chosen, clear=True),
        ):
            yield calls
    finally:
        library._destroy()


def _poisoned(size: int, like: torch.Tensor) -> torch.Tensor | None:
    """A workspace of NaN and -1, since nothing promises zeros."""
    return torch.full((size,), 0xFF, dtype=torch.uint8) if size else None


def _compiler() -> list[str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the emulated kernels with")
    return shlex.split(compiler)


def _edited(edits: tuple[Edit, ...]) -> Path:
    target = CACHE / "edited" / hashlib.sha256(repr(edits).encode()).hexdigest()[:16]
    shutil.copytree(CSRC, target, dirs_exist_ok=True)
    for file, old, new in edits:
        text = (target / file).read_text()
        pattern = r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", old)))
        found = [match.span() for match in re.finditer(pattern, text)]
        assert len(found) == 1, f"{old!r} stands {len(found)} times in csrc/{file}, expected once"
        begin, end = found[0]
        (target / file).write_text(text[:begin] + new + text[end:])
    return target


def _compile(command: list[str], file: Path, includes: list[str]) -> Path:
    command = [*command, *includes, "-x", "c++"]
    listing = subprocess.run([*command, "-MM", str(file)], capture_output=True, text=True, check=True).stdout
    # A backslash stands before a space within a name.
    names = re.split(r"(?<!\\)\s+", listing.replace("\\\n", " ").strip())[1:]
    dependencies = [Path(name.replace("\\ ", " ")) for name in names]
    target = CACHE / f"{file.stem}_{digest(*dependencies)}.o"
    if not target.exists():
        _run([*command, "-c", str(file), "-o"], target)
    return target


def _run(command: list[str], output: Path) -> None:
    """Run a compiler command that ends in `-o`; the output appears whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(f".{os.getpid()}")
    result = subprocess.run([*command, str(partial)], capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"
    partial.rename(output)


def digest(*files: Path) -> str:
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _load(library: Path) -> ModuleType:
    # pybind11 returns the same module for the same name, whatever file it came from.
    name = f"{library.stem}._C"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module
