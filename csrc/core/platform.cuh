// What a kernel body is compiled against: CUDA by nvcc, the emulator by any other compiler.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#else
#include "emulator/cuda_names.h"
#endif

namespace longlive {

#ifdef __CUDACC__
constexpr unsigned kFullMask = 0xffffffffu;
#endif
constexpr int kWarpSize = 32;

// The block's dynamic shared memory as the kernel's named plan.
template <class Plan>
__device__ __forceinline__ Plan& shared_memory() {
#ifdef __CUDACC__
  // 1024: the 128-byte swizzle repeats after 8 rows
  extern __shared__ __align__(1024) unsigned char memory[];
  return *reinterpret_cast<Plan*>(memory);
#else
  return *reinterpret_cast<Plan*>(simt::block->shared);
#endif
}

#ifdef __CUDACC__
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the runtime remembers it, and the next launch would report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
#endif

// Launches `kernel` with `shared_bytes` of dynamic shared memory. Throws std::runtime_error naming the kernel
// if CUDA refuses; nothing waits for the device.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            cudaStream_t stream, const Parameters&... parameters) {
#ifdef __CUDACC__
  if (shared_bytes > 48 * 1024)  // the size every kernel may have without asking
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  kernel<<<grid, threads, shared_bytes, stream>>>(parameters...);
  check(cudaGetLastError(), name);
#else
  static_cast<void>(name), static_cast<void>(stream);
  simt::launch(grid, dim3(threads), shared_bytes, [&] { kernel(parameters...); });
#endif
}

}  // namespace longlive
