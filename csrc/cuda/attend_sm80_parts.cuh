// What the blocks of attend for sm_80 work on (core/schedule.h), and how the parts of a query tile become
// one.
#pragma once
#include "core/schedule.h"
#include "cuda/attend.h"
#include "cuda/softmax.cuh"

namespace longlive {

constexpr int kAttendWarps = 4;
constexpr int kAttendThreads = kAttendWarps * kWarpSize;
// 32 rows a warp: with 16, every K and V fragment read from shared memory would serve half as many products,
// and shared memory instead of the tensor cores would set the pace.
constexpr int kAttendWarpRows = 32;
constexpr int kAttendRows = kAttendWarps * kAttendWarpRows;

constexpr int kAttendBlocks = 2;  // that run on a multiprocessor at a time

// Machine code for Hopper, which has a kernel of its own, differs in two ways, or ptxas would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr bool kForHopper = true;
#else
constexpr bool kForHopper = false;
#endif
// The kernel cuts if both it and the launcher do, so that either may decide against it alone.
constexpr bool kCutsLastWave = !kForHopper;

// A number that is the same in all threads; ptxas spills 52 bytes for Hopper unless it is told so, and 32 for
// sm_80 if it is.
__device__ __forceinline__ int uniform(int x) { return kForHopper ? __shfl_sync(kFullMask, x, 0) : x; }

// The tiles of the used pages, in the order of the table.
struct TileCursor {
  int entry, token;

  // Only where there is another page, or tile.
  __device__ __forceinline__ void next_page(const int32_t* slots) {
    do ++entry;
    while (slots[entry] < 0);
  }
  __device__ __forceinline__ void advance(int tile, int tokens, const int32_t* slots) {
    token += tile;
    if (token < tokens) return;
    token = 0;
    next_page(slots);
  }
};

// What a block works on. In shared memory, where it takes no registers from the accumulators.
struct AttendWork {
  int sample, head, first_row;
  TileCursor first;  // tile of keys
  int steps;         // tiles of keys
  int tile, part, parts;
  uint32_t arrived;  // parts of the query tile that were done before this one
};

// A thread's share of a partial result: its accumulators, and maximum and sum of its four rows.
template <int kHeadDim>
constexpr int kAttendPartial = kHeadDim + 8;

struct AttendSm80Parameters {
  AttendArguments a;
  int query_tiles;     // of one head of one sample
  float scale;         // of the scores, times log2(e): exponentials are powers of two
  int blocks;          // that run at a time; 1: no last wave is cut
  int units_a_sample;  // at most, like the next two; unit_count
  int sharers_a_sample, cut_a_sample;
  float* partials;    // [sample][cut tile][part][kAttendPartial][thread]
  uint32_t* arrived;  // [sample][cut tile]: parts that are done
};

// The first warp: what this block works on; no parts if there is nothing for it.
template <int kTile>
__device__ __forceinline__ void find_work(const AttendSm80Parameters& p, AttendWork& work) {
  const int lane = threadIdx.x % kWarpSize;
  const int sample = blockIdx.x / p.units_a_sample, unit = blockIdx.x % p.units_a_sample;
  const int32_t* slots = p.a.slots + sample * p.a.entries;
  int used = 0;
#pragma unroll 1
  for (int first = 0; first < p.a.entries; first += kWarpSize)
    used += __popc(__ballot_sync(kFullMask, first + lane < p.a.entries && slots[first + lane] >= 0));
  const int steps_per_page = (p.a.tokens + kTile - 1) / kTile, steps = used * steps_per_page;
  const int tiles = p.a.heads * p.query_tiles;
  const Schedule schedule =
      kCutsLastWave ? make_schedule_of_parts(tiles, steps, p.blocks) : Schedule{tiles, 0, 0};
  if (lane > 0) return;
  work.parts = 0;
  if (unit >= unit_count(schedule)) return;
  const Piece piece = piece_at(schedule, unit, 0);
  const int begin = step_at(piece.begin, piece.of, steps), end = step_at(piece.end, piece.of, steps);
  TileCursor first{-1, begin % steps_per_page * kTile};
#pragma unroll 1
  for (int page = 0; begin < end && page <= begin / steps_per_page; ++page) first.next_page(slots);
  work = {sample,
          piece.tile / p.query_tiles,
          piece.tile % p.query_tiles * kAttendRows,
          first,
          end - begin,
          piece.tile,
          piece.part,
          piece.parts,
          0};
}

// Leaves this part's result in the workspace. True in the last block of its query tile to be done: then `out`
// and `softmax` are those of all parts, merged in the order of their keys.
template <int kHeadDim>
__device__ __forceinline__ bool merge_parts(const AttendSm80Parameters& p, AttendWork& work,
                                            float (&out)[2][kHeadDim / 8][4],
                                            OnlineSoftmax (&softmax)[2][2]) {
  const int64_t first = int64_t(work.sample) * p.sharers_a_sample + work.tile * work.parts;
  float* partials = p.partials + first * kAttendPartial<kHeadDim> * kAttendThreads + threadIdx.x;
  const auto at = [&](int part, int i) -> float& {
    return partials[(part * kAttendPartial<kHeadDim> + i) * kAttendThreads];
  };
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) at(work.part, (m * kHeadDim / 8 + n) * 4 + i) = out[m][n][i];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      at(work.part, kHeadDim + 4 * m + 2 * half) = softmax[m][half].maximum;
      at(work.part, kHeadDim + 4 * m + 2 * half + 1) = softmax[m][half].sum;
    }
  }
  __threadfence();
  __syncthreads();  // all of this part is there
  if (threadIdx.x == 0) work.arrived = atomicAdd(&p.arrived[work.sample * p.cut_a_sample + work.tile], 1u);
  __syncthreads();  // the count is there
  if (work.arrived + 1 < static_cast<uint32_t>(work.parts)) return false;
  __threadfence();

#pragma unroll
  for (int m = 0; m < 2; ++m) {
    softmax[m][0] = softmax[m][1] = {};
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[m][n][i] = 0.0f;
  }
#pragma unroll 1
  for (int part = 0; part < work.parts; ++part)
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float keep[2], add[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float maximum = at(part, kHeadDim + 4 * m + 2 * half);
        keep[half] = softmax[m][half].raise(maximum, p.scale);
        add[half] = softmax[m][half].weight(maximum, p.scale);
        softmax[m][half].sum += add[half] * at(part, kHeadDim + 4 * m + 2 * half + 1);
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          out[m][n][i] = out[m][n][i] * keep[i / 2] + add[i / 2] * at(part, (m * kHeadDim / 8 + n) * 4 + i);
    }
  return true;
}

}  // namespace longlive
