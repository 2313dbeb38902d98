// In place of csrc/core/platform.cuh where the launchers are compiled for translated PTX: `launch` calls the
// kernel that was made from PTX. Its symbol is that of the C++ kernel, whose own definition is weak here and
// thrown away.
#pragma once
#include "emulator/cuda_names.h"
#include "launch.h"

#undef __global__
#define __global__ __attribute__((weak, noipa))

namespace longlive {

constexpr int kWarpSize = 32;

// For the C++ bodies, which are compiled and never run.
template <class Plan>
Plan& shared_memory() {
  return *reinterpret_cast<Plan*>(simt::block->shared);
}

template <class... Parameters>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            cudaStream_t, const Parameters&... parameters) {
  const auto translated = reinterpret_cast<void (*)(const ptx::Launch&)>(reinterpret_cast<void*>(kernel));
  translated({grid,
              static_cast<unsigned>(threads),
              shared_bytes,
              {ptx::Argument{&parameters, sizeof parameters, alignof(Parameters)}...}});
}

}  // namespace longlive
