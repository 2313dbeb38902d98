#include "cuda/attend_sm80.cuh"

#include <stdexcept>

#include "cuda/attend_sm90.h"
#include "cuda/device.h"

namespace longlive {
namespace {

// Two blocks on a multiprocessor hide each other's softmax. Where 64 keys at a time leave no room for the
// second (100 KB on sm_86, sm_89 and sm_120), 32 do. By occupancy arithmetic, unmeasured.
int key_tile(int head_dim) {
  constexpr size_t kReserved = 1024;  // the system's own part of each block's shared memory
  const size_t shared =
      head_dim == 128 ? sizeof(AttendShared<__half, 128, 64>) : sizeof(AttendShared<__half, 64, 64>);
  return kAttendBlocks * (shared + kReserved) <= shared_memory_per_multiprocessor() ? 64 : 32;
}

// All that the kernel is told. The workspace is laid out for a table all entries of which are used, the most
// that it can take.
struct Plan {
  AttendSm80Parameters parameters;
  size_t partial_bytes, arrived_bytes;

  Plan(const AttendArguments& a, void* workspace) : parameters{} {
    const int tile = key_tile(a.head_dim);
    auto& p = parameters;
    p.a = a;
    p.query_tiles = (a.length + kAttendRows - 1) / kAttendRows;
    p.scale = a.scale * 1.4426950408889634f;
    p.blocks = compute_capability() == 90 ? 1 : kAttendBlocks * multiprocessors();  // kCutsLastWave
    const Schedule largest =
        make_schedule_of_parts(a.heads * p.query_tiles, a.entries * ((a.tokens + tile - 1) / tile), p.blocks);
    p.units_a_sample = unit_count(largest);
    p.sharers_a_sample = largest.sharers;
    p.cut_a_sample = largest.cut;
    partial_bytes = sizeof(float) * a.batch * largest.sharers * kAttendThreads * (a.head_dim + 8);
    arrived_bytes = sizeof(uint32_t) * a.batch * largest.cut;
    p.partials = static_cast<float*>(workspace);
    p.arrived = reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + partial_bytes);
  }
};

template <class T, int kHeadDim, int kTile>
void launch_attend(const Plan& plan, cudaStream_t stream) {
  const AttendSm80Parameters& p = plan.parameters;
  static_assert(kAttendPartial<kHeadDim> == kHeadDim + 8, "as Plan has it");
  if (p.cut_a_sample > 0) clear(p.arrived, plan.arrived_bytes, stream);
  const dim3 grid(static_cast<unsigned>(p.units_a_sample) * p.a.batch);
  launch("attend", attend_kernel<T, kHeadDim, kTile>, grid, kAttendThreads,
         sizeof(AttendShared<T, kHeadDim, kTile>), stream, p);
}

template <class T, int kHeadDim>
void choose_tile(const Plan& plan, cudaStream_t stream) {
  if (key_tile(kHeadDim) == 64)
    launch_attend<T, kHeadDim, 64>(plan, stream);
  else
    launch_attend<T, kHeadDim, 32>(plan, stream);
}

template <class T>
void choose_head_dim(const Plan& plan, cudaStream_t stream) {
  if (plan.parameters.a.head_dim == 128)
    choose_tile<T, 128>(plan, stream);
  else
    choose_tile<T, 64>(plan, stream);
}

void attend_sm80(const AttendArguments& a, void* workspace, cudaStream_t stream) {
  const Plan plan(a, workspace);
  if (DType(a.dtype) == DType::kFloat16)
    choose_head_dim<__half>(plan, stream);
  else
    choose_head_dim<__nv_bfloat16>(plan, stream);
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
  if (is_empty(a) || !has_pages(a)) return 0;
  const Plan plan(a, nullptr);
  return plan.partial_bytes + plan.arrived_bytes;
}

void attend(const AttendArguments& a, const AttendOptions& options, void* workspace, void* stream) {
  if (is_empty(a)) return;
#ifdef LONGLIVE_RAG_SM90
  if (attend_kernel(a, options) == AttendKernel::kSm90)
    return attend_sm90(a, options.key_tile, workspace, stream);
#endif
  AttendArguments seen = a;
  if (!has_pages(a)) seen.entries = 0;
  attend_sm80(seen, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace longlive
