"""What an installation promises: its names, its light import, the extension's facts, and files written whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import longlive_rag
from longlive_rag import native
from longlive_rag.files import atomic_path, check_writable, output_folder, write_json


def test_every_public_name_can_be_imported() -> None:
    for name in longlive_rag.__all__:
        assert getattr(longlive_rag, name) is not None
        assert name in dir(longlive_rag)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="retrival"):
        _ = longlive_rag.retrival


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what a process has loaded")
def test_the_extension_needs_neither_torch_nor_a_driver_to_be_imported() -> None:
    probe = (
        "import json, sys, longlive_rag._C\n"
        "files = {line.split()[-1].rsplit('/', 1)[-1] for line in open('/proc/self/maps')}\n"
        "print(json.dumps(['torch' in sys.modules, sorted(f for f in files if f.startswith(('libcuda', 'libtorch')))]))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, []]


def test_kernels_for_every_supported_gpu_are_built() -> None:
    status = native.cuda_status()
    if not status.built:
        pytest.skip(f"CUDA kernels: {status.reason}")
    if os.environ.get("CUDAARCHS"):
        pytest.skip("CUDAARCHS narrows the architectures on purpose")
    for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1), (13, 0)]:
        assert any(native.runs_on(architecture, capability) for architecture in status.architectures), capability
    assert "sm_90a" in status.architectures


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_80", (9, 0), False),
        ("sm_86", (8, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False),
        ("sm_100", (10, 3), True),
        ("sm_100f", (10, 3), True),
        ("sm_100f", (12, 0), False),
        ("compute_90", (12, 0), True),
        ("compute_90a", (12, 0), False),
        ("compute_120", (10, 0), False),
        ("compute_120", (12, 1), True),
    ],
)
def test_which_code_runs_on_which_gpu(architecture: str, capability: tuple[int, int], runs: bool) -> None:
    assert native.runs_on(architecture, capability) is runs


def test_a_name_that_is_no_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="'90a'"):
        native.runs_on("90a", (9, 0))


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    module: SimpleNamespace | None,
    torch_cuda: str | None = "13.0",
    gpu: bool = True,
    capability: tuple[int, int] = (9, 0),
) -> None:
    monkeypatch.setattr(native, "_load", lambda: (module, "" if module else "could not be imported: no such file"))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *index: "a GPU")


def extension(cuda: str | None = "13.0", driver: int = 13000, architectures: str = "sm_80 sm_90a") -> SimpleNamespace:
    return SimpleNamespace(cuda_version=cuda, cuda_architectures=architectures, cuda_driver_version=lambda: driver)


@pytest.mark.parametrize(
    ("machine", "built", "reason"),
    [
        ({"module": None}, False, "could not be imported: no such file"),
        ({"module": extension(cuda=None)}, False, "built without CUDA"),
        ({"module": extension(), "torch_cuda": None}, True, "is built without CUDA"),
        ({"module": extension(driver=0)}, True, "no NVIDIA driver was found"),
        ({"module": extension(driver=12080)}, True, "built with CUDA 13.0, but the driver supports only CUDA 12.8"),
        ({"module": extension(), "gpu": False}, True, "torch finds no usable NVIDIA GPU"),
        ({"module": extension(), "capability": (7, 5)}, True, "a GPU has compute capability 7.5"),
        ({"module": extension(cuda="12.4", driver=12020)}, True, None),
        ({"module": extension(driver=13010), "capability": (8, 9)}, True, None),
    ],
)
def test_the_reason_why_the_kernels_cannot_be_used(
    machine: dict[str, Any], built: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **machine)
    status = native.cuda_status()
    assert status.built is built
    assert status.available is (reason is None)
    assert reason is None or reason in str(status.reason)


@pytest.mark.parametrize(
    ("machine", "used"),
    [
        ({"module": None}, False),
        ({"module": extension(cuda=None)}, False),
        ({"module": extension(), "torch_cuda": None}, False),  # ROCm, whose devices are called cuda too
        ({"module": extension(driver=0)}, False),
        ({"module": extension(driver=12080)}, False),
        ({"module": extension(), "capability": (7, 5)}, False),
        ({"module": extension(architectures="sm_90a"), "capability": (8, 0)}, False),
        ({"module": extension()}, True),
    ],
)
def test_what_the_kernels_cannot_run_on_is_left_to_pytorch(
    machine: dict[str, Any], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **machine)
    native.kernels_on.cache_clear()
    try:
        assert (native.kernels_on(torch.device("cuda", 0)) is not None) is used
        assert native.kernels_on(torch.device("cpu")) is None
    finally:
        native.kernels_on.cache_clear()


DRIVER = """
#include <cstdio>
extern "C" int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
extern "C" int cuInit(unsigned) { std::puts("initialised"); return 100; }
"""


def test_asking_for_the_driver_does_not_initialise_cuda(tmp_path: Path) -> None:
    """With a driver of our own: a process that has imported the package may still fork, or choose its devices."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if native.kernels() is None or compiler is None:
        pytest.skip("needs an extension with CUDA kernels, and a C++ compiler")
    source = tmp_path / "driver.cpp"
    source.write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True, timeout=120)
    probe = "import longlive_rag.ops, longlive_rag._C as _C; print(_C.cuda_driver_version())"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["13000"]


@pytest.mark.cuda
def test_the_kernels_are_available_where_torch_has_a_gpu() -> None:
    status = native.cuda_status()
    assert status.available
    assert status.reason is None
    assert native.kernels_on(torch.device("cuda", torch.cuda.current_device())) is not None


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half"), atomic_path(path) as partial:
        assert partial.parent == tmp_path
        assert partial.suffix == path.suffix
        partial.write_text("ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    with atomic_path(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_json_without_numbers_that_json_lacks(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"accuracy": 0.5})
    assert json.loads(path.read_text()) == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"accuracy": float("nan")})
    assert json.loads(path.read_text()) == {"accuracy": 0.5}


def test_outputs_that_cannot_be_written_are_refused_beforehand(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        check_writable(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        check_writable(tmp_path / "missing" / "report.json")
    with pytest.raises(NotADirectoryError, match="file"):
        output_folder(file)
    with pytest.raises(OSError, match="file"):
        output_folder(file / "below")
    assert output_folder(tmp_path / "a" / "b").is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=re.escape(str(tmp_path))):
        check_writable(tmp_path / "report.json")
    with pytest.raises(PermissionError, match=re.escape(str(tmp_path))):
        output_folder(tmp_path)
