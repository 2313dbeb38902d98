// The extension module longlive_rag._C: addresses, sizes and a stream in, nothing out. Lifetime, devices,
// dtypes and layouts are checked by longlive_rag.ops, which is its only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "cuda/attend.h"
#include "cuda/attend_sm90.h"
#include "cuda/device.h"
#include "cuda/insert.h"
#include "cuda/retrieve.h"

namespace py = pybind11;

namespace longlive {
namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// data, strides over batch, frame and token, weight, whether the weight is float32
using Rows = std::tuple<Address, int64_t, int64_t, int64_t, Address, bool>;

InsertTensor insert_tensor(const Rows& rows) {
  const auto& [data, batch, frame, token, weight, float_weight] = rows;
  return {pointer(data), batch, frame, token, pointer(weight), float_weight};
}

void bind_insert(const Rows& k, const Rows& v, const Rows& q, Address k_pages, Address v_pages, Address q_out,
                 Address rotation, Address slots, std::tuple<int, int, int, int, int> shape, int pairs,
                 int dtype, float eps, Address stream) {
  const auto& [batch, frames, tokens, heads, head_dim] = shape;
  insert({insert_tensor(k), insert_tensor(v), insert_tensor(q), pointer(k_pages), pointer(v_pages),
          pointer(q_out), pointer<const float>(rotation), pointer<const int32_t>(slots), batch, frames,
          tokens, heads, head_dim, pairs, dtype, eps},
         pointer(stream));
}

// batch, length, heads, head_dim of the queries; tokens of a page, entries of a table, temporal pairs
using AttendShape = std::tuple<int, int, int, int, int, int, int>;

AttendArguments attend_sizes(const AttendShape& shape, int dtype) {
  const auto& [batch, length, heads, head_dim, tokens, entries, pairs] = shape;
  AttendArguments a{};
  a.batch = batch, a.length = length, a.heads = heads, a.head_dim = head_dim;
  a.tokens = tokens, a.entries = entries, a.pairs = pairs;
  a.dtype = dtype;
  return a;
}

void bind_attend(Address q, Address k_pages, Address v_pages, Address slots, Address positions,
                 Address query_position, Address frequencies, Address out, Address lse,
                 std::tuple<int, int, int, int> shape, int tokens, int entries, int pairs, int dtype,
                 float scale, Address stream) {
  const auto& [batch, length, heads, head_dim] = shape;
  attend({pointer(q), pointer(k_pages), pointer(v_pages), pointer<const int32_t>(slots),
          pointer<const int32_t>(positions), pointer<const int32_t>(query_position),
          pointer<const double>(frequencies), pointer(out), pointer<float>(lse), batch, length, heads,
          head_dim, tokens, entries, pairs, dtype, scale},
         pointer(stream));
}

#ifdef LONGLIVE_RAG_SM90

// Bytes of workspace, or None where the kernel does not take these sizes.
std::optional<size_t> bind_attend_sm90_workspace(const AttendShape& shape, int dtype, int key_tile) {
  const AttendArguments a = attend_sizes(shape, dtype);
  if (!attend_sm90_supports(a)) return std::nullopt;
  return attend_sm90_workspace(a, {0, key_tile});
}

void bind_attend_sm90(Address q, Address k_pages, Address v_pages, Address slots, Address positions,
                      Address query_position, Address frequencies, Address out, Address lse,
                      Address workspace, const AttendShape& shape, int page_slots, int dtype, float scale,
                      int key_tile, Address stream) {
  AttendArguments a = attend_sizes(shape, dtype);
  a.q = pointer(q), a.k_pages = pointer(k_pages), a.v_pages = pointer(v_pages);
  a.slots = pointer<const int32_t>(slots), a.positions = pointer<const int32_t>(positions);
  a.query_position = pointer<const int32_t>(query_position),
  a.frequencies = pointer<const double>(frequencies);
  a.out = pointer(out), a.lse = pointer<float>(lse);
  a.scale = scale;
  attend_sm90(a, {page_slots, key_tile}, pointer(workspace), pointer(stream));
}

#endif

void bind_retrieve(Address query, Address keys, Address inverse_norms, Address first, Address last,
                   Address frame_slots, Address indices, Address similarity, Address slots,
                   Address finished_blocks, Address lists,
                   std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int, int> strides,
                   std::tuple<int, int, int> shape, int k, int dtype, Address stream) {
  const auto& [keys_batch, keys_row, norms_batch, frame_slots_batch, slots_batch, first_step, last_step] =
      strides;
  const auto& [batch, count, width] = shape;
  retrieve({pointer(query),
            pointer(keys),
            pointer<const float>(inverse_norms),
            pointer<const int32_t>(first),
            pointer<const int32_t>(last),
            pointer<const int32_t>(frame_slots),
            pointer<int32_t>(indices),
            pointer<float>(similarity),
            pointer<int32_t>(slots),
            pointer<unsigned>(finished_blocks),
            pointer(lists),
            keys_batch,
            keys_row,
            norms_batch,
            frame_slots_batch,
            slots_batch,
            first_step,
            last_step,
            batch,
            count,
            width,
            k,
            dtype},
           pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
#ifdef LONGLIVE_RAG_CUDA_VERSION
  module.def("cuda_driver_version", &cuda_driver_version);
  module.attr("cuda_version") = LONGLIVE_RAG_CUDA_VERSION;
  module.attr("cuda_architectures") = LONGLIVE_RAG_CUDA_ARCHITECTURES;
  module.def("insert", &bind_insert);
  module.def("retrieve", &bind_retrieve);
  module.def("retrieve_list_bytes", &retrieve_list_bytes);
  module.def("attend", &bind_attend);
#ifdef LONGLIVE_RAG_SM90
  module.def("attend_sm90", &bind_attend_sm90);
  module.def("attend_sm90_workspace", &bind_attend_sm90_workspace);
#endif
#else
  module.attr("cuda_version") = py::none();
#endif
}

}  // namespace longlive
