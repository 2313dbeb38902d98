// The part of CUDA's language and library that the kernel bodies use, for an ordinary C++ compiler. Names,
// types and meaning are CUDA's; only what is used is here.
#pragma once
#include <bit>
#include <cmath>
#include <type_traits>

#include "emulator/simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using cudaStream_t = void*;

struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

// Half-precision numbers: storage and correctly rounded conversion; arithmetic is done in float.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                    : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                   : std::ldexp(static_cast<float>(fraction), -24);
  return x.bits >> 15 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  if (magnitude < 0x1p-14f) exponent = -13;  // subnormal: the spacing stays 2^-24
  // Rounds to nearest even in units of the last place; a carry runs into the exponent by itself.
  const auto steps = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 13) << 10) + steps))};
}

template <class T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T)) throw std::logic_error("a misaligned load");
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t(x) * y >> 32); }
inline int __popc(unsigned x) { return std::popcount(x); }
// The nearest integer, of two the even one; 0 for a NaN.
inline int __float2int_rn(float x) { return std::isnan(x) ? 0 : static_cast<int>(std::nearbyint(x)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void sincospif(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(std::sin(M_PI * static_cast<double>(x)));
  *cosine = static_cast<float>(std::cos(M_PI * static_cast<double>(x)));
}
using std::max;
using std::min;

inline void __syncthreads() { simt::barrier_sync(0, blockDim.x * blockDim.y * blockDim.z, "__syncthreads"); }
inline void __threadfence() {}
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

constexpr unsigned kFullMask = 0xffffffffu;

inline void require_full_mask(unsigned mask) {
  if (mask != kFullMask) throw std::logic_error("a warp operation with a mask that leaves lanes out");
}
inline void __syncwarp(unsigned mask = kFullMask) {
  require_full_mask(mask);
  int nothing = 0;
  simt::collective<simt::kWarp>("__syncwarp", nothing, [](int* const*) {});
}

namespace simt {
template <class T>
struct Exchange {
  T value, result;
  unsigned source;
};
template <class T>
T exchange(const char* name, T value, unsigned source) {
  Exchange<T> mine{value, value, source};
  collective<kWarp>(name, mine, [](Exchange<T>* const* lanes) {
    for (unsigned i = 0; i < kWarp; ++i) lanes[i]->result = lanes[lanes[i]->source % kWarp]->value;
  });
  return mine.result;
}
inline unsigned lane() { return block->current % kWarp; }

// The low (0) or high (1) one of a register's two 16-bit numbers.
template <class T>
float half_of(uint32_t packed, unsigned half) {
  const T element{static_cast<uint16_t>(packed >> (16 * half))};
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(element);
  else
    return __bfloat162float(element);
}
}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned source) {
  require_full_mask(mask);
  return simt::exchange("__shfl_sync", value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
  require_full_mask(mask);
  return simt::exchange("__shfl_xor_sync", value, simt::lane() ^ distance);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  require_full_mask(mask);
  return simt::exchange("__shfl_up_sync", value,
                        simt::lane() < distance ? simt::lane() : simt::lane() - distance);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  require_full_mask(mask);
  unsigned mine = predicate;
  simt::collective<simt::kWarp>("__ballot_sync", mine, [](unsigned* const* lanes) {
    unsigned all = 0;
    for (unsigned i = 0; i < simt::kWarp; ++i) all |= *lanes[i] << i;
    for (unsigned i = 0; i < simt::kWarp; ++i) *lanes[i] = all;
  });
  return mine;
}
