// retrieve: the stored embeddings most similar to a query.
#pragma once
#include <cstddef>
#include <cstdint>

namespace longlive {

struct RetrieveArguments {
  const void* query;           // [batch, width]
  const void* keys;            // [batch, count, width], the last contiguous
  const float* inverse_norms;  // [batch, count], the last contiguous
  const int32_t* first;        // [batch], candidates are first <= i < last
  const int32_t* last;
  const int32_t* frame_slots;  // [batch, count], the last contiguous; null: no slots wanted
  int32_t* indices;            // [batch, k]; -1 where there are fewer candidates
  float* similarity;           // [batch, k]; -inf there
  int32_t* slots;              // [batch, k], the last contiguous: frame_slots of the indices; -1 there
  unsigned* finished_blocks;   // [batch], zero; zero again after the launch
  void* lists;                 // retrieve_list_bytes() of scratch memory
  int64_t keys_batch_stride, keys_stride;  // in elements
  int64_t norms_batch_stride, frame_slots_batch_stride, slots_batch_stride;
  int first_stride, last_stride;  // 1, or 0 for one bound for all
  int batch, count, width, k;
  int dtype;  // DType of query and keys
};

constexpr int kRetrieveMaxK = 64;
constexpr int kRetrieveMaxWidth = 4096;

size_t retrieve_list_bytes(int batch, int count, int k);

void retrieve(const RetrieveArguments& arguments, void* stream);

}  // namespace longlive
