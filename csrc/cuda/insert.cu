#include "cuda/insert.cuh"

namespace longlive {

void insert(const InsertArguments& a, void* stream) {
  const unsigned rows = static_cast<unsigned>(a.batch) * a.frames * a.tokens;
  if (rows == 0 || a.heads == 0 || a.head_dim == 0) return;
  dispatch(DType(a.dtype), [&](auto element) {
    using T = decltype(element);
    const int vectors = a.heads * a.head_dim / Vector<T>::kSize;
    const int held = vectors <= kInsertThreads ? 1 : vectors <= 2 * kInsertThreads ? 2 : 4;
    static_assert(insert_max_threads<T>(4) <= 1024, "the widest row fits a block");
    const int threads = ((vectors + held - 1) / held + kWarpSize - 1) / kWarpSize * kWarpSize;
    const auto kernel = held == 1   ? insert_kernel<T, 1>
                        : held == 2 ? insert_kernel<T, 2>
                                    : insert_kernel<T, 4>;
    const unsigned head_reciprocal = 0xffffffffu / a.head_dim + 1;
    launch("insert", kernel, dim3(rows, a.q.data ? 3 : 2), threads, sizeof(InsertShared),
           static_cast<cudaStream_t>(stream), a, head_reciprocal);
  });
}

}  // namespace longlive
