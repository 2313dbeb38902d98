// Barriers in shared memory that count threads and bytes (sm_90).
#pragma once
#include "core/platform.cuh"
#ifndef __CUDACC__
#include "emulator/hopper.h"
#endif

namespace longlive::ptx {

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#else
using simt::shared_address;
#endif

// A phase ends when `arrivals` threads have arrived and all expected bytes have come.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
#ifdef __CUDA_ARCH__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
#elif !defined(__CUDACC__)
  simt::mbarrier_init(barrier, arrivals);
#endif
}

// Makes initialised barriers visible to the copy engine; a block barrier still has to follow.
__device__ __forceinline__ void mbarrier_init_fence() {
#ifdef __CUDA_ARCH__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#ifdef __CUDA_ARCH__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#elif !defined(__CUDACC__)
  simt::mbarrier_arrive(barrier, 0);
#endif
}

// Arrives, and lets the phase wait for that many bytes of bulk copies besides.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
#ifdef __CUDA_ARCH__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
#elif !defined(__CUDACC__)
  simt::mbarrier_arrive(barrier, bytes);
#endif
}

// Waits until the phase of this parity (0, 1, 0, ..) is over. Parity 1 of a new barrier is: the phase before
// the first counts as past.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#elif !defined(__CUDACC__)
  simt::mbarrier_wait(barrier, parity);
#endif
}

}  // namespace longlive::ptx
