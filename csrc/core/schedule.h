// Who computes what in attend: how its work is cut for the multiprocessors of a GPU.
//
// A sample's work is a number of query tiles of equal cost. Whole waves, one tile to a block, leave a
// remainder of fewer tiles than blocks; those are cut along their keys and shared out evenly. The parts of a
// tile are merged in the order of their keys, so the result does not depend on which block finished first.
// Nor does it depend on the batch or on unused entries of the table: a sample is cut by its own work alone.
//
// What is dealt out, stretches of cut tiles and whole tiles, are units. On Hopper the grid is persistent, and
// blocks take the units of all samples in turns, the next sample beginning where the last one ended. On sm_80
// a block takes one unit, and the units of a sample are cut so that each is of one tile. How many keys a
// sample meets is known on the device only, where the table of pages is, so the schedule is made there, by
// every block for itself.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LONGLIVE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LONGLIVE_HOST_DEVICE inline
#endif

namespace longlive {

// Cutting costs writing and merging partial results, about 1% of a tile each (predicted, unmeasured), so a
// last wave is cut only if that shortens the whole by more than one part in so many.
constexpr int kWorthCutting = 50;
// A piece shorter than this would spend its time filling the pipeline (predicted, unmeasured).
constexpr int kMinSteps = 4;

// Of one sample.
struct Schedule {
  int tiles;
  int cut;      // tiles 0 .. cut - 1 are cut into pieces, the others are computed whole
  int sharers;  // units 0 .. sharers - 1 are stretches of the cut tiles; each of the others is a whole tile
};

struct Piece {
  int tile;
  int begin, end, of;  // the keys from begin / of to end / of of the tile's
  int part, parts;     // which of the parts the tile is computed in
  int partial;  // where the partial result goes if parts > 1; the parts of a tile lie one after the other
};

// `steps`: key tiles that each of the sample's query tiles meets. With more steps neither `cut` nor `sharers`
// is less. 32 bits do for ten million steps, since a remainder is less than the number of blocks.
LONGLIVE_HOST_DEVICE Schedule make_schedule(int tiles, int steps, int blocks) {
  const int waves = tiles / blocks, rest = tiles % blocks;
  const int sharers = rest * steps / kMinSteps < blocks ? rest * steps / kMinSteps : blocks;
  const bool worth = sharers > rest && (sharers - rest) * kWorthCutting > sharers * (waves + 1);
  return worth ? Schedule{tiles, rest, sharers} : Schedule{tiles, 0, 0};
}

// The same where a block takes one unit: all cut tiles are cut into equally many parts, `sharers` is a
// multiple of `cut`, and a stretch is one part of one tile. `blocks` is how many run at a time.
//
// Parts are computed in turns of `blocks`, each of which takes the part's own steps, `kPartSteps` to round
// them up, to fill the pipeline, to turn the query and to write the result, and as many steps as there are
// parts to read them where they are merged (predicted, unmeasured). With more steps the parts are not fewer:
// more of them win only by a smaller share of the steps, for a larger fixed cost. 32 bits do for
// 200,000 steps.
LONGLIVE_HOST_DEVICE Schedule make_schedule_of_parts(int tiles, int steps, int blocks) {
  constexpr int kMaxParts = 32, kPartSteps = 3;
  const int waves = tiles / blocks, rest = tiles % blocks;
  const int most = steps / kMinSteps < kMaxParts ? steps / kMinSteps : kMaxParts;
  // What the last wave takes is cost / (parts * kWorthCutting). Of a wave left whole that is what the parts
  // have to stay below to be worth it.
  int64_t best_cost = int64_t(steps) * (kWorthCutting - waves - 1);
  int best = 1;
  for (int parts = 2; parts <= most; ++parts) {
    const int turns = (rest * parts + blocks - 1) / blocks;
    const int64_t cost = int64_t(turns) * (steps + (kPartSteps + parts) * parts) * kWorthCutting;
    if (cost * best >= best_cost * parts) continue;
    best = parts;
    best_cost = cost;
  }
  return best > 1 && rest > 0 ? Schedule{tiles, rest, rest * best} : Schedule{tiles, 0, 0};
}

LONGLIVE_HOST_DEVICE int unit_count(const Schedule& s) { return s.sharers + s.tiles - s.cut; }

// Room that a sample's partial results take, in query tiles.
LONGLIVE_HOST_DEVICE int partial_count(const Schedule& s) { return s.cut ? s.sharers + s.cut : 0; }

// The `index`th piece of a unit; `tile` is -1 when there are no more. A stretch may run from the end of one
// tile into the beginning of the next, so that there are one or two. With three tiles cut for five blocks, on
// a line on which a tile is 5 (sharers) and a stretch 3 (cut) long:
//
//   tiles      |    0    |    1    |    2    |
//   stretches  |  0  |  1  |  2  |  3  |  4  |       stretch 1 is tile 0 from 3/5 to 5/5, its part 1 of 2,
//   line       0     3   5 6     9 10  12    15      then tile 1 from 0/5 to 1/5, its part 0 of 3
//
// The stretches come before the whole tiles, so that merging the parts hides behind the waves.
LONGLIVE_HOST_DEVICE Piece piece_at(const Schedule& s, int unit, int index) {
  if (unit >= s.sharers) return {index == 0 ? s.cut + unit - s.sharers : -1, 0, 1, 1, 0, 1, 0};
  const int from = unit * s.cut, to = from + s.cut;
  const int tile = from / s.sharers + index;
  const int start = tile * s.sharers, stop = start + s.sharers;
  if (start >= to) return {-1, 0, 0, 1, 0, 1, 0};
  const int first_unit = start / s.cut, last_unit = (stop - 1) / s.cut;
  return {tile,
          from > start ? from - start : 0,
          to < stop ? to - start : s.sharers,
          s.sharers,
          unit - first_unit,
          last_unit - first_unit + 1,
          unit + tile};
}

// The first of `steps` steps at or after a cut at `numerator` / `of`.
LONGLIVE_HOST_DEVICE int step_at(int numerator, int of, int steps) { return numerator * steps / of; }

// Tokens in a key tile: the one that takes the least time for a page, if a step costs as much as its rows and
// some more; a tile does not go past the end of its page. Of equals the largest.
LONGLIVE_HOST_DEVICE int choose_key_tile(int tokens) {
  constexpr int kKeyTiles[] = {176, 144, 128, 112};  // wgmma takes multiples of 16
  // What a step costs whatever its size (hand-over, waits, reductions over lanes), in rows: about 425 cycles,
  // a third of them exposed, against 16 cycles of matrix products a row (predicted, unmeasured).
  constexpr int64_t kStepRows = 8;
  int best = 0;
  int64_t best_rows = 0;
  for (const int tile : kKeyTiles) {
    const int64_t rows = (static_cast<int64_t>(tokens) + tile - 1) / tile * (tile + kStepRows);
    if (best == 0 || rows < best_rows) {
      best = tile;
      best_rows = rows;
    }
  }
  return best;
}

}  // namespace longlive
