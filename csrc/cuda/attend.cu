#include "cuda/attend_sm80.cuh"

#include "cuda/device.h"

namespace longlive {
namespace {

template <class T, int kHeadDim, int kTile>
void launch_attend(const AttendArguments& a, cudaStream_t stream) {
  const int query_tiles = (a.length + kAttendRows - 1) / kAttendRows;
  const dim3 grid(static_cast<unsigned>(query_tiles) * a.heads * a.batch);
  launch("attend", attend_kernel<T, kHeadDim, kTile>, grid, kAttendThreads,
         sizeof(AttendShared<T, kHeadDim, kTile>), stream, a, query_tiles,
         a.scale * 1.4426950408889634f);  // log2(e): exponentials are powers of two
}

template <class T, int kHeadDim>
void choose_tile(const AttendArguments& a, cudaStream_t stream) {
  // Two blocks on a multiprocessor hide each other's softmax. Where 64 keys at a time leave no room for the
  // second (100 KB on sm_86, sm_89 and sm_120), 32 do. By occupancy arithmetic, unmeasured.
  constexpr int kReserved = 1024;  // the system's own part of each block's shared memory
  if (2 * (sizeof(AttendShared<T, kHeadDim, 64>) + kReserved) <= shared_memory_per_multiprocessor())
    launch_attend<T, kHeadDim, 64>(a, stream);
  else
    launch_attend<T, kHeadDim, 32>(a, stream);
}

template <class T>
void choose_head_dim(const AttendArguments& a, cudaStream_t stream) {
  if (a.head_dim == 128)
    choose_tile<T, 128>(a, stream);
  else
    choose_tile<T, 64>(a, stream);
}

}  // namespace

void attend(const AttendArguments& a, void* stream) {
  if (a.batch * a.length == 0) return;
  if (DType(a.dtype) == DType::kFloat16)
    choose_head_dim<__half>(a, static_cast<cudaStream_t>(stream));
  else
    choose_head_dim<__nv_bfloat16>(a, static_cast<cudaStream_t>(stream));
}

}  // namespace longlive
