// Where a frame's tokens lie: pages [slot][head][token][dim].
#pragma once
#include <cstdint>

#include "core/platform.cuh"

namespace longlive {

// Offset, in elements, of one token of one head. 64 bits: a bank of 250 frames of Wan 14B passes 2^31
// elements.
__host__ __device__ __forceinline__ int64_t page_offset(int64_t slot, int head, int token, int heads,
                                                        int tokens, int head_dim) {
  return ((slot * heads + head) * tokens + token) * head_dim;
}

}  // namespace longlive
