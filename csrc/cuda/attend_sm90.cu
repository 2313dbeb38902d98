#include "cuda/attend_sm90.cuh"

#include "cuda/device.h"
#include "cuda/tensor_map.cuh"

namespace longlive {
namespace {

int key_tile_of(const AttendArguments& a, int key_tile) {
  return key_tile ? key_tile : choose_key_tile(a.tokens);
}

int query_tiles(const AttendArguments& a) { return (a.length + kQueryRows - 1) / kQueryRows; }

// A sample's schedule if all entries of the table are used: the most room it can take.
Schedule largest_schedule(const AttendArguments& a, int key_tile) {
  return make_schedule(a.heads * query_tiles(a), a.entries * ((a.tokens + key_tile - 1) / key_tile),
                       multiprocessors());
}

size_t partial_bytes(const AttendArguments& a, const Schedule& schedule) {
  return sizeof(float) * a.batch * partial_count(schedule) * kConsumerThreads * (a.head_dim / 2 + 4);
}
size_t arrived_bytes(const AttendArguments& a, const Schedule& schedule) {
  return sizeof(uint32_t) * a.batch * schedule.cut * kConsumers;
}

template <class T, int kHeadDim, int kKeyTile>
void launch_attend(const AttendArguments& a, void* workspace, cudaStream_t stream) {
  using Shared = AttendSm90Shared<T, kHeadDim, kKeyTile>;
  static_assert(sizeof(Shared) <= kSharedBytes, "the plan of shared memory fits a multiprocessor");
  AttendSm90Parameters p{};
  p.a = a;
  const int64_t row = int64_t(a.heads) * kHeadDim;
  p.q = tensor_map(
      {a.q, DType(a.dtype), kHeadDim, a.length, a.heads, a.batch, row, kHeadDim, a.length * row, kQueryRows});
  const HeadRows pages{a.k_pages,      DType(a.dtype), kHeadDim, a.tokens,
                       a.heads,        a.page_slots,   kHeadDim, int64_t(a.tokens) * kHeadDim,
                       a.tokens * row, kKeyTile};
  p.k = tensor_map(pages);
  HeadRows values = pages;
  values.data = a.v_pages;
  p.v = tensor_map(values);
  p.query_tiles = query_tiles(a);
  p.frames = a.length / a.tokens;
  p.scale = a.scale * 1.4426950408889634f;
  const Schedule schedule = largest_schedule(a, kKeyTile);
  p.partials_a_sample = partial_count(schedule);
  p.cut_a_sample = schedule.cut;
  p.partials = static_cast<float*>(workspace);
  p.arrived = reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + partial_bytes(a, schedule));
  if (schedule.cut) clear(p.arrived, arrived_bytes(a, schedule), stream);
  // Never fewer blocks, however little there is to do: a sample is cut by their number.
  launch("attend", attend_sm90_kernel<T, kHeadDim, kKeyTile>, dim3(multiprocessors()), kAttendSm90Threads,
         sizeof(Shared), stream, p);
}

template <class T, int kHeadDim>
void choose_tile(const AttendArguments& a, int key_tile, void* workspace, cudaStream_t stream) {
  switch (key_tile_of(a, key_tile)) {
    case 112:
      return launch_attend<T, kHeadDim, 112>(a, workspace, stream);
    case 128:
      return launch_attend<T, kHeadDim, 128>(a, workspace, stream);
    case 144:
      return launch_attend<T, kHeadDim, 144>(a, workspace, stream);
    case 176:
      return launch_attend<T, kHeadDim, 176>(a, workspace, stream);
    default:
      throw std::invalid_argument("attend: key_tile must be 112, 128, 144 or 176, got " +
                                  std::to_string(key_tile));
  }
}

template <class T>
void choose_head_dim(const AttendArguments& a, int key_tile, void* workspace, cudaStream_t stream) {
  if (a.head_dim == 128)
    choose_tile<T, 128>(a, key_tile, workspace, stream);
  else
    choose_tile<T, 64>(a, key_tile, workspace, stream);
}

}  // namespace

bool attend_sm90_supports(const AttendArguments& a) {
  const int steps = a.head_dim == 128 ? kRotatedSteps<128> : kRotatedSteps<64>;
  return DType(a.dtype) != DType::kFloat32 && (a.head_dim == 64 || a.head_dim == 128) &&
         a.pairs <= 8 * steps && a.tokens >= kMinTokens && a.entries > 0;
}

size_t attend_sm90_workspace(const AttendArguments& a, int key_tile) {
  const Schedule schedule = largest_schedule(a, key_tile_of(a, key_tile));
  return partial_bytes(a, schedule) + arrived_bytes(a, schedule);
}

void attend_sm90(const AttendArguments& a, int key_tile, void* workspace, void* stream) {
  if (a.batch * a.length == 0) return;
  if (DType(a.dtype) == DType::kFloat16)
    choose_head_dim<__half>(a, key_tile, workspace, static_cast<cudaStream_t>(stream));
  else
    choose_head_dim<__nv_bfloat16>(a, key_tile, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace longlive
