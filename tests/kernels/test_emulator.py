"""The emulator itself: what it must catch, it catches, and its half-precision numbers are those of PyTorch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from support import emulated

PROGRAM = r"""
#include "core/platform.cuh"
#include "cuda/ptx/cp_async.cuh"

#include <cstdio>
#include <string>

using namespace longlive;

struct Plan {
  float x[256];
};

// Reverses 256 numbers through shared memory and sums those of each warp, with one fault by choice.
__global__ void reverse_and_sum(const float* in, float* out, std::string fault) {
  Plan& shared = shared_memory<Plan>();
  const int thread = threadIdx.x;
  if (thread < 64) ptx::cp_async_16(&shared.x[4 * thread], in + 4 * thread, true);
  ptx::cp_async_commit();
  if (fault != "no wait") ptx::cp_async_wait<0>();
  if (fault != "no barrier") __syncthreads();
  float sum = shared.x[255 - thread];
  if (fault == "early exit" && thread == 7) return;
  if (fault == "divergence" && thread == 7) __ballot_sync(kFullMask, true);
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullMask, sum, distance);
  if (fault == "overrun") shared.x[256 + thread % 8] = 0.0f;
  out[thread] = sum;
}

int main(int count, char** arguments) {
  if (count == 1) {  // every half-precision number, and the middle between it and the next
    for (unsigned bits = 0; bits < 65536; ++bits) {
      const __half half{static_cast<uint16_t>(bits)};
      const __nv_bfloat16 brain{static_cast<uint16_t>(bits)};
      const float middle = __uint_as_float(bits << 16 | 0x8000);
      printf("%a %a %u %u %u\n", __half2float(half), __bfloat162float(brain), __float2half_rn(middle).bits,
             __float2bfloat16_rn(middle).bits, __float2half_rn(__half2float(half)).bits);
    }
    return 0;
  }
  std::vector<float> in(256), out(256);
  for (int i = 0; i < 256; ++i) in[i] = i;
  try {
    launch("test", reverse_and_sum, dim3(2), 256, sizeof(Plan), nullptr, (const float*)in.data(), out.data(),
           std::string(arguments[1]));
  } catch (const std::exception& error) {
    puts(error.what());
    return 0;
  }
  bool right = true;
  for (int i = 0; i < 256; ++i) right = right && out[i] == 32 * (255 - i / 32 * 32) - 496;
  puts(right ? "right" : "wrong");
}
"""


@pytest.fixture(scope="module")
def program() -> Path:
    return emulated.program("emulator_test", PROGRAM)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ("none", "right"),
        ("no wait", "wrong"),
        ("no barrier", "wrong"),
        ("early exit", "deadlock: thread"),
        ("divergence", "threads of one group meet in"),
        ("overrun", "a store went past the end of shared memory"),
    ],
)
def test_faults_are_caught(program: Path, fault: str, verdict: str, order: str) -> None:
    environment = {**os.environ, "SIMT_ORDER": order}
    result = subprocess.run([program, fault], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.startswith(verdict)


def test_half_precision_numbers(program: Path) -> None:
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split() for line in lines]
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    for column, dtype in ((0, torch.float16), (1, torch.bfloat16)):
        value = torch.tensor([float.fromhex(row[column]) for row in rows])
        torch.testing.assert_close(value, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    middle = (torch.arange(65536, dtype=torch.int64) << 16 | 0x8000).to(torch.uint32).view(torch.float32)
    number = ~middle.isnan()
    for column, dtype in ((2, torch.float16), (3, torch.bfloat16)):
        rounded = torch.tensor([int(row[column]) for row in rows], dtype=torch.int32)
        expected = middle.to(dtype).view(torch.int16).int() & 0xFFFF
        assert torch.equal(rounded[number], expected[number])
    again = torch.tensor([int(row[4]) for row in rows], dtype=torch.int32)
    number = ~bits.view(torch.float16).isnan()
    assert torch.equal(again[number], bits.int()[number])
