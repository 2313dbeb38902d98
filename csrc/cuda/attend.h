// attend: attention of the queries of some frames over the pages a table names.
#pragma once
#include <cstddef>
#include <cstdint>

namespace longlive {

struct AttendArguments {
  const void* q;        // [batch, length, heads, head_dim], normalised and spatially rotated
  const void* k_pages;  // [page_slots, heads, tokens, head_dim]
  const void* v_pages;
  const int32_t* slots;           // [batch, entries]; negative: unused
  const int32_t* positions;       // [batch, entries]; temporal position of each page
  const int32_t* query_position;  // [batch, length / tokens]
  const double* frequencies;      // [pairs]: radians per frame of the first pairs of each head
  void* out;                      // [batch, length, heads, head_dim]
  float* lse;                     // [batch, length, heads], natural logarithm; null: not wanted
  int batch, length, heads, head_dim, page_slots, tokens, entries, pairs;
  int dtype;    // DType: float16 or bfloat16
  float scale;  // of the scores, positive
};

enum class AttendKernel {
  kAuto,  // the one for sm_90a where it runs and takes the arguments, else the other
  kSm80,  // attend_sm80.cuh, for every GPU
  kSm90,  // attend_sm90.cuh, for Hopper
};

// For measurements and checks; the defaults are what to use.
struct AttendOptions {
  AttendKernel kernel = AttendKernel::kAuto;
  int key_tile = 0;  // of the kernel for sm_90a: 112, 128, 144 or 176 tokens; zero: chosen by the frame size
};

// The kernel that attend launches on the current device, by sizes and dtype. Throws std::invalid_argument if
// the options demand one that is not compiled in or does not take them.
AttendKernel attend_kernel(const AttendArguments& arguments, const AttendOptions& options);

// Bytes of workspace that attend needs, by sizes and dtype.
size_t attend_workspace(const AttendArguments& arguments, const AttendOptions& options);

// head_dim 64 or 128, float16 or bfloat16. `workspace`: of attend_workspace() bytes, aligned to 16; it need
// not be initialised and holds nothing of use afterwards.
void attend(const AttendArguments& arguments, const AttendOptions& options, void* workspace, void* stream);

}  // namespace longlive
