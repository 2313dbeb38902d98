// Ampere's instructions for the emulator: asynchronous copies and the matrix product of a warp. Written from
// the PTX ISA (9.0, sections "cp.async", "mma.m16n8k16" and "ldmatrix").
#pragma once
#include "emulator/cuda_names.h"

namespace simt {

// cp.async of 16 bytes with zero fill. The destination holds NaN until its group is waited for.
inline void cp_async_16(void* target, const void* source, bool valid) {
  std::memset(target, kPoison, 16);
  current_thread().copies.post([=] {
    if (valid)
      std::memcpy(target, source, 16);
    else
      std::memset(target, 0, 16);
  });
}

// c [16, 8] += a [16, 16] * b [16, 8]. With g = lane / 4 and t = lane % 4, a lane holds
//   a[0..3]: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 for a[0..1] and 8 more for a[2..3]
//   b[0..1]: rows 2t, 2t + 1, and 8 more; column g
//   c[0..3]: row g for c[0..1], g + 8 for c[2..3]; columns 2t, 2t + 1
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    float (&c)[4];
    const uint32_t (&a)[4];
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  collective<kWarp>("mma", mine, [](Operands* const* lanes) {
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const unsigned g = lane / 4, t = lane % 4;
      for (unsigned i = 0; i < 4; ++i)
        for (unsigned half = 0; half < 2; ++half)
          a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = half_of<T>(lanes[lane]->a[i], half);
      for (unsigned i = 0; i < 2; ++i)
        for (unsigned half = 0; half < 2; ++half)
          b[2 * t + 8 * i + half][g] = half_of<T>(lanes[lane]->b[i], half);
    }
    for (unsigned lane = 0; lane < kWarp; ++lane)
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = lanes[lane]->c[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        lanes[lane]->c[i] = sum;
      }
  });
}

// Four 8 x 8 matrices of 16-bit elements. Lane 8m + i gives row i of matrix m; register m of a lane receives
// elements 2t, 2t + 1 of row g of matrix m or, transposed, elements g of rows 2t and 2t + 1.
template <bool kTransposed>
void ldmatrix_x4(uint32_t (&r)[4], const uint16_t* row) {
  struct Operands {
    uint32_t (&r)[4];
    const uint16_t* row;
  } mine{r, row};
  collective<kWarp>("ldmatrix", mine, [](Operands* const* lanes) {
    for (unsigned lane = 0; lane < kWarp; ++lane)
      for (unsigned m = 0; m < 4; ++m) {
        const unsigned g = lane / 4, t = lane % 4;
        const auto element = [&](unsigned i, unsigned j) -> uint32_t { return lanes[8 * m + i]->row[j]; };
        lanes[lane]->r[m] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                        : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
      }
  });
}

}  // namespace simt
