// attend for sm_80 and newer: one block takes 128 query rows of one head through all tokens of all used
// pages, or through a part of them: what would be an incomplete last wave of blocks is cut along the keys
// (core/schedule.h), and the last block of a query tile to finish merges the parts in the order of their
// keys.
//
// The keys carry no temporal rotation. When a block comes to a page, each warp turns the temporal pairs of
// its own query rows by the distance in time to that page, always from the unrotated query in global memory,
// so nothing drifts; the rest of the loop is attention as ever. K and V arrive by cp.async in turns: V while
// the scores are computed, the next K under softmax and the second product.
#pragma once
#include "core/pages.cuh"
#include "core/rotation.cuh"
#include "cuda/attend_sm80_parts.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"

namespace longlive {

template <class T, int kHeadDim, int kTile>
struct AttendShared {
  T q[kAttendRows * kHeadDim];  // temporal pairs rotated for the current page; at the end the output
  T k[kTile * kHeadDim];
  T v[kTile * kHeadDim];
  AttendWork work;
};

// A row's 16-byte chunks are stored in the order chunk ^ (row % 8): the eight rows of an 8 x 8 matrix then
// lie in different banks.
template <int kHeadDim>
__device__ __forceinline__ int swizzled(unsigned row, unsigned chunk) {
  static_assert(kHeadDim % 64 == 0, "a row must have a multiple of eight chunks");
  return row * kHeadDim + (chunk ^ (row % 8)) * 8;
}

// Where a lane begins in the tiles that ldmatrix reads. A step of 16 columns is two chunks further, which in
// the swizzled order is an exclusive or of the offset with 16 times the step. 16 more rows leave the row
// modulo 8, and with it the order of the chunks, as it is.
template <int kHeadDim>
struct FragmentOffset {
  int offset;
  // Opaque to the compiler, which would otherwise keep every step's offset in a register of its own.
  __device__ __forceinline__ FragmentOffset(int row, int chunk)
      : offset(ptx::opaque(swizzled<kHeadDim>(row, chunk))) {}
  __device__ __forceinline__ int operator()(int row, int column) const {
    return (offset ^ column) + row * kHeadDim;
  }
};

// Copies `kRows` consecutive rows, of which the first `rows_left` exist; the others become zeros.
template <class T, int kHeadDim, int kRows, int kThreads>
__device__ __forceinline__ void load_rows(T* shared, const T* global, int64_t stride, int rows_left,
                                          unsigned thread) {
  constexpr int kChunks = kHeadDim / 8, kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kRowsAtOnce == 0,
                "every thread copies equally many chunks");
  const unsigned first_row = thread / kChunks, chunk = thread % kChunks;
  rows_left -= static_cast<int>(first_row);
  global += first_row * stride + chunk * 8;
#pragma unroll
  for (int row = 0; row < kRows; row += kRowsAtOnce)
    ptx::cp_async_16(shared + swizzled<kHeadDim>(first_row + row, chunk), global + row * stride,
                     row < rows_left);
}

// A warp's rows. Looked up again at every page, which leaves registers to the accumulators.
struct AttendRows {
  int head, sample, first_row;

  __device__ __forceinline__ AttendRows(const AttendWork& work)
      : head(work.head),
        sample(work.sample),
        first_row(work.first_row + ptx::opaque(threadIdx.x) / kWarpSize * kAttendWarpRows) {}

  // Offset of a row of the query or the output from the warp's first.
  __device__ __forceinline__ int64_t offset(const AttendArguments& a, int row, int head_dim) const {
    return ((int64_t(sample) * a.length + first_row + row) * a.heads + head) * head_dim;
  }
};

// Writes a warp's query rows to `shared` with their temporal pairs turned by the distance to a page at
// `position`.
template <class T, int kHeadDim>
__device__ __forceinline__ void rotate_query(T* shared, const AttendArguments& a, const AttendRows& mine,
                                             int position) {
  const T* q = static_cast<const T*>(a.q) + mine.offset(a, 0, kHeadDim);
  const int first_row = mine.first_row, stride = a.heads * kHeadDim;
  const int32_t* query_position = a.query_position + mine.sample * (a.length / a.tokens);
  constexpr int kBatch = 4;  // loads under way at a time
  const int rows = min(kAttendWarpRows, a.length - first_row);
  for (int pair = threadIdx.x % kWarpSize; pair < a.pairs; pair += kWarpSize)
    for (int row = 0, end; row < rows; row = end) {  // the rows of one frame
      const int frame = (first_row + row) / a.tokens;
      end = min(rows, (frame + 1) * a.tokens - first_row);
      const double distance = static_cast<double>(query_position[frame]) - position;
      const float2 rotation = temporal_rotation(distance, a.frequencies[pair]);
#pragma unroll 1
      for (int first = row; first < end; first += kBatch) {
        uint32_t unrotated[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (first + i < end)
            unrotated[i] = *reinterpret_cast<const uint32_t*>(q + (first + i) * stride + 2 * pair);
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (first + i < end) {
            const float2 turned = rotate(unpack2<T>(unrotated[i]), rotation);
            T* target = shared + swizzled<kHeadDim>(first + i, pair / 4) + pair % 4 * 2;
            *reinterpret_cast<uint32_t*>(target) = ptx::pack2<T>(turned.x, turned.y);
          }
      }
    }
}

// Grid: the units of a sample, by heads, so that blocks that run together read the same pages; then batch.
// The accumulators take up to 192 of 255 registers; what can be had again from shared memory and the thread
// index is therefore not kept over the loop (`ptx::opaque`).
template <class T, int kHeadDim, int kTile>
__global__ void __launch_bounds__(kAttendThreads, kAttendBlocks) attend_kernel(const AttendSm80Parameters p) {
  auto& shared = shared_memory<AttendShared<T, kHeadDim, kTile>>();
  const AttendArguments& a = p.a;
  if (threadIdx.x < kWarpSize) find_work<kTile>(p, shared.work);
  __syncthreads();  // the work is known
  if (shared.work.parts == 0) return;
  const auto table = [&] { return a.slots + shared.work.sample * a.entries; };
  // `thread` opaque each time: offsets would otherwise be kept from one load to the next, and spilled.
  const auto load_tile = [&](T* target, const void* pages, const TileCursor& tile, unsigned thread) {
    const T* source = static_cast<const T*>(pages) + page_offset(table()[tile.entry], shared.work.head,
                                                                 tile.token, a.heads, a.tokens, kHeadDim);
    load_rows<T, kHeadDim, kTile, kAttendThreads>(target, source, kHeadDim, a.tokens - tile.token, thread);
  };

  TileCursor tile{uniform(shared.work.first.entry), uniform(shared.work.first.token)};
  int steps = uniform(shared.work.steps);
  {
    const AttendRows mine(shared.work);
    load_rows<T, kHeadDim, kAttendWarpRows, kWarpSize>(
        shared.q + threadIdx.x / kWarpSize * kAttendWarpRows * kHeadDim,
        static_cast<const T*>(a.q) + mine.offset(a, 0, kHeadDim), a.heads * kHeadDim,
        a.length - mine.first_row, threadIdx.x % kWarpSize);
  }
  ptx::cp_async_commit();
  if (steps > 0) load_tile(shared.k, a.k_pages, tile, threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncwarp();  // the warp's query rows are there

  float out[2][kHeadDim / 8][4] = {};
  OnlineSoftmax softmax[2][2];
  for (; steps > 0; --steps) {
    const unsigned thread = ptx::opaque(threadIdx.x), lane = thread % kWarpSize;
    T* q_shared = shared.q + thread / kWarpSize * kAttendWarpRows * kHeadDim;
    if (tile.token == 0 || steps == shared.work.steps)  // a page begins, or the block's part of one
      rotate_query<T, kHeadDim>(q_shared, a, AttendRows(shared.work),
                                a.positions[shared.work.sample * a.entries + tile.entry]);
    ptx::cp_async_wait<0>();
    __syncthreads();  // K is there, the query is rotated, and no warp reads the last tile's V any more
    load_tile(shared.v, a.v_pages, tile, thread);
    ptx::cp_async_commit();

    const FragmentOffset<kHeadDim> operand(lane % 16, lane / 16);  // of the query and of V, transposed
    const FragmentOffset<kHeadDim> key_operand(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    float score[2][kTile / 8][4] = {};
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t query[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) ptx::ldmatrix_x4<false>(query[m], q_shared + operand(m * 16, step * 16));
#pragma unroll
      for (int n = 0; n < kTile / 16; ++n) {
        uint32_t key[4];
        ptx::ldmatrix_x4<false>(key, shared.k + key_operand(n * 16, step * 16));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          ptx::mma_m16n8k16<T>(score[m][2 * n], query[m], key[0], key[1]);
          ptx::mma_m16n8k16<T>(score[m][2 * n + 1], query[m], key[2], key[3]);
        }
      }
    }

    ptx::cp_async_wait<0>();
    __syncthreads();  // V is there, and no warp reads K any more
    const int tokens_left = a.tokens - tile.token;
    if (steps > 1) {
      tile.advance(kTile, a.tokens, table());
      load_tile(shared.k, a.k_pages, tile, ptx::opaque(threadIdx.x));
    }
    ptx::cp_async_commit();

    if (tokens_left < kTile) {
      const int columns_left = tokens_left - static_cast<int>(lane % 4 * 2);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (n * 8 + i % 2 >= columns_left) score[m][n][i] = -INFINITY;
    }

#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // rows g and g + 8 of the fragment
        const float correction = softmax_tile<kTile / 8>(
            softmax[m][half], p.scale, [&](int n, int i) -> float& { return score[m][n][2 * half + i]; });
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) out[m][n][i] *= correction;
      }

#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      // The scores' fragments are, two by two, the operand of the second product.
      uint32_t weight[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          weight[m][i] =
              ptx::pack2<T>(score[m][2 * step + i / 2][i % 2 * 2], score[m][2 * step + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t value[4];
        ptx::ldmatrix_x4<true>(value, shared.v + operand(step * 16, n * 16));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          ptx::mma_m16n8k16<T>(out[m][2 * n], weight[m], value[0], value[1]);
          ptx::mma_m16n8k16<T>(out[m][2 * n + 1], weight[m], value[2], value[3]);
        }
      }
    }
  }
  if constexpr (kCutsLastWave)
    if (shared.work.parts > 1 && !merge_parts<kHeadDim>(p, shared.work, out, softmax)) return;

  // Through shared memory, so that rows leave in 16-byte stores; each warp uses its own query rows' place.
  const AttendRows mine(shared.work);
  const unsigned lane = threadIdx.x % kWarpSize;
  T* q_shared = shared.q + threadIdx.x / kWarpSize * kAttendWarpRows * kHeadDim;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + lane / 4;
      const float sum = quad_sum(softmax[m][half].sum), factor = OnlineSoftmax::normaliser(sum);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
        *reinterpret_cast<uint32_t*>(q_shared + swizzled<kHeadDim>(row, n) + lane % 4 * 2) =
            ptx::pack2<T>(out[m][n][2 * half] * factor, out[m][n][2 * half + 1] * factor);
      if (a.lse && lane % 4 == 0 && mine.first_row + row < a.length)
        a.lse[mine.offset(a, row, 1)] = softmax[m][half].log_sum_exp(sum, p.scale);
    }
  __syncwarp();
  constexpr int kChunks = kHeadDim / 8;
#pragma unroll
  for (int i = 0; i < kAttendWarpRows * kChunks / kWarpSize; ++i) {
    const int row = (lane + i * kWarpSize) / kChunks, chunk = (lane + i * kWarpSize) % kChunks;
    if (mine.first_row + row < a.length)
      *reinterpret_cast<Vector<T>*>(static_cast<T*>(a.out) + mine.offset(a, row, kHeadDim) + chunk * 8) =
          *reinterpret_cast<const Vector<T>*>(q_shared + swizzled<kHeadDim>(row, chunk));
  }
}

}  // namespace longlive
