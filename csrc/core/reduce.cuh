// Sums and maxima over a quad of lanes, a warp and a block, the same in every thread and in every run.
#pragma once
#include "core/platform.cuh"

namespace longlive {

// Over four neighbouring lanes: those that hold one row of a matrix product.
__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kFullMask, value, 1));
  return fmaxf(value, __shfl_xor_sync(kFullMask, value, 2));
}
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(kFullMask, value, 1);
  return value + __shfl_xor_sync(kFullMask, value, 2);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kFullMask, value, distance);
  return value;
}

// `partial` is shared memory for one number a warp, not used again before the next barrier.
__device__ __forceinline__ float block_sum(float value, float* partial) {
  const int lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  value = warp_sum(value);
  if (lane == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

}  // namespace longlive
