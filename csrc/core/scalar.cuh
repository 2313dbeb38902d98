// Element types of tensors: 16-byte vectors of them, and arithmetic in float.
#pragma once
#include "core/platform.cuh"

namespace longlive {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };  // as native.py passes it

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

// The two 16-bit numbers of one register, the low half first.
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t packed) {
  static_assert(sizeof(T) == 2, "two numbers in 32 bits");
  struct {
    T x, y;
  } pair;
  memcpy(&pair, &packed, sizeof pair);
  return make_float2(to_float(pair.x), to_float(pair.y));
}

// One 16-byte access.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

// The vector at an address that is a multiple of 16: others stop a GPU, and the emulator too.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* address) {
#ifndef __CUDACC__
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Vector<T>) != 0)
    throw std::logic_error("a misaligned 16-byte load");
#endif
  return *reinterpret_cast<const Vector<T>*>(address);
}

// Calls `function(T{})` for the element type that `dtype` names.
template <class Function>
void dispatch(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kFloat16:
      return function(__half{});
    case DType::kBFloat16:
      return function(__nv_bfloat16{});
  }
}

}  // namespace longlive
