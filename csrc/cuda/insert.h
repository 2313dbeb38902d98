// insert: normalise and rotate the keys (and queries) of new frames, and write keys and values into their
// pages.
#pragma once
#include <cstdint>

namespace longlive {

struct InsertTensor {
  const void* data;  // [batch, frames, tokens, heads, head_dim], the last two contiguous
  int64_t batch_stride, frame_stride, token_stride;  // in elements
  const void* weight;                                // [heads * head_dim]; null: not normalised here
  bool float_weight;                                 // the weight is float32, else of the arguments' dtype
};

struct InsertArguments {
  InsertTensor k, v, q;  // q.data null: no queries
  void* k_pages;         // [slots, heads, tokens, head_dim]
  void* v_pages;
  void* q_out;            // [batch, frames * tokens, heads, head_dim]
  const float* rotation;  // [tokens, pairs, 2]: cos and sin of the last `pairs` pairs of each head
  const int32_t* slots;   // [batch, frames]; negative: the frame is not written
  int batch, frames, tokens, heads, head_dim, pairs;
  int dtype;  // DType of all tensors; the weights may be float32
  float eps;
};

// Largest heads * head_dim, whatever the type.
constexpr int kInsertMaxWidth = 16384;

void insert(const InsertArguments& arguments, void* stream);

}  // namespace longlive
