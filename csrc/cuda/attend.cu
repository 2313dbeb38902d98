#include "cuda/attend_sm80.cuh"

#include <stdexcept>

#include "cuda/attend_sm90.h"
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

void attend_sm80(const AttendArguments& a, cudaStream_t stream) {
  if (DType(a.dtype) == DType::kFloat16)
    choose_head_dim<__half>(a, stream);
  else
    choose_head_dim<__nv_bfloat16>(a, stream);
}

// Whether there is an output at all, and whether there is anything to attend to.
bool is_empty(const AttendArguments& a) { return a.batch == 0 || a.length == 0 || a.heads == 0; }
bool has_pages(const AttendArguments& a) { return a.entries > 0 && a.page_slots > 0; }

}  // namespace

AttendKernel attend_kernel(const AttendArguments& a, const AttendOptions& options) {
#ifdef LONGLIVE_RAG_SM90
  const bool taken = attend_sm90_supports(a) && has_pages(a) && !is_empty(a);
#else
  const bool taken = false;
#endif
  switch (options.kernel) {
    case AttendKernel::kAuto:
      return taken && compute_capability() == 90 ? AttendKernel::kSm90 : AttendKernel::kSm80;
    case AttendKernel::kSm90:
      if (taken) return AttendKernel::kSm90;
      throw std::invalid_argument(
          "attend: the kernel for sm_90a is not compiled in or does not take these sizes");
    default:
      return AttendKernel::kSm80;
  }
}

size_t attend_workspace(const AttendArguments& a, const AttendOptions& options) {
#ifdef LONGLIVE_RAG_SM90
  if (attend_kernel(a, options) == AttendKernel::kSm90) return attend_sm90_workspace(a, options.key_tile);
#endif
  return 0;
}

void attend(const AttendArguments& a, const AttendOptions& options, void* workspace, void* stream) {
  if (is_empty(a)) return;
#ifdef LONGLIVE_RAG_SM90
  if (attend_kernel(a, options) == AttendKernel::kSm90)
    return attend_sm90(a, options.key_tile, workspace, stream);
#endif
  AttendArguments seen = a;
  if (!has_pages(a)) seen.entries = 0;
  attend_sm80(seen, static_cast<cudaStream_t>(stream));
}

}  // namespace longlive
