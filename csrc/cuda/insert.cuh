// One block takes one token of K, V or Q: a row of heads * head_dim elements, held in registers between the
// sum of squares and the rotation, so that every byte is read once and written once.
#pragma once
#include "core/pages.cuh"
#include "core/reduce.cuh"
#include "core/scalar.cuh"
#include "cuda/insert.h"

namespace longlive {

// A thread holds one vector unless the row would take more threads than this: three blocks then still share
// an SM and hide each other's reduction. By occupancy arithmetic, unmeasured.
constexpr int kInsertThreads = 640;

// Threads of the largest block in which each holds `held` vectors.
template <class T>
constexpr int insert_max_threads(int held) {
  return held < 4 ? kInsertThreads : kInsertMaxWidth / Vector<T>::kSize / 4;
}

struct InsertShared {
  float partial[kWarpSize];  // sum of squares of each warp
};

__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// `kCount` numbers as floats, in 16-byte loads if `wide`; the address must then be a multiple of 16.
template <int kCount, class T>
__device__ __forceinline__ void load_floats(float* to, const T* from, bool wide) {
  static_assert(kCount % Vector<T>::kSize == 0, "whole vectors");
  if (wide) {
#pragma unroll
    for (int i = 0; i < kCount; i += Vector<T>::kSize) {
      const Vector<T> vector = load_vector(from + i);
#pragma unroll
      for (int j = 0; j < Vector<T>::kSize; ++j) to[i + j] = to_float(vector.element[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = to_float(from[i]);
  }
}

// Grid: (batch * frames * tokens, 3 for K, V and Q or 2 without Q). A thread holds
// `kHeld` vectors; `head_reciprocal` is 2^32 / head_dim, rounded up.
template <class T, int kHeld>
__global__ void __launch_bounds__(insert_max_threads<T>(kHeld))
    insert_kernel(const InsertArguments a, const unsigned head_reciprocal) {
  using Row = Vector<T>;
  const int tokens = a.tokens, heads = a.heads, head_dim = a.head_dim;
  const unsigned frame = blockIdx.x / tokens;  // over batch and frames
  const int token = blockIdx.x % tokens;
  const bool is_query = blockIdx.y == 2, is_value = blockIdx.y == 1;
  const int slot = is_query ? 0 : a.slots[frame];
  if (slot < 0) return;

  const InsertTensor& tensor = is_query ? a.q : is_value ? a.v : a.k;
  const T* source = static_cast<const T*>(tensor.data) + (frame / a.frames) * tensor.batch_stride +
                    (frame % a.frames) * tensor.frame_stride + token * tensor.token_stride;
  const int vectors = heads * head_dim / Row::kSize;
  Row held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    if (vector < vectors) held[i] = load_vector(source + vector * Row::kSize);
  }

  float scale = 1.0f;
  if (tensor.weight) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (int(threadIdx.x + i * blockDim.x) < vectors)
#pragma unroll
        for (int j = 0; j < Row::kSize; ++j) {
          const float x = to_float(held[i].element[j]);
          squares += x * x;
        }
    const float sum = block_sum(squares, shared_memory<InsertShared>().partial);
    scale = rsqrtf(sum / static_cast<float>(heads * head_dim) + a.eps);
  }

  const float* angles = a.rotation + int64_t(token) * a.pairs * 2;
  const int first_pair = head_dim / 2 - a.pairs;
  // With an even number of pairs two neighbours lie in one 16-byte word, and both turn or neither does.
  const bool wide_angles = a.pairs % 2 == 0 && is_aligned(a.rotation),
             wide_weight = is_aligned(tensor.weight);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    if (vector >= vectors) break;
    const int column = vector * Row::kSize, head = __umulhi(column, head_reciprocal),
              dim = column - head * head_dim;
    Row& row = held[i];
    if (!is_value) {
      float x[Row::kSize];
#pragma unroll
      for (int j = 0; j < Row::kSize; ++j) x[j] = to_float(row.element[j]);
      if (tensor.weight) {
        float weight[Row::kSize];
        if (tensor.float_weight)
          load_floats<Row::kSize>(weight, static_cast<const float*>(tensor.weight) + column, wide_weight);
        else
          load_floats<Row::kSize>(weight, static_cast<const T*>(tensor.weight) + column, wide_weight);
#pragma unroll
        for (int j = 0; j < Row::kSize; ++j) x[j] *= scale * weight[j];
      }
#pragma unroll
      for (int j = 0; j < Row::kSize; j += 4) {
        float turn[4] = {1.0f, 0.0f, 1.0f, 0.0f};  // cosine and sine of two pairs
        const int pair = (dim + j) / 2 - first_pair;
        if (pair >= 0)
          load_floats<4>(turn, angles + pair * 2, wide_angles);
        else if (pair == -1)
          turn[2] = angles[0], turn[3] = angles[1];
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          row.element[j + i] = from_float<T>(x[j + i] * turn[i] - x[j + i + 1] * turn[i + 1]);
          row.element[j + i + 1] = from_float<T>(x[j + i] * turn[i + 1] + x[j + i + 1] * turn[i]);
        }
      }
    }
    T* target = is_query ? static_cast<T*>(a.q_out) + int64_t(blockIdx.x) * heads * head_dim + column
                         : static_cast<T*>(is_value ? a.v_pages : a.k_pages) +
                               page_offset(slot, head, token, heads, tokens, head_dim) + dim;
    *reinterpret_cast<Row*>(target) = row;
  }
}

}  // namespace longlive
