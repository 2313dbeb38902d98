"""The extension with the kernels that nvcc made: their PTX, translated to C++ (translate.py), under the real launchers
and binding, on the emulator's fibers. Nothing of a kernel's C++ body runs, nor of the emulator's own instructions.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from ptx import translate
from support import emulated

CSRC = emulated.CSRC
HERE = Path(__file__).resolve().parent
CACHE = CSRC.parent / "build" / "ptx"
ARCHITECTURES = {
    "cuda/insert.cu": "compute_80",
    "cuda/retrieve.cu": "compute_80",
    "cuda/attend.cu": "compute_80",
    "cuda/attend_sm90.cu": "compute_90a",
}
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
KERNEL_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", *WARNINGS]
# Without optimisation, so that the compiler knows nothing of the C++ bodies in whose place the PTX runs.
LAUNCHER_FLAGS = [
    *["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", *WARNINGS],
    '-DLONGLIVE_RAG_CUDA_VERSION="ptx"',
    '-DLONGLIVE_RAG_CUDA_ARCHITECTURES="host"',
    "-DLONGLIVE_RAG_SM90",
]
INCLUDES = [f"-I{HERE / 'host'}", f"-I{HERE}", f"-I{CSRC}"]
REPORT = r"""
#include "launch.h"
extern "C" __attribute__((visibility("default"))) const char* ptx_executed() {
  static std::string names;
  names.clear();
  for (const std::string& name : ptx::executed) names += name + "\n";
  ptx::executed.clear();
  return names.c_str();
}
"""


class Edit(NamedTuple):
    """A fault in the PTX of one kernel: its name's part, a regular expression, and what stands there instead."""

    kernel: str
    pattern: str
    replacement: str
    which: int | None = None
    """The occurrence to be replaced; negative: from the end; None: all of them."""


@functools.cache
def kernels(source: str) -> dict[str, translate.Entry]:
    """The kernels that nvcc makes of a source file, by name; skips the test where there is no nvcc."""
    return translate.entries(_ptx(source).read_text())


def build(*sources: str, edit: Edit | None = None) -> ModuleType:
    """Compile and import the extension with the kernels of the source files (`cuda/insert.cu`), or, with an edit, with
    the edited kernel alone. A launch of any other kernel raises RuntimeError.

    Skips the test where there is no nvcc, no C++ compiler or no pybind11.
    """
    return emulated._load(_library(sources, edit))


@contextlib.contextmanager
def executed(module: ModuleType) -> Iterator[set[str]]:
    """Yields a set that holds, at the end, the names of the kernels that were launched."""
    report = ctypes.CDLL(str(module.__file__)).ptx_executed
    report.restype = ctypes.c_char_p
    report()
    names: set[str] = set()
    try:
        yield names
    finally:
        names.update(report().decode().split())


@functools.cache
def _library(sources: tuple[str, ...], edit: Edit | None) -> Path:
    compiler = emulated._compiler()
    pybind11 = pytest.importorskip("pybind11", reason="the kernels are bound with pybind11")
    binding = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    entries = [entry for source in sources for entry in kernels(source).values()]
    if edit:
        entries = [_edited(entry, edit) for entry in entries if edit.kernel in entry.name]
        assert len(entries) == 1, f"{edit.kernel} names {len(entries)} kernels, expected one"
    launchers = [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "bindings.cpp", _written("report", REPORT)]
    jobs: list[Callable[[], Path]] = [
        functools.partial(_compile, [*compiler, *LAUNCHER_FLAGS, *INCLUDES, *binding], file) for file in launchers
    ]
    for entry in entries:
        file = _written(entry.name, translate.translate(entry))
        jobs.append(functools.partial(_compile, [*compiler, *KERNEL_FLAGS, *INCLUDES], file))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda job: job(), jobs))
    objects.append(_compile([*compiler, *LAUNCHER_FLAGS, *INCLUDES], _written("missing", _missing(objects))))
    library = CACHE / f"_C_{_digest(*objects)}.so"
    if not library.exists():
        emulated._run([*compiler, "-shared", *map(str, objects), "-o"], library)
    return library


def _ptx(source: str) -> Path:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc to make PTX with")
    command = [nvcc, "-std=c++20", f"-I{CSRC}", f"-arch={ARCHITECTURES[source]}"]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    files = sorted(CSRC.glob("c*/**/*.*h")) + [CSRC / source]
    target = CACHE / f"{Path(source).stem}_{_digest(*files, text=version + shlex.join(command))}.ptx"
    if not target.exists():
        emulated._run([*command, "-ptx", str(CSRC / source), "-o"], target)
    return target


def _edited(entry: translate.Entry, edit: Edit) -> translate.Entry:
    found = list(re.finditer(edit.pattern, entry.body))
    assert found, f"{edit.pattern!r} is not in {entry.name}"
    chosen = found if edit.which is None else [found[edit.which]]
    body = entry.body
    for match in reversed(chosen):
        body = body[: match.start()] + match.expand(edit.replacement) + body[match.end() :]
    assert body != entry.body
    return entry._replace(body=body)


def _written(name: str, text: str) -> Path:
    """A generated source file; its name holds a digest of the text."""
    file = CACHE / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(text)
        partial.rename(file)
    return file


def _missing(objects: list[Path]) -> str:
    """Definitions of the kernels that a launcher could call and that were not translated."""
    listing = subprocess.run(["nm", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    symbols = set(re.findall(r" ([WT]) (_ZN8longlive\w+_kernelI\w+)$", listing, re.MULTILINE))
    names = {name for kind, name in symbols if kind == "W"} - {name for kind, name in symbols if kind == "T"}
    functions = [
        f'extern "C" void {name}(const ptx::Launch&) {{ throw std::runtime_error("not translated: {name}"); }}\n'
        for name in sorted(names)
    ]
    return '#include "launch.h"\n' + "".join(functions)


def _compile(command: list[str], file: Path) -> Path:
    command = [*command, "-x", "c++"]
    listing = subprocess.run([*command, "-MM", str(file)], capture_output=True, text=True, check=True).stdout
    dependencies = [Path(name) for name in listing.replace("\\\n", " ").split()[1:]]
    target = CACHE / f"{file.stem[:120]}_{_digest(*dependencies, text=shlex.join(command))}.o"
    if not target.exists():
        emulated._run([*command, "-c", str(file), "-o"], target)
    return target


def _digest(*files: Path, text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
