// What the warps of attend on Hopper share: the plan of shared memory, the parameters, and how rings are
// counted.
#pragma once
#include "core/scalar.cuh"
#include "core/schedule.h"
#include "cuda/attend_sm90.h"
#include "cuda/ptx/tma.cuh"

namespace longlive {

constexpr int kWarpgroup = 128;
constexpr int kConsumerRows = 64;  // wgmma's M
constexpr int kMaxFrames = 4;      // that the rows of a query tile may belong to, from kMinTokens up
constexpr int kMinTokens = 64;     // of a page
constexpr int kSharedBytes = 227 * 1024;

// The first pairs of a head that may turn with time, in steps of the first product: 22 of 64 pairs in Wan,
// and 12 of 32. The registers they take, four a step, are what limits them.
template <int kHeadDim>
constexpr int kRotatedSteps = kHeadDim == 128 ? 3 : 2;

// Registers of a thread: the producers need few, and what they give up the consumers get. The sums are those
// that
// __launch_bounds__ lets the block start with, 504 and 512 for the three or four warpgroups.
template <int kConsumers>
constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
template <int kConsumers>
constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;

// What a piece is about. A step is one key tile; the steps run through the used pages in the order of the
// table.
struct PlannedPiece {
  Piece piece;
  int sample, head, first_row, first_frame;
  int entry, tile;   // of the table, and of its page: where the steps begin
  int steps, pages;  // how many, and how many pages they touch
};

template <class T, int kHeadDim, int kKeyTile, int kConsumers>
struct AttendSm90Shared {
  static constexpr int kRows = kConsumers * kConsumerRows;
  static constexpr int kHalves = kHeadDim / 64;  // 64 elements are the 128 bytes that the swizzle spans
  static constexpr int kTileBytes = kHalves * kKeyTile * 64 * sizeof(T);
  static constexpr int kQueryBytes = kHalves * kRows * 64 * sizeof(T);
  static constexpr int kFit = (kSharedBytes - 2560 - kQueryBytes) / (2 * kTileBytes);
  // More than four would not help: the matrix products of one tile take longer than its load.
  static constexpr int kStages = kFit < 4 ? kFit : 4;
  static_assert(kStages >= 2, "a tile must load while another is used");

  alignas(1024) T q[kHalves][kRows][64];  // spatially rotated only
  alignas(1024) T k[kStages][kHalves][kKeyTile][64];
  alignas(1024) T v[kStages][kHalves][kKeyTile][64];
  float2 rotation[2][kMaxFrames][kRotatedSteps<kHeadDim> * 8];
  uint64_t query_full, query_empty;
  uint64_t key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
  uint64_t rotation_full[2], rotation_empty[2];
  PlannedPiece plan[2];
  uint64_t plan_full[2], plan_empty[2];
  int pieces;  // of this block
  float unused;
  uint32_t arrived[kConsumers];  // parts of the tile that were done before this one
};

struct AttendSm90Parameters {
  ptx::TensorMap q, k, v;  // dimensions: 64 elements, rows or tokens, halves, heads, samples or slots
  AttendArguments a;
  Schedule schedule;
  int query_tiles;    // of one head of one sample
  int frames;         // of queries
  float scale;        // of the scores, times log2(e): exponentials are powers of two
  float* partials;    // [partial][consumer][head_dim / 2 + 4][thread]
  uint32_t* arrived;  // [cut tile][consumer]: parts that are done
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
