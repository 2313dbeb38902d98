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
import threading
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
    "cuda/pack.cu": "compute_80",
    "cuda/attend_sm90.cu": "compute_90a",
}
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
KERNEL_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", *WARNINGS]
KERNEL_FLAGS.append("-Wno-unused-label")  # an edit may take the branch away
# Of a faulty kernel little is run.
FAULTY_FLAGS = [flag.replace("-O1", "-O0") for flag in KERNEL_FLAGS]
# Without optimisation, so that the compiler knows nothing of the C++ bodies in whose place the PTX runs.
LAUNCHER_FLAGS = [
    *["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", *WARNINGS],
    '-DLONGLIVE_RAG_CUDA_VERSION="ptx"',
    '-DLONGLIVE_RAG_CUDA_ARCHITECTURES="host"',
    "-DLONGLIVE_RAG_SM90",
]
LOCK = threading.Lock()
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
    """A fault in the PTX of one kernel: the source file, a part of the kernel's name, a regular expression, and what
    stands there instead."""

    source: str
    kernel: str
    pattern: str
    replacement: str
    which: int | None = None
    """The occurrence to be replaced; negative: from the end; None: all of them."""


@functools.cache
def kernels(source: str) -> dict[str, translate.Entry]:
    """The kernels that nvcc makes of a source file, by name; skips the test where there is no nvcc."""
    return translate.entries(_ptx()[source].read_text())


@functools.cache
def build(source: str) -> ModuleType:
    """Compile and import the extension with the kernels of a source file (`cuda/insert.cu`). A launch of any other
    raises RuntimeError.

    Skips the test where there is no nvcc, no C++ compiler or no pybind11.
    """
    objects = _parallel([_kernel(entry, KERNEL_FLAGS) for entry in kernels(source).values()])
    return emulated._load(_library(objects))


def build_edited(edits: list[Edit]) -> list[ModuleType]:
    """For each edit the extension with the edited kernel alone."""
    jobs = []
    for edit in edits:
        (entry,) = (entry for entry in kernels(edit.source).values() if edit.kernel in entry.name)
        jobs.append(_kernel(_edited(entry, edit), FAULTY_FLAGS))
    objects = _parallel(jobs)
    libraries = _parallel([functools.partial(_library, [file]) for file in objects])
    return [emulated._load(library) for library in libraries]


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


def _parallel(jobs: list[Callable[[], Path]]) -> list[Path]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: job(), jobs))


def _kernel(entry: translate.Entry, flags: list[str]) -> Callable[[], Path]:
    """The job of compiling a kernel."""
    headers = _precompiled(tuple(flags))
    command = [*emulated._compiler(), *flags, f"-I{headers}", *INCLUDES]
    file = _written(entry.name, translate.translate(entry))
    return functools.partial(_object, command, file, _digest(file, text=headers.name))


@functools.cache
def _precompiled(flags: tuple[str, ...]) -> Path:
    """A folder with the compiled header of all instructions, which is most of what a small kernel takes."""
    command = [*emulated._compiler(), *flags, *INCLUDES]
    header = HERE / "isa_wgmma.h"
    folder = CACHE / f"headers_{_digest(*_dependencies(command, header), text=shlex.join(command))}"
    if not folder.exists():
        partial = folder.with_suffix(f".{os.getpid()}")
        partial.mkdir(parents=True)
        emulated._run([*command, "-x", "c++-header", str(header), "-o"], partial / "isa_wgmma.h.gch")
        partial.rename(folder)
    return folder


@functools.cache
def _launchers() -> list[Path]:
    """The launchers and the binding, and what tells which kernels ran."""
    pybind11 = pytest.importorskip("pybind11", reason="the kernels are bound with pybind11")
    binding = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    command = [*emulated._compiler(), *LAUNCHER_FLAGS, *INCLUDES, *binding]
    files = [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "bindings.cpp", _written("report", REPORT)]
    return _parallel([functools.partial(_compile, command, file) for file in files])


def _library(compiled: list[Path]) -> Path:
    objects = [*_launchers(), *compiled]
    command = [*emulated._compiler(), *LAUNCHER_FLAGS, *INCLUDES]
    with LOCK:  # many edits of one kernel leave the same ones out
        objects.append(_compile(command, _written("missing", _missing(objects))))
    library = CACHE / f"_C_{_digest(*objects)}.so"
    if not library.exists():
        emulated._run([*emulated._compiler(), "-shared", *map(str, objects), "-o"], library)
    return library


@functools.cache
def _ptx() -> dict[str, Path]:
    """The PTX of each source file; all are made at once."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc to make PTX with")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    headers = sorted(file for folder in ("core", "cuda") for file in (CSRC / folder).glob("**/*.*h"))

    def make(source: str) -> Path:
        command = [nvcc, "-std=c++20", f"-I{CSRC}", f"-arch={ARCHITECTURES[source]}", "-ptx", str(CSRC / source)]
        digest = _digest(*headers, CSRC / source, text=version + shlex.join(command))
        target = CACHE / f"{Path(source).stem}_{digest}.ptx"
        if not target.exists():
            emulated._run([*command, "-o"], target)
        return target

    made = _parallel([functools.partial(make, source) for source in ARCHITECTURES])
    return dict(zip(ARCHITECTURES, made, strict=True))


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
    return _object(command, file, _digest(*_dependencies(command, file), text=shlex.join(command)))


def _dependencies(command: list[str], file: Path) -> list[Path]:
    """The file and all that it includes, but for the system's headers."""
    command = [*command, "-MM", "-x", "c++", str(file)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listing.replace("\\\n", " ").split()[1:]]


def _object(command: list[str], file: Path, digest: str) -> Path:
    target = CACHE / f"{file.stem[:120]}_{digest}.o"
    if not target.exists():
        emulated._run([*command, "-x", "c++", "-c", str(file), "-o"], target)
    return target


def _digest(*files: Path, text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
