// The k best of many scores, in an order that has no ties.
#pragma once
#include <cstdint>

#include "core/platform.cuh"

namespace longlive {

// A score and its index as one number: the higher score is the larger, of equal scores the lower index. Every
// candidate has another number, so whatever the order of comparisons the result is the same. 0 is no
// candidate.
using RankingKey = unsigned long long;

__device__ __forceinline__ RankingKey ranking_key(float score, int index) {
  const unsigned bits = __float_as_uint(score + 0.0f);  // -0 becomes 0, which it equals
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return RankingKey(ordered) << 32 | ~static_cast<unsigned>(index);
}

__device__ __forceinline__ float ranking_score(RankingKey key) {
  const auto ordered = static_cast<unsigned>(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ int ranking_index(RankingKey key) {
  return static_cast<int>(~static_cast<unsigned>(key));
}

// The best 32 * kRegisters numbers a warp has seen, in descending order: place 32 * r + lane is in entry[r]
// of the lane.
template <int kRegisters>
struct RankedList {
  static constexpr int kSize = kRegisters * kWarpSize;
  RankingKey entry[kRegisters] = {};

  __device__ __forceinline__ RankingKey at(int place) const {
    RankingKey found = 0;
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      const RankingKey candidate = __shfl_sync(kFullMask, entry[r], place % kWarpSize);
      if (place / kWarpSize == r) found = candidate;
    }
    return found;
  }

  // Takes in one number, the same in every lane.
  __device__ __forceinline__ void insert(RankingKey key) {
    const int lane = threadIdx.x % kWarpSize;
    int place = 0;
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) place += __popc(__ballot_sync(kFullMask, entry[r] > key));
    RankingKey from_left = 0;  // the last entry of the register before
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      const RankingKey last = __shfl_sync(kFullMask, entry[r], kWarpSize - 1);
      const RankingKey shifted = __shfl_up_sync(kFullMask, entry[r], 1);
      const int here = r * kWarpSize + lane;
      if (here > place) entry[r] = lane == 0 ? from_left : shifted;
      if (here == place) entry[r] = key;
      from_left = last;
    }
  }

  // Keeps the best of this list and another one. The larger of each entry and the other's counterpart from
  // the end are the best of both, first rising, then falling (or the reverse); a bitonic merge puts them in
  // order.
  __device__ __forceinline__ void merge(const RankedList& other) {
    const int lane = threadIdx.x % kWarpSize;
    RankingKey reversed[kRegisters];
#pragma unroll
    for (int r = 0; r < kRegisters; ++r)
      reversed[r] = __shfl_xor_sync(kFullMask, other.entry[kRegisters - 1 - r], kWarpSize - 1);
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) entry[r] = max(entry[r], reversed[r]);
    if constexpr (kRegisters == 2) {
      const RankingKey larger = max(entry[0], entry[1]);
      entry[1] = min(entry[0], entry[1]);
      entry[0] = larger;
    }
    static_assert(kRegisters <= 2, "one exchange between registers is enough for 64 places");
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        const RankingKey partner = __shfl_xor_sync(kFullMask, entry[r], distance);
        entry[r] = lane & distance ? min(entry[r], partner) : max(entry[r], partner);
      }
  }

  __device__ __forceinline__ void store(RankingKey* places) const {
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) places[r * kWarpSize + threadIdx.x % kWarpSize] = entry[r];
  }

  __device__ __forceinline__ void load(const RankingKey* places) {
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) entry[r] = places[r * kWarpSize + threadIdx.x % kWarpSize];
  }

  // From global memory that other blocks have written: not out of this multiprocessor's own cache.
  __device__ __forceinline__ void load_from_grid(const RankingKey* places) {
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) entry[r] = __ldcg(places + r * kWarpSize + threadIdx.x % kWarpSize);
  }
};

}  // namespace longlive
