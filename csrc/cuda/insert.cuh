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

template <class T>
__device__ __forceinline__ float load_weight(const InsertTensor& tensor, int column) {
  return tensor.float_weight ? static_cast<const float*>(tensor.weight)[column]
                             : to_float(static_cast<const T*>(tensor.weight)[column]);
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
    if (vector < vectors) held[i] = reinterpret_cast<const Row*>(source)[vector];
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

  const float2* angles = reinterpret_cast<const float2*>(a.rotation) + int64_t(token) * a.pairs;
  const int first_pair = head_dim / 2 - a.pairs;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    if (vector >= vectors) break;
    const int column = vector * Row::kSize, head = __umulhi(column, head_reciprocal),
              dim = column - head * head_dim;
    Row& row = held[i];
    if (!is_value) {
#pragma unroll
      for (int j = 0; j < Row::kSize; j += 2) {
        float x = to_float(row.element[j]), y = to_float(row.element[j + 1]);
        if (tensor.weight) {
          x *= scale * load_weight<T>(tensor, column + j);
          y *= scale * load_weight<T>(tensor, column + j + 1);
        }
        const int pair = (dim + j) / 2 - first_pair;
        const float2 angle = pair >= 0 ? __ldg(angles + pair) : float2{1.0f, 0.0f};
        row.element[j] = from_float<T>(x * angle.x - y * angle.y);
        row.element[j + 1] = from_float<T>(x * angle.y + y * angle.x);
      }
    }
    T* target = is_query ? static_cast<T*>(a.q_out) + int64_t(blockIdx.x) * heads * head_dim + column
                         : static_cast<T*>(is_value ? a.v_pages : a.k_pages) +
                               page_offset(slot, head, token, heads, tokens, head_dim) + dim;
    *reinterpret_cast<Row*>(target) = row;
  }
}

}  // namespace longlive
