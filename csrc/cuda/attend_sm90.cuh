// attend for Hopper: a persistent grid, one block to a multiprocessor, each computing pieces of query tiles
// (core/schedule.h) with specialised warps. docs/attend_hopper.md has the design and its budget.
//
// - One thread plans: it tells the others which piece comes next.
// - One thread loads whole K and V tiles of a page by TMA, as wgmma reads them, with zeros past the page.
// - One warp turns time into rotations: cosines and sines of the distance between the query's frames and a
//   page.
// - Two warpgroups consume: 64 query rows each, scores and output in registers. The pairs of the query that
//   turn with time are kept in registers as the operand of the first product, rotated at each page from the
//   unrotated query in shared memory; the other pairs go from shared memory.
//
// A consumer computes the softmax of one tile while its product of the weights before and the other
// consumer's products are under way; they take turns at issuing them. This file has the consumers and the
// kernel; the others are in attend_sm90_producers.cuh.
#pragma once
#include "core/rotation.cuh"
#include "cuda/attend_sm90_producers.cuh"
#include "cuda/ptx/warpgroup.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/softmax.cuh"

namespace longlive {

// A warpgroup: attention of its 64 rows of each piece.
template <class T, int kHeadDim, int kKeyTile>
struct Consumer {
  using Shared = AttendSm90Shared<T, kHeadDim, kKeyTile>;
  using Scores = ptx::Wgmma<T, kKeyTile>;
  using Output = ptx::Wgmma<T, kHeadDim>;
  static constexpr int kSteps = kRotatedSteps<kHeadDim>;
  static constexpr int kPattern = 8 * 128;  // bytes of the swizzle's pattern of eight rows

  const AttendSm90Parameters& p;
  Shared& shared;
  const int steps_per_page, consumer, lane;
  Ring<Shared::kStages> ring;
  int queries = 0, rotations = 0;  // used so far

  typename Scores::Fragment score;
  typename Output::Fragment out;
  uint32_t weight[kKeyTile / 16][4];  // softmax weights, the operand of the second product
  uint32_t query[kSteps][4];          // the pairs that turn with time, rotated for the page
  OnlineSoftmax softmax[2];           // of this thread's two rows, like the next two
  float correction[2];
  int frame[2];  // of the query tile's frames; any will do for rows past the last, which hold zeros

  __device__ __forceinline__ Consumer(const AttendSm90Parameters& p, Shared& shared, int steps_per_page,
                                      int consumer)
      : p(p),
        shared(shared),
        steps_per_page(steps_per_page),
        consumer(consumer),
        lane(threadIdx.x % kWarpSize) {}

  // This thread's first row of two, the other is 8 below.
  __device__ __forceinline__ int row() const {
    return consumer * kConsumerRows + threadIdx.x % kWarpgroup / kWarpSize * 16 + lane / 4;
  }

  // One arrival a warp: a warpgroup's wait for its products tells each warp about its own rows only.
  __device__ __forceinline__ void release(uint64_t* barrier) {
    if (lane == 0) ptx::mbarrier_arrive(barrier);
  }

  // Before the first tile of a page: turns the query to it.
  __device__ __forceinline__ void rotate_query() {
    const auto rotation_ring = ring_of_two(rotations++);
    ptx::mbarrier_wait(&shared.rotation_full[rotation_ring.stage], rotation_ring.parity);
    // Opaque: the addresses below would otherwise be kept, and spilled, from one page to the next.
    const int first = ptx::opaque(row()), column = ptx::opaque(lane % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = first + half * 8;
      const float2* rotation = shared.rotation[rotation_ring.stage][frame[half]];
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // the low and the high eight columns of the step
          const int chunk = step * 2 + i;
          uint32_t unrotated;
          memcpy(&unrotated, &shared.q[0][r][(chunk ^ r % 8) * 8 + column * 2], sizeof unrotated);
          const float2 turned = rotate(unpack2<T>(unrotated), rotation[chunk * 4 + column]);
          query[step][i * 2 + half] = ptx::pack2<T>(turned.x, turned.y);
        }
    }
    ptx::mbarrier_arrive(&shared.rotation_empty[rotation_ring.stage]);
  }

  // score = query * keys of this stage; issued, not waited for.
  __device__ __forceinline__ void multiply_keys(int stage) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int half = step / 4, column = step % 4 * 16;
      const uint64_t keys = ptx::matrix_descriptor(&shared.k[stage][half][0][column], kPattern, 0);
      if (step < kSteps)
        Scores::template multiply<ptx::Columns::kAlongRows>(score, query[step], keys, step > 0);
      else
        Scores::multiply(
            score, ptx::matrix_descriptor(&shared.q[half][consumer * kConsumerRows][column], kPattern, 0),
            keys, true);
    }
    ptx::wgmma_commit();
  }

  // out += weight * values of this stage; issued, not waited for.
  __device__ __forceinline__ void multiply_values(int stage) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeyTile / 16; ++step)
      Output::template multiply<ptx::Columns::kAcrossRows>(
          out, weight[step],
          ptx::matrix_descriptor(&shared.v[stage][0][step * 16][0], kPattern, kKeyTile * 128), true);
    ptx::wgmma_commit();
  }

  // Turns scores into weights, which stay in `score`. Of the last tile of a page only `valid` columns count.
  __device__ __forceinline__ void exponentiate(int valid) {
    if (valid < kKeyTile)
#pragma unroll
      for (int i = 0; i < kKeyTile / 2; ++i)
        if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= valid) score[i] = -INFINITY;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      correction[half] = softmax_tile<kKeyTile / 8>(
          softmax[half], p.scale, [&](int n, int i) -> float& { return score[4 * n + 2 * half + i]; });
  }

  // Rounds the weights and scales the output to the new maximum. No product may be under way.
  __device__ __forceinline__ void pack_and_rescale() {
#pragma unroll
    for (int step = 0; step < kKeyTile / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weight[step][i] = ptx::pack2<T>(score[step * 8 + i * 2], score[step * 8 + i * 2 + 1]);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= correction[i / 2 % 2];
  }

  // Consumers take turns: each waits for the other to open its barrier before it issues its products.
  __device__ __forceinline__ void await_turn() {
    ptx::barrier_sync(barrier_id(NamedBarrier::kTurn, consumer), kConsumerThreads);
  }
  __device__ __forceinline__ void pass_turn() {
    ptx::barrier_arrive(barrier_id(NamedBarrier::kTurn, consumer ^ 1), kConsumerThreads);
  }

  __device__ __forceinline__ void attend_piece(const PlannedPiece& plan) {
    ptx::mbarrier_wait(&shared.query_full, queries++ & 1);
    int tile = plan.tile;
    const int steps = plan.steps;
    const auto valid = [&] { return min(p.a.tokens - tile * kKeyTile, kKeyTile); };
#pragma unroll
    for (int half = 0; half < 2; ++half)
      frame[half] = min((plan.first_row + row() + half * 8) / p.a.tokens - plan.first_frame, kMaxFrames - 1);
    rotate_query();
    ptx::mbarrier_wait(&shared.key_full[ring.stage], ring.parity);
    multiply_keys(ring.stage);
    ptx::wgmma_wait<0>();
    release(&shared.key_empty[ring.stage]);
    exponentiate(valid());
    pack_and_rescale();
#pragma unroll 1
    for (int step = 1; step < steps; ++step) {
      const Ring<Shared::kStages> previous = ring;
      ring.advance();
      if (++tile == steps_per_page) {
        tile = 0;
        if (p.a.pairs > 0) rotate_query();
      }
      ptx::mbarrier_wait(&shared.key_full[ring.stage], ring.parity);
      await_turn();
      multiply_keys(ring.stage);
      ptx::mbarrier_wait(&shared.value_full[previous.stage], previous.parity);
      multiply_values(previous.stage);
      pass_turn();
      ptx::wgmma_wait<1>();  // the scores are there
      release(&shared.key_empty[ring.stage]);
      exponentiate(valid());
      ptx::finish_first(softmax[0].sum + softmax[1].sum, &shared.unused);
      ptx::wgmma_wait<0>();  // the output is there
      release(&shared.value_empty[previous.stage]);
      pack_and_rescale();
    }
    release(&shared.query_empty);
    ptx::mbarrier_wait(&shared.value_full[ring.stage], ring.parity);
    multiply_values(ring.stage);
    ptx::wgmma_wait<0>();
    release(&shared.value_empty[ring.stage]);
    ring.advance();
#pragma unroll
    for (int half = 0; half < 2; ++half) softmax[half].sum = quad_sum(softmax[half].sum);
  }

  // Leaves this part's result in the workspace. True if it is the last part of its tile to be done: then the
  // parts, merged in the order of their keys, are what this thread holds.
  __device__ __forceinline__ bool merge_parts(const PlannedPiece& plan) {
    constexpr int kFloats = kHeadDim / 2 + 4;
    const Piece& piece = plan.piece;
    const int thread = threadIdx.x % kWarpgroup;
    const auto partial = [&](int part) {
      const int64_t index = int64_t(plan.sample) * p.partials_a_sample + piece.partial - piece.part + part;
      return p.partials + (index * kConsumers + consumer) * kFloats * kWarpgroup + thread;
    };
    float* mine = partial(piece.part);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) mine[i * kWarpgroup] = out[i];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mine[(kHeadDim / 2 + half) * kWarpgroup] = softmax[half].maximum;
      mine[(kHeadDim / 2 + 2 + half) * kWarpgroup] = softmax[half].sum;
    }
    __threadfence();
    const int barrier = barrier_id(NamedBarrier::kMerge, consumer);
    ptx::barrier_sync(barrier, kWarpgroup);
    if (thread == 0) {
      const int tile = plan.sample * p.cut_a_sample + piece.tile;
      shared.arrived[consumer] = atomicAdd(&p.arrived[tile * kConsumers + consumer], 1u);
    }
    ptx::barrier_sync(barrier, kWarpgroup);
    if (shared.arrived[consumer] + 1 < static_cast<uint32_t>(piece.parts)) return false;
    __threadfence();

    clear();
    for (int part = 0; part < piece.parts; ++part) {
      const float* other = partial(part);
      float keep[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float maximum = other[(kHeadDim / 2 + half) * kWarpgroup];
        keep[half] = softmax[half].raise(maximum, p.scale);
        correction[half] = softmax[half].weight(maximum, p.scale);
        softmax[half].sum += correction[half] * other[(kHeadDim / 2 + 2 + half) * kWarpgroup];
      }
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i)
        out[i] = out[i] * keep[i / 2 % 2] + correction[i / 2 % 2] * other[i * kWarpgroup];
    }
    return true;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.0f;
    softmax[0] = softmax[1] = {};
  }

  __device__ __forceinline__ void store(const PlannedPiece& plan) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query_row = plan.first_row + row() + half * 8;
      if (query_row >= p.a.length) continue;
      const float sum = softmax[half].sum, factor = OnlineSoftmax::normaliser(sum);
      const int64_t index =
          (static_cast<int64_t>(plan.sample) * p.a.length + query_row) * p.a.heads + plan.head;
      T* target = static_cast<T*>(p.a.out) + index * kHeadDim + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i)
        *reinterpret_cast<uint32_t*>(target + i * 8) =
            ptx::pack2<T>(out[i * 4 + half * 2] * factor, out[i * 4 + half * 2 + 1] * factor);
      if (p.a.lse && lane % 4 == 0) p.a.lse[index] = softmax[half].log_sum_exp(sum, p.scale);
    }
  }

  __device__ __forceinline__ void run() {
    if (consumer == 1) pass_turn();
#pragma unroll 1
    for (int index = 0;; ++index) {
      const PlannedPiece& plan = wait_for_plan(shared, index);
      if (plan.piece.tile < 0) return;
      clear();
      if (plan.steps > 0) attend_piece(plan);
      if (plan.piece.parts == 1 || merge_parts(plan)) store(plan);
      release_plan(shared, index);
    }
  }
};

template <class T, int kHeadDim, int kKeyTile>
__global__ void __launch_bounds__(kAttendSm90Threads, 1)
    attend_sm90_kernel(const __grid_constant__ AttendSm90Parameters p) {
  using Shared = AttendSm90Shared<T, kHeadDim, kKeyTile>;
  auto& shared = shared_memory<Shared>();
  const int steps_per_page = (p.a.tokens + kKeyTile - 1) / kKeyTile;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.query_full, 1);
    ptx::mbarrier_init(&shared.query_empty, kConsumerWarps);
    for (int stage = 0; stage < Shared::kStages; ++stage) {
      ptx::mbarrier_init(&shared.key_full[stage], 1);
      ptx::mbarrier_init(&shared.value_full[stage], 1);
      ptx::mbarrier_init(&shared.key_empty[stage], kConsumerWarps);
      ptx::mbarrier_init(&shared.value_empty[stage], kConsumerWarps);
    }
    for (int stage = 0; stage < 2; ++stage) {
      ptx::mbarrier_init(&shared.rotation_full[stage], kWarpSize);
      ptx::mbarrier_init(&shared.rotation_empty[stage], kConsumerThreads);
      ptx::mbarrier_init(&shared.plan_full[stage], 1);
      ptx::mbarrier_init(&shared.plan_empty[stage], 1 + kWarpSize + kConsumerThreads);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  // The same in all lanes, and known to be so by the compiler.
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0);
  if (warp < kWarpgroup / kWarpSize) {
    ptx::give_up_registers<kProducerRegisters>();
    if (threadIdx.x == 0) load_pieces<Shared, kKeyTile>(p, shared, steps_per_page);
    if (warp == 1) rotate_pieces<Shared, kHeadDim>(p, shared);
    if (threadIdx.x == 2 * kWarpSize) plan_pieces(p, shared, steps_per_page);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    const int consumer = warp / (kWarpgroup / kWarpSize) - 1;
    Consumer<T, kHeadDim, kKeyTile>(p, shared, steps_per_page, consumer).run();
  }
}

}  // namespace longlive
