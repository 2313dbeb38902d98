// What warpgroups arrange among each other: registers and named barriers (sm_90a).
#pragma once
#include "core/platform.cuh"

namespace longlive::ptx {

// Registers of each thread of the calling warpgroup from now on. ptxas ignores it, with warning C7508, unless
// the kernel has __launch_bounds__(threads, 1).
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "as setmaxnreg takes it");
#ifdef __CUDA_ARCH__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "as setmaxnreg takes it");
#ifdef __CUDA_ARCH__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Named barrier `id` (1 to 15; 0 is __syncthreads) of `threads` threads in all, arriving and waiting ones.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
#ifdef __CUDA_ARCH__
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#elif !defined(__CUDACC__)
  simt::barrier_sync(id, threads);
#endif
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
#ifdef __CUDA_ARCH__
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#elif !defined(__CUDACC__)
  simt::barrier_arrive(id, threads);
#endif
}

}  // namespace longlive::ptx
