// What the warps of attend on Hopper share: the plan of shared memory, the parameters, and how rings are
// counted.
#pragma once
#include "core/scalar.cuh"
#include "core/schedule.h"
#include "cuda/attend_sm90.h"
#include "cuda/ptx/tma.cuh"

namespace longlive {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kConsumerRows = 64;  // wgmma's M
constexpr int kQueryRows = kConsumers * kConsumerRows;
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kConsumerWarps = kConsumerThreads / kWarpSize;
constexpr int kAttendSm90Threads = kWarpgroup + kConsumerThreads;
constexpr int kMaxFrames = 4;   // that the rows of a query tile may belong to, from kMinTokens up
constexpr int kMinTokens = 64;  // of a page
constexpr int kSharedBytes = 227 * 1024;
// Stages of the ring of tiles. More would not help: the matrix products of a tile take longer than its load.
constexpr int kMaxStages = 4;

// The first pairs of a head that may turn with time, in steps of the first product: 22 of 64 pairs in Wan,
// and 12 of 32. The registers they take, four a step, are what limits them.
template <int kHeadDim>
constexpr int kRotatedSteps = kHeadDim == 128 ? 3 : 2;

// Registers of a thread: the producers need few, and what they give up the consumers get. The three
// warpgroups start with the 168 a thread, 504 in sum, that __launch_bounds__ leaves them.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters == 504);

// Hardware barriers, one of each kind for each consumer. 0 is __syncthreads.
enum class NamedBarrier { kTurn = 1, kMerge = kTurn + kConsumers };
__device__ __forceinline__ int barrier_id(NamedBarrier kind, int consumer) {
  return static_cast<int>(kind) + consumer;
}

// What a piece is about. A step is one key tile; the steps run through the used pages in the order of the
// table.
struct PlannedPiece {
  Piece piece;  // piece.tile is -1 after the last
  int sample, head, first_row, first_frame;
  int entry, tile;   // of the table, and of its page: where the steps begin
  int steps, pages;  // how many, and how many pages they touch
};

// Shared memory beside the tiles.
template <int kHeadDim>
struct AttendSm90Control {
  float2 rotation[2][kMaxFrames][kRotatedSteps<kHeadDim> * 8];
  uint64_t query_full, query_empty;
  uint64_t key_full[kMaxStages], key_empty[kMaxStages], value_full[kMaxStages], value_empty[kMaxStages];
  uint64_t rotation_full[2], rotation_empty[2];
  PlannedPiece plan[2];
  uint64_t plan_full[2], plan_empty[2];
  Schedule schedule;  // of the sample whose pieces are being planned
  int used_steps;     // the same's
  float unused;
  uint32_t arrived[kConsumers];  // parts of the tile that were done before this one
};

// The plan of shared memory.
template <class T, int kHeadDim, int kKeyTile>
struct AttendSm90Shared : AttendSm90Control<kHeadDim> {
  static constexpr int kAlignment = 1024;        // the 128-byte swizzle repeats after 8 rows
  static constexpr int kHalves = kHeadDim / 64;  // 64 elements are the 128 bytes that the swizzle spans
  static constexpr int kTileBytes = kHalves * kKeyTile * 64 * sizeof(T);
  static constexpr int kQueryBytes = kHalves * kQueryRows * 64 * sizeof(T);
  static constexpr int kControlBytes =
      (sizeof(AttendSm90Control<kHeadDim>) + kAlignment - 1) / kAlignment * kAlignment;
  static constexpr int kFit = (kSharedBytes - kControlBytes - kQueryBytes) / (2 * kTileBytes);
  static constexpr int kStages = kFit < kMaxStages ? kFit : kMaxStages;
  static_assert(kStages >= 2, "a tile must load while another is used");

  alignas(kAlignment) T q[kHalves][kQueryRows][64];  // spatially rotated only
  alignas(kAlignment) T k[kStages][kHalves][kKeyTile][64];
  alignas(kAlignment) T v[kStages][kHalves][kKeyTile][64];
};

struct AttendSm90Parameters {
  ptx::TensorMap q, k, v;  // dimensions: 64 elements, rows or tokens, halves, heads, samples or slots
  AttendArguments a;
  int query_tiles;        // of one head of one sample
  int frames;             // of queries
  float scale;            // of the scores, times log2(e): exponentials are powers of two
  int partials_a_sample;  // at most; partial_count
  int cut_a_sample;       // at most; Schedule::cut
  float* partials;        // [sample][partial][consumer][head_dim / 2 + 4][thread]
  uint32_t* arrived;      // [sample][cut tile][consumer]: parts that are done
};

// A place in a ring of buffers, and the parity of its barriers there.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// The same for the `count`th use of a ring of two, where registers are scarce.
__device__ __forceinline__ Ring<2> ring_of_two(int count) {
  return {count & 1, static_cast<uint32_t>(count >> 1 & 1)};
}

}  // namespace longlive
