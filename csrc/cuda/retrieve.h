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
  int32_t* indices;   // [batch, k]; -1 where there are fewer candidates
  float* similarity;  // [batch, k]; -inf there
  int64_t keys_batch_stride, keys_stride, norms_batch_stride;  // in elements
  int first_stride, last_stride;                               // 1, or 0 for one bound for all
  int batch, count, width, k;
  int dtype;  // DType of query and keys
};

constexpr int kRetrieveMaxWidth = 4096;

// Bytes of workspace that retrieve needs.
size_t retrieve_workspace(int batch, int count, int k);

// `workspace`: of that size, aligned to 16; it need not be initialised and holds nothing of use afterwards.
void retrieve(const RetrieveArguments& arguments, void* workspace, void* stream);

}  // namespace longlive
