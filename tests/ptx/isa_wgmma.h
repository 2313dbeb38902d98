// wgmma, the matrix product of a warpgroup; see isa_sm90.h. The last of the instructions: a translated kernel
// includes this file, and with it all others.
#ifndef PTX_ISA_WGMMA_H  // not #pragma once: the file is compiled by itself
#define PTX_ISA_WGMMA_H
#include "isa_sm90.h"

namespace ptx {

// The translation calls it where an instruction other than wgmma reads or writes a register that is a
// product's.
inline void wgmma_registers_accessed() { hopper_thread().accessed = true; }
inline void wgmma_fence_sync_aligned() {
  converge("wgmma.fence");
  hopper_thread().accessed = false;
}
inline void wgmma_commit_group_sync_aligned() {
  converge("wgmma.commit_group");
  simt::current_thread().products.commit();
}
inline void wgmma_wait_group_sync_aligned(unsigned pending) {
  converge("wgmma.wait_group");
  simt::current_thread().products.wait(pending);
}

// "Matrix descriptor format" and "Canonical layouts", for 16-bit elements. A pattern is a group of eight
// lines of 16, 32, 64 or 128 bytes; in it, 16-byte chunks are permuted by address bits.
class Descriptor {
 public:
  explicit Descriptor(uint64_t bits)
      : start_(field(bits, 0)), leading_(field(bits, 16)), stride_(field(bits, 32)) {
    static constexpr uint32_t kLineBytes[4] = {16, 128, 64, 32};
    line_ = kLineBytes[bits >> 62];
    if ((bits >> 49 & 7) != 0) fault("wgmma: a base offset other than zero is not modelled");
  }

  // K-major, ((8, m), (T, 2 k)) : ((line, stride), (1, T)): a row is a line; without swizzle its two chunks
  // are `leading` apart.
  uint16_t k_major(uint32_t row, uint32_t k) const {
    const uint32_t chunk = line_ == 16 ? k / 8 * leading_ : k / 8 * 16;
    return read(row % 8 * line_ + row / 8 * stride_ + chunk + k % 8 * 2);
  }
  // MN-major, ((T, line / T, m), (8, k)) : ((1, T, leading), (line, stride)): a line is part of a column.
  // Without swizzle the two offsets change places.
  uint16_t mn_major(uint32_t row, uint32_t k) const {
    const uint32_t wide = line_ / 2;  // elements
    const uint32_t along = line_ == 16 ? stride_ : leading_, across = line_ == 16 ? leading_ : stride_;
    return read(row % wide * 2 + row / wide * along + k % 8 * line_ + k / 8 * across);
  }

 private:
  static uint32_t field(uint64_t bits, int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) << 4; }

  uint16_t read(uint32_t offset) const {
    const uint32_t address = start_ + offset;
    // Swizzle<log2(line / 16), 4, 3>.
    const uint32_t mask = line_ / 16 - 1, swizzled = address ^ ((address >> 7 & mask) << 4);
    uint16_t element;
    std::memcpy(&element, locate<shared>(swizzled, 2), 2);
    return element;
  }

  uint32_t start_, leading_, stride_, line_;
};

struct Product {
  unsigned line;
  std::vector<uint32_t*> a;  // registers; none: `a_matrix` describes it
  uint64_t a_matrix, b_matrix;
  bool accumulate;
  std::vector<float> rows;  // of A [64, 16], once all threads have come
};

// Fragments as the ISA's tables have them ("Register fragments for wgmma.mma_async.m64nNk16"): warp w has
// rows 16 w to 16 w + 15, arranged as for mma.m16n8k16; D is a row of such arrangements of 8 columns.
inline uint32_t fragment_row(uint32_t thread, uint32_t i) {
  return thread / 32 * 16 + thread % 32 / 4 + (i & 2) * 4;
}
inline uint32_t fragment_column(uint32_t thread, uint32_t i) { return i / 4 * 8 + thread % 4 * 2 + (i & 1); }

// What the product adds to each of the calling thread's accumulators. Operands in shared memory are read when
// it is called.
template <int kColumns, class T>
void multiply(std::vector<float>& d, uint32_t thread, const Product& p, bool b_is_mn_major,
              bool a_is_mn_major) {
  const Descriptor b(p.b_matrix), a(p.a_matrix);
  const auto row_of_a = [&](uint32_t row, uint32_t k) {
    if (!p.rows.empty()) return p.rows[row * 16 + k];
    return T::widen(a_is_mn_major ? a.mn_major(row, k) : a.k_major(row, k));
  };
  float left[2][16];
  for (uint32_t half = 0; half < 2; ++half)
    for (uint32_t k = 0; k < 16; ++k) left[half][k] = row_of_a(fragment_row(thread, half * 2), k);
  for (uint32_t i = 0; i < kColumns / 2; i += 2)
    if (i % 4 == 0)
      for (uint32_t j = 0; j < 2; ++j) {
        const uint32_t column = fragment_column(thread, i + j);
        double sums[2] = {p.accumulate ? d[i + j] : 0.0f, p.accumulate ? d[i + 2 + j] : 0.0f};
        for (uint32_t k = 0; k < 16; ++k) {
          const double right = T::widen(b_is_mn_major ? b.mn_major(column, k) : b.k_major(column, k));
          for (int half = 0; half < 2; ++half) sums[half] += left[half][k] * right;
        }
        d[i + j] = truncate_to_float(sums[0]);
        d[i + 2 + j] = truncate_to_float(sums[1]);
      }
}

template <int kColumns, class T>
void issue(const Registers<kColumns / 2>& d, Product mine, bool b_is_mn_major, bool a_is_mn_major) {
  if (hopper_thread().accessed) fault("wgmma: its registers were accessed since the last wgmma.fence");
  std::vector<uint32_t> issued;
  for (const uint32_t* r : mine.a) issued.push_back(*r);
  aligned<simt::kWarpgroup>("wgmma.mma_async", mine, [](Product* const* all) {
    for (uint32_t thread = 0; thread < simt::kWarpgroup; ++thread)
      if (all[thread]->a_matrix != all[0]->a_matrix || all[thread]->b_matrix != all[0]->b_matrix ||
          all[thread]->accumulate != all[0]->accumulate)
        fault("wgmma: descriptors or scale-d differ within the warpgroup");
    if (all[0]->a.empty()) return;
    std::vector<float> rows(64 * 16);
    for (uint32_t thread = 0; thread < simt::kWarpgroup; ++thread)
      for (uint32_t i = 0; i < 8; ++i)
        rows[fragment_row(thread, i) * 16 + fragment_column(thread, i)] =
            T::widen(static_cast<uint16_t>(*all[thread]->a[i / 2] >> (i % 2 * 16)));
    for (uint32_t thread = 0; thread < simt::kWarpgroup; ++thread) all[thread]->rows = rows;
  });

  // From now on the accumulators belong to the product; they hold NaN until it is waited for.
  Accumulators& accumulators = hopper_thread().accumulators[d[0]];
  if (accumulators.products++ == 0)
    for (uint32_t* r : d) {
      accumulators.value.push_back(see<float>(*r));
      *r = ~0u;
    }
  const uint32_t thread = simt::block->current % simt::kWarpgroup;
  simt::current_thread().products.post(
      [d, mine, issued, thread, b_is_mn_major, a_is_mn_major, state = &hopper_thread()] {
        for (size_t i = 0; i < issued.size(); ++i)
          if (*mine.a[i] != issued[i])
            fault("wgmma: a register of A was written while its product was under way");
        Accumulators& accumulators = state->accumulators[d[0]];
        multiply<kColumns, T>(accumulators.value, thread, mine, b_is_mn_major, a_is_mn_major);
        if (--accumulators.products > 0) return;
        for (size_t i = 0; i < d.size(); ++i) {
          if (*d[i] != ~0u) fault("wgmma: an accumulator was written while its product was under way");
          *d[i] = bits(accumulators.value[i]);
        }
        state->accumulators.erase(d[0]);
      });
}

inline void require_no_negation(int scale_a, int scale_b) {
  if (scale_a != 1 || scale_b != 1) fault("wgmma: imm-scale other than 1 is not modelled");
}
// A and B in shared memory.
template <int kColumns, class T>
void wgmma_mma_async_m64k16(const Registers<kColumns / 2>& d, uint64_t a, uint64_t b, bool scale_d,
                            int scale_a, int scale_b, int transpose_a, int transpose_b) {
  require_no_negation(scale_a, scale_b);
  issue<kColumns, T>(d, {0, {}, a, b, scale_d, {}}, transpose_b != 0, transpose_a != 0);
}
// A in registers.
template <int kColumns, class T>
void wgmma_mma_async_m64k16(const Registers<kColumns / 2>& d, const Registers<4>& a, uint64_t b, bool scale_d,
                            int scale_a, int scale_b, int transpose_b) {
  require_no_negation(scale_a, scale_b);
  issue<kColumns, T>(d, {0, {a.begin(), a.end()}, 0, b, scale_d, {}}, transpose_b != 0, false);
}

}  // namespace ptx

#endif
