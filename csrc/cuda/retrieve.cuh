// Every warp streams its share of the keys past the query and keeps a ranked list; a block merges the lists
// of its warps, and the last block of a sample to finish merges those of all blocks and writes the result.
// One launch.
#pragma once
#include "core/reduce.cuh"
#include "core/scalar.cuh"
#include "core/topk.cuh"
#include "cuda/retrieve.h"

namespace longlive {

constexpr int kRetrieveWarps = 8;
constexpr int kRetrieveThreads = kRetrieveWarps * kWarpSize;
// Keys a warp reads side by side: four 16-byte loads are under way for each load of the query, 32 KB on a
// multiprocessor with two blocks. By the product of bandwidth and latency, unmeasured.
constexpr int kRetrieveKeys = 4;

template <int kRegisters>
struct RetrieveShared {
  float query[kRetrieveMaxWidth];  // of unit length
  RankingKey lists[kRetrieveWarps / 2][RankedList<kRegisters>::kSize];
  float partial[kRetrieveWarps];
  bool is_last;
};

// Where the blocks of a sample meet.
struct RetrieveScratch {
  unsigned* finished_blocks;  // [batch], zero at the launch
  RankingKey* lists;          // [batch][blocks of a sample], each of the size of a list
};

// Leaves the best of all warps in the first one.
template <int kRegisters>
__device__ __forceinline__ void merge_warps(RankedList<kRegisters>& best,
                                            RetrieveShared<kRegisters>& shared) {
  const int warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int half = kRetrieveWarps / 2; half > 0; half /= 2) {
    if (warp >= half && warp < 2 * half) best.store(shared.lists[warp - half]);
    __syncthreads();
    if (warp < half) {
      RankedList<kRegisters> other;
      other.load(shared.lists[warp]);
      best.merge(other);
    }
    __syncthreads();
  }
}

// Grid: (blocks of a sample, batch).
template <class T, int kRegisters>
__global__ void __launch_bounds__(kRetrieveThreads)
    retrieve_kernel(const RetrieveArguments a, const RetrieveScratch scratch) {
  using Chunk = Vector<T>;
  auto& shared = shared_memory<RetrieveShared<kRegisters>>();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, sample = blockIdx.y;
  const int first = max(a.first[sample * a.first_stride], 0),
            last = min(a.last[sample * a.last_stride], a.count);
  const int chunks = a.width / Chunk::kSize;

  const T* query = static_cast<const T*>(a.query) + int64_t(sample) * a.width;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < a.width; i += kRetrieveThreads) {
    const float x = to_float(query[i]);
    shared.query[i] = x;
    squares += x * x;
  }
  const float norm = sqrtf(block_sum(squares, shared.partial));
  const float inverse_query_norm = 1.0f / fmaxf(norm, 1e-12f);
  for (int i = threadIdx.x; i < a.width; i += kRetrieveThreads) shared.query[i] *= inverse_query_norm;
  __syncthreads();

  const T* keys = static_cast<const T*>(a.keys) + sample * a.keys_batch_stride;
  const float* inverse_norms = a.inverse_norms + sample * a.norms_batch_stride;
  RankedList<kRegisters> best;
  RankingKey threshold = 0;  // the k-th best so far
  const int64_t step = int64_t(gridDim.x) * kRetrieveWarps * kRetrieveKeys;
  for (int64_t base = first + int64_t(blockIdx.x * kRetrieveWarps + warp) * kRetrieveKeys; base < last;
       base += step) {
    // Past the end the last key is read again, and its score is dropped below.
    const T* row[kRetrieveKeys];
#pragma unroll
    for (int i = 0; i < kRetrieveKeys; ++i) row[i] = keys + min(base + i, int64_t(last - 1)) * a.keys_stride;
    float dot[kRetrieveKeys] = {};
#pragma unroll 2
    for (int chunk = lane; chunk < chunks; chunk += kWarpSize) {
      Chunk key[kRetrieveKeys];
#pragma unroll
      for (int i = 0; i < kRetrieveKeys; ++i) key[i] = reinterpret_cast<const Chunk*>(row[i])[chunk];
#pragma unroll
      for (int j = 0; j < Chunk::kSize; ++j) {
        const float x = shared.query[chunk * Chunk::kSize + j];
#pragma unroll
        for (int i = 0; i < kRetrieveKeys; ++i) dot[i] += to_float(key[i].element[j]) * x;
      }
    }
#pragma unroll
    for (int i = 0; i < kRetrieveKeys; ++i) {
      const float score = warp_sum(dot[i]) * (base + i < last ? inverse_norms[base + i] : 0.0f);
      const RankingKey key = ranking_key(score, static_cast<int>(base + i));
      if (base + i < last && score > -INFINITY && key > threshold) {  // false for NaN
        best.insert(key);
        threshold = best.at(a.k - 1);
      }
    }
  }
  merge_warps(best, shared);

  constexpr int kListSize = RankedList<kRegisters>::kSize;
  RankingKey* lists = scratch.lists + int64_t(sample) * gridDim.x * kListSize;
  if (warp == 0) {
    best.store(lists + blockIdx.x * kListSize);
    __threadfence();  // the list is visible to whoever sees the counter
    __syncwarp();
    if (lane == 0) shared.is_last = atomicAdd(scratch.finished_blocks + sample, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!shared.is_last) return;

  __threadfence();
  best = {};
  for (unsigned block = warp; block < gridDim.x; block += kRetrieveWarps) {
    RankedList<kRegisters> other;
    other.load_from_grid(lists + block * kListSize);
    best.merge(other);
  }
  merge_warps(best, shared);
  if (warp != 0) return;
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    const int place = r * kWarpSize + lane;
    if (place >= a.k) break;
    const bool found = best.entry[r] != 0;
    a.indices[sample * a.k + place] = found ? ranking_index(best.entry[r]) : -1;
    a.similarity[sample * a.k + place] = found ? ranking_score(best.entry[r]) : -INFINITY;
  }
}

}  // namespace longlive
