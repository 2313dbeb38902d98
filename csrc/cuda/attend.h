// attend: attention of the queries of some frames over the pages a table names.
#pragma once
#include <cstdint>

namespace longlive {

struct AttendArguments {
  const void* q;        // [batch, length, heads, head_dim], normalised and spatially rotated
  const void* k_pages;  // [slots, heads, tokens, head_dim]
  const void* v_pages;
  const int32_t* slots;           // [batch, entries]; negative: unused
  const int32_t* positions;       // [batch, entries]; temporal position of each page
  const int32_t* query_position;  // [batch, length / tokens]
  const double* frequencies;      // [pairs]: radians per frame of the first pairs of each head
  void* out;                      // [batch, length, heads, head_dim]
  float* lse;                     // [batch, length, heads], natural logarithm; null: not wanted
  int batch, length, heads, head_dim, tokens, entries, pairs;
  int dtype;    // DType: float16 or bfloat16
  float scale;  // of the scores, positive
};

// head_dim 64 or 128, float16 or bfloat16.
void attend(const AttendArguments& arguments, void* stream);

}  // namespace longlive
