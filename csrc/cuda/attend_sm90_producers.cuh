// attend on Hopper, the warps that prepare: one thread plans, one loads, one warp rotates.
#pragma once
#include "core/rotation.cuh"
#include "cuda/attend_sm90_shared.cuh"

namespace longlive {

// The next used entry of a sample's table after `entry`, or the first for -1. There is one wherever a step is
// left.
__device__ __forceinline__ int next_entry(const AttendSm90Parameters& p, int sample, int entry) {
  do ++entry;
  while (p.a.slots[sample * p.a.entries + entry] < 0);
  return entry;
}

// Where the steps of a piece lie in the table and in the query; `used_steps` is how many the sample has.
__device__ __forceinline__ void locate_piece(const AttendSm90Parameters& p, PlannedPiece& plan,
                                             int used_steps, int steps_per_page) {
  plan.head = plan.piece.tile / p.query_tiles;
  plan.first_row = plan.piece.tile % p.query_tiles * kQueryRows;
  plan.first_frame = plan.first_row / p.a.tokens;
  const int begin = step_at(plan.piece.begin, plan.piece.of, used_steps);
  const int end = step_at(plan.piece.end, plan.piece.of, used_steps);
  const int first_page = begin / steps_per_page;
  plan.steps = end - begin;
  plan.tile = begin - first_page * steps_per_page;
  plan.pages = begin < end ? (end - 1) / steps_per_page - first_page + 1 : 0;
  int entry = -1;
  if (begin < end)
#pragma unroll 1
    for (int page = 0; page <= first_page; ++page) entry = next_entry(p, plan.sample, entry);
  plan.entry = entry;
}

// One thread: works out the pieces of this block, and a last one that says that there are no more.
template <class Shared>
__device__ __forceinline__ void plan_pieces(const AttendSm90Parameters& p, Shared& shared,
                                            int steps_per_page) {
  int index = 0, unit = blockIdx.x;
  const auto next_plan = [&]() -> PlannedPiece& {
    const auto ring = ring_of_two(index);
    ptx::mbarrier_wait(&shared.plan_empty[ring.stage], ring.parity ^ 1);
    return shared.plan[ring.stage];
  };
  const auto publish = [&] { ptx::mbarrier_arrive(&shared.plan_full[ring_of_two(index++).stage]); };
#pragma unroll 1
  for (int sample = 0; sample < p.a.batch; ++sample) {
    int used = 0;
#pragma unroll 1
    for (int entry = 0; entry < p.a.entries; ++entry) used += p.a.slots[sample * p.a.entries + entry] >= 0;
    // In shared memory, because 24 registers do not hold it as well.
    Schedule& schedule = shared.schedule;
    schedule = make_schedule(p.a.heads * p.query_tiles, used * steps_per_page, gridDim.x);
    shared.used_steps = used * steps_per_page;
#pragma unroll 1
    for (; unit < unit_count(schedule); unit += gridDim.x)
#pragma unroll 1
      for (int i = 0;; ++i) {
        const Piece piece = piece_at(schedule, unit, i);
        if (piece.tile < 0) break;
        PlannedPiece& plan = next_plan();
        plan.piece = piece;
        plan.sample = sample;
        locate_piece(p, plan, shared.used_steps, steps_per_page);
        publish();
      }
    unit -= unit_count(schedule);  // the next sample's units follow
  }
  next_plan().piece.tile = -1;
  publish();
}

// The plan for the block's `index`th piece, for those who carry it out.
template <class Shared>
__device__ __forceinline__ const PlannedPiece& wait_for_plan(Shared& shared, int index) {
  const auto ring = ring_of_two(index);
  ptx::mbarrier_wait(&shared.plan_full[ring.stage], ring.parity);
  return shared.plan[ring.stage];
}
template <class Shared>
__device__ __forceinline__ void release_plan(Shared& shared, int index) {
  ptx::mbarrier_arrive(&shared.plan_empty[ring_of_two(index).stage]);
}

// One thread: brings the query and the key and value tiles of each piece.
template <class Shared, int kKeyTile>
__device__ __forceinline__ void load_pieces(const AttendSm90Parameters& p, Shared& shared,
                                            int steps_per_page) {
  ptx::prefetch_tensor_map(&p.q);
  ptx::prefetch_tensor_map(&p.k);
  ptx::prefetch_tensor_map(&p.v);
  Ring<Shared::kStages> ring;
  int queries = 0;
#pragma unroll 1
  for (int index = 0;; ++index) {
    const PlannedPiece& plan = wait_for_plan(shared, index);
    if (plan.piece.tile < 0) return;
    const int sample = plan.sample, head = plan.head, first_row = plan.first_row;
    int steps = plan.steps, tile = plan.tile, entry = plan.entry;
    release_plan(shared, index);
    bool is_first = true;
#pragma unroll 1
    for (; steps > 0; --steps) {
      const int slot = p.a.slots[sample * p.a.entries + entry];
      ptx::mbarrier_wait(&shared.key_empty[ring.stage], ring.parity ^ 1);
      ptx::mbarrier_arrive_expect(&shared.key_full[ring.stage], Shared::kTileBytes);
      ptx::tma_load(shared.k[ring.stage], &p.k, &shared.key_full[ring.stage], 0, tile * kKeyTile, 0, head,
                    slot);
      if (is_first) {  // after the first keys: they need not wait for the last piece to end
        ptx::mbarrier_wait(&shared.query_empty, (queries++ & 1) ^ 1);
        ptx::mbarrier_arrive_expect(&shared.query_full, Shared::kQueryBytes);
        ptx::tma_load(shared.q, &p.q, &shared.query_full, 0, first_row, 0, head, sample);
        is_first = false;
      }
      ptx::mbarrier_wait(&shared.value_empty[ring.stage], ring.parity ^ 1);
      ptx::mbarrier_arrive_expect(&shared.value_full[ring.stage], Shared::kTileBytes);
      ptx::tma_load(shared.v[ring.stage], &p.v, &shared.value_full[ring.stage], 0, tile * kKeyTile, 0, head,
                    slot);
      ring.advance();
      if (++tile == steps_per_page && steps > 1) {
        tile = 0;
        entry = next_entry(p, sample, entry);
      }
    }
  }
}

// One warp: the rotations of each page of each piece, for the frames that the query tile's rows are of. A
// lane has a pair; those that do not turn have the frequency zero.
template <class Shared, int kHeadDim>
__device__ __forceinline__ void rotate_pieces(const AttendSm90Parameters& p, Shared& shared) {
  constexpr int kPairs = kRotatedSteps<kHeadDim> * 8;
  static_assert(kPairs <= kWarpSize, "a lane for each pair");
  const int pair = threadIdx.x % kWarpSize;
  const double frequency = pair < p.a.pairs ? p.a.frequencies[pair] : 0.0;
  int count = 0;
#pragma unroll 1
  for (int index = 0;; ++index) {
    const PlannedPiece& plan = wait_for_plan(shared, index);
    if (plan.piece.tile < 0) return;
    const int sample = plan.sample, first_frame = plan.first_frame;
    // Without turning pairs the query is the same for all pages.
    int entry = plan.entry, pages = p.a.pairs > 0 ? plan.pages : min(plan.pages, 1);
    release_plan(shared, index);
#pragma unroll 1
    for (; pages > 0; --pages, ++count) {
      const auto ring = ring_of_two(count);
      ptx::mbarrier_wait(&shared.rotation_empty[ring.stage], ring.parity ^ 1);
      const int position = p.a.positions[sample * p.a.entries + entry];
#pragma unroll 1
      for (int i = 0; i < kMaxFrames; ++i) {
        const int frame = min(first_frame + i, p.frames - 1);
        const double distance = static_cast<double>(p.a.query_position[sample * p.frames + frame]) - position;
        if (pair < kPairs) shared.rotation[ring.stage][i][pair] = temporal_rotation(distance, frequency);
      }
      ptx::mbarrier_arrive(&shared.rotation_full[ring.stage]);
      if (pages > 1) entry = next_entry(p, sample, entry);
    }
  }
}

}  // namespace longlive
