#include "cuda/retrieve.cuh"

#include <algorithm>

#include "cuda/device.h"

namespace longlive {
namespace {

// Blocks of one sample: no more than have keys to read, nor than run at once; three fit a multiprocessor.
int retrieve_blocks(int batch, int count) {
  const int useful = (count + kRetrieveWarps * kRetrieveKeys - 1) / (kRetrieveWarps * kRetrieveKeys);
  return std::max(1, std::min(useful, 3 * multiprocessors() / batch));
}

template <class T, int kRegisters>
void launch_retrieve(const RetrieveArguments& a, cudaStream_t stream) {
  launch("retrieve", retrieve_kernel<T, kRegisters>, dim3(retrieve_blocks(a.batch, a.count), a.batch),
         kRetrieveThreads, sizeof(RetrieveShared<kRegisters>), stream, a);
}

}  // namespace

size_t retrieve_list_bytes(int batch, int count, int k) {
  const int entries = k <= kWarpSize ? RankedList<1>::kSize : RankedList<2>::kSize;
  return size_t(batch) * retrieve_blocks(std::max(1, batch), count) * entries * sizeof(RankingKey);
}

void retrieve(const RetrieveArguments& a, void* stream) {
  if (a.batch == 0) return;
  dispatch(DType(a.dtype), [&](auto element) {
    using T = decltype(element);
    if (a.k <= kWarpSize)
      launch_retrieve<T, 1>(a, static_cast<cudaStream_t>(stream));
    else
      launch_retrieve<T, 2>(a, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace longlive
