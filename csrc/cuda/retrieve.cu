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

// The counters stand at the head of the workspace, the lists behind them.
size_t counter_bytes(int batch) { return (batch * sizeof(unsigned) + 15) / 16 * 16; }

template <class T, int kRegisters>
void launch_retrieve(const RetrieveArguments& a, void* workspace, cudaStream_t stream) {
  const RetrieveScratch scratch{
      .finished_blocks = static_cast<unsigned*>(workspace),
      .lists = reinterpret_cast<RankingKey*>(static_cast<char*>(workspace) + counter_bytes(a.batch))};
  launch("retrieve", retrieve_kernel<T, kRegisters>, dim3(retrieve_blocks(a.batch, a.count), a.batch),
         kRetrieveThreads, sizeof(RetrieveShared<kRegisters>), stream, a, scratch);
}

}  // namespace

size_t retrieve_workspace(int batch, int count, int k) {
  if (batch == 0) return 0;
  const int entries = k <= kWarpSize ? RankedList<1>::kSize : RankedList<2>::kSize;
  return counter_bytes(batch) + size_t(batch) * retrieve_blocks(batch, count) * entries * sizeof(RankingKey);
}

void retrieve(const RetrieveArguments& a, void* workspace, void* stream) {
  if (a.batch == 0) return;
  clear(workspace, counter_bytes(a.batch), stream);
  dispatch(DType(a.dtype), [&](auto element) {
    using T = decltype(element);
    if (a.k <= kWarpSize)
      launch_retrieve<T, 1>(a, workspace, static_cast<cudaStream_t>(stream));
    else
      launch_retrieve<T, 2>(a, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace longlive
