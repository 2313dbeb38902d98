// The warp-wide matrix product of sm_80, and the loads that bring its operands from shared memory.
#pragma once
#include <type_traits>

#include "core/platform.cuh"
#ifndef __CUDACC__
#include "emulator/ampere.h"
#endif

namespace longlive::ptx {

// c [16, 8] += a [16, 16] * b [16, 8]. With g = lane / 4 and t = lane % 4, a lane holds
//   a[0..3]: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 for a[0..1] and 8 more for a[2..3]
//   b[0..1]: rows 2t, 2t + 1, and 8 more; column g
//   c[0..3]: row g for c[0..1], g + 8 for c[2..3]; columns 2t, 2t + 1
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif !defined(__CUDACC__)
  simt::mma_m16n8k16<T>(c, a, b0, b1);
#endif
}

// Four 8 x 8 matrices of 16-bit elements. Lane 8m + i gives the address of row i of matrix m (16 bytes);
// register m of lane l receives elements 2t, 2t + 1 of row g of matrix m or, transposed, elements g of rows
// 2t and 2t + 1.
template <bool kTransposed>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef __CUDA_ARCH__
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#elif !defined(__CUDACC__)
  simt::ldmatrix_x4<kTransposed>(r, static_cast<const uint16_t*>(row));
#endif
}

}  // namespace longlive::ptx
