// Asynchronous copies from global to shared memory (sm_80).
#pragma once
#include "core/platform.cuh"
#ifndef __CUDACC__
#include "emulator/ampere.h"
#endif

namespace longlive::ptx {

// Copies 16 bytes, past the L1 cache; `valid` = false writes zeros instead and does not read the source.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#ifdef __CUDA_ARCH__
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#elif !defined(__CUDACC__)
  simt::cp_async_16(shared, global, valid);
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  simt::current_thread().copies.commit();
#endif
}

// Waits until at most `kGroupsLeft` of the calling thread's groups are still under way.
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#elif !defined(__CUDACC__)
  simt::current_thread().copies.wait(kGroupsLeft);
#endif
}

}  // namespace longlive::ptx
