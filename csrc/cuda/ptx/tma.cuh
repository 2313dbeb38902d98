// The tensor memory accelerator: one instruction copies a box of a tensor to shared memory (sm_90).
#pragma once
#include "cuda/ptx/mbarrier.cuh"
#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace longlive::ptx {

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = simt::TensorMap;
#endif

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  static_cast<void>(map);
#endif
}

// Copies the box whose first element has these coordinates, the fastest dimension first. `barrier` is told of
// the whole box's bytes when all is there; what lies outside of the tensor arrives as zeros.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0,
                                         int c1, int c2, int c3, int c4) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
#elif !defined(__CUDACC__)
  simt::tma_load(shared, *map, barrier, {c0, c1, c2, c3, c4});
#endif
}

}  // namespace longlive::ptx
