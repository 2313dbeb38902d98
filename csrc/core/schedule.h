// Who computes what in attend on Hopper: the work partition of a persistent grid, one block to an SM.
//
// The work is a number of query tiles of equal cost. Whole waves, one tile to a block, leave a remainder of
// fewer tiles than blocks; those are cut along their keys and shared out evenly, before the waves: laid end
// to end, they form a line that is divided into as many equal stretches as there are blocks. A stretch may
// run from the end of one tile into the beginning of the next. The parts of a tile are merged in the order of
// their keys, so the result does not depend on which block finished first.
//
// A cut is a fraction of a tile, not a number of steps: how many keys a tile meets is known on the device
// only, where the table of pages is. All blocks derive the same steps from the same fractions, so every step
// of every tile belongs to exactly one piece whatever the table says.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LONGLIVE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LONGLIVE_HOST_DEVICE inline
#endif

namespace longlive {

// Cutting costs writing and merging partial results, about 1% of a tile each (predicted, unmeasured), so a
// last wave is cut only if that shortens the whole by more than this fraction.
constexpr double kWorthCutting = 0.02;
// A piece shorter than this would spend its time filling the pipeline (predicted, unmeasured).
constexpr int kMinSteps = 4;

struct Schedule {
  int tiles;
  int blocks;   // the grid
  int cut;      // tiles 0 .. cut - 1 are cut into pieces, the others are computed whole
  int sharers;  // blocks 0 .. sharers - 1 share the cut tiles
};

struct Piece {
  int tile;
  int begin, end, of;  // the keys from begin / of to end / of of the tile's
  int part, parts;     // which of the parts the tile is computed in
  int partial;  // where the partial result goes if parts > 1; the parts of a tile lie one after the other
};

// `steps`: key tiles that a query tile meets, at most.
inline Schedule make_schedule(int64_t tiles, int64_t steps, int multiprocessors) {
  const auto all = static_cast<int>(tiles);
  const int waves = all / multiprocessors, rest = all % multiprocessors;
  int64_t sharers = rest * steps / kMinSteps;
  if (sharers > multiprocessors) sharers = multiprocessors;
  const bool worth = sharers > rest && 1 - double(rest) / double(sharers) > kWorthCutting * (waves + 1);
  if (rest == 0 || !worth) return {all, all < multiprocessors ? all : multiprocessors, 0, 0};
  return {all, waves ? multiprocessors : static_cast<int>(sharers), rest, static_cast<int>(sharers)};
}

// Room that partial results take, in query tiles.
LONGLIVE_HOST_DEVICE int partial_count(const Schedule& s) { return s.cut ? s.sharers + s.cut : 0; }

// How many pieces `block` computes.
LONGLIVE_HOST_DEVICE int piece_count(const Schedule& s, int block) {
  const int whole = s.tiles - s.cut;
  int count = whole / s.blocks + (block < whole % s.blocks);
  if (block < s.sharers) count += ((block + 1) * s.cut - 1) / s.sharers - block * s.cut / s.sharers + 1;
  return count;
}

// The piece that `block` computes as its `index`th: its stretch of the cut tiles first, so that merging them
// hides behind the waves.
LONGLIVE_HOST_DEVICE Piece piece_at(const Schedule& s, int block, int index) {
  if (block < s.sharers) {
    // On a line on which a tile is `sharers` long, this block's stretch is `cut` long.
    const int from = block * s.cut, to = from + s.cut;
    const int tile = from / s.sharers + index, last = (to - 1) / s.sharers;
    if (tile <= last) {
      const int start = tile * s.sharers, first_block = start / s.cut;
      const int last_block = (start + s.sharers - 1) / s.cut;
      return {tile,
              from > start ? from - start : 0,
              to < start + s.sharers ? to - start : s.sharers,
              s.sharers,
              block - first_block,
              last_block - first_block + 1,
              block + tile};
    }
    index -= last - from / s.sharers + 1;
  }
  return {s.cut + block + index * s.blocks, 0, 1, 1, 0, 1, 0};
}

// The first of `steps` steps at or after a cut at `numerator` / `of`. `of` is at most the number of
// multiprocessors, so 32 bits do for ten million steps.
LONGLIVE_HOST_DEVICE int step_at(int numerator, int of, int steps) { return numerator * steps / of; }

// Tokens in a key tile: the one with the largest useful fraction of its rows, since a tile does not go past
// the end of its page; of equals the largest, which takes the fewest steps.
LONGLIVE_HOST_DEVICE int choose_key_tile(int tokens) {
  constexpr int kKeyTiles[] = {176, 144, 128, 112};  // wgmma takes multiples of 16
  int best = 0;
  int64_t best_rows = 0;
  for (const int tile : kKeyTiles) {
    const int64_t rows = (static_cast<int64_t>(tokens) + tile - 1) / tile * tile;
    if (best == 0 || rows < best_rows) {
      best = tile;
      best_rows = rows;
    }
  }
  return best;
}

}  // namespace longlive
