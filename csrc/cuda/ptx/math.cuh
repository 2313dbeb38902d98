// Arithmetic instructions without a name in CUDA C++.
#pragma once
#include <type_traits>

#include "core/scalar.cuh"

namespace longlive::ptx {

// The same number, of which the compiler then knows nothing.
__device__ __forceinline__ int opaque(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// 2^x to 2 units in the last place; 2^-inf is 0.
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// log2(x) to a few units in the last place, for normal x: the sums of a softmax are at least 1.
__device__ __forceinline__ float log2_approximate(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::log2(x);
#endif
}

// Two numbers rounded and packed into one register, x in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float x, float y) {
#ifdef __CUDA_ARCH__
  uint32_t packed;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(y), "f"(x));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(y), "f"(x));
  return packed;
#elif !defined(__CUDACC__)
  return from_float<T>(x).bits | uint32_t(from_float<T>(y).bits) << 16;
#else
  return 0;
#endif
}

}  // namespace longlive::ptx
