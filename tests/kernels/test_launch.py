"""The compiled extension where no kernel can run: it loads, and a launch says what is wrong."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from longlive_rag import native
from support.emulated import CSRC

RUNTIME = """
#pragma once
#define __host__
#define __device__
#define __forceinline__ inline
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
using cudaError_t = int;
using cudaStream_t = void*;
struct dim3 {};
enum { cudaSuccess = 0, cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t last = 0;
inline cudaError_t cudaGetLastError() { const cudaError_t was = last; last = 0; return was; }
inline const char* cudaGetErrorString(cudaError_t) { return "refused"; }
template <class F> cudaError_t cudaFuncSetAttribute(F, int, int bytes) { return last = bytes > 100000; }
"""
PROGRAM = """
#include "platform.cuh"
#include <cstdio>
int main() {
  void (*kernel)() = [] {};
  try { longlive::launch("first", kernel, dim3{}, 1, 200000, nullptr); return 1; }
  catch (const std::runtime_error& error) { std::puts(error.what()); }
  longlive::launch("second", kernel, dim3{}, 1, 0, nullptr);
  std::puts("second launched");
}
"""


def test_launch_without_a_gpu_raises() -> None:
    kernels = native.kernels()
    if kernels is None:
        pytest.skip(f"no CUDA kernels: {native.cuda_status().reason}")
    if native.cuda_status().available:
        pytest.skip("there is a GPU, on which a launch would succeed")
    rows, no_queries = (16, 64, 64, 64, 0, False), (0, 0, 0, 0, 0, False)
    with pytest.raises(RuntimeError, match="(driver|device)"):
        kernels.insert(rows, rows, no_queries, 16, 16, 0, 16, 16, (1, 1, 1, 1, 64), 0, 2, 1e-6, 0, 0)


def test_a_refused_launch_does_not_fail_the_next(tmp_path: Path) -> None:
    """The runtime remembers its last error until it is asked for. It is a double here; the launcher is the real one."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = (CSRC / "core" / "platform.cuh").read_text()
    assert source.count("<<<grid, threads, shared_bytes, stream>>>") == 1
    (tmp_path / "platform.cuh").write_text(source.replace("<<<grid, threads, shared_bytes, stream>>>", ""))
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    for name in ("cuda_bf16.h", "cuda_fp16.h"):
        (tmp_path / name).touch()
    program = tmp_path / "program.cpp"
    program.write_text(PROGRAM)
    command = [compiler, "-std=c++20", "-D__CUDACC__", f"-I{tmp_path}", str(program), "-o", str(tmp_path / "program")]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["first: refused", "second launched"]
