// The extension module longlive_rag._C: addresses, sizes and a stream in, nothing out. Lifetime, devices,
// dtypes and layouts are checked by longlive_rag.ops, which is its only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "cuda/attend.h"
#include "cuda/device.h"
#include "cuda/insert.h"

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

void bind_attend(Address q, Address k_pages, Address v_pages, Address slots, Address positions,
                 Address query_position, Address rotation, Address out, Address lse,
                 std::tuple<int, int, int, int> shape, int tokens, int entries, int pairs, int dtype,
                 float scale, Address stream) {
  const auto& [batch, length, heads, head_dim] = shape;
  attend({pointer(q), pointer(k_pages), pointer(v_pages), pointer<const int32_t>(slots),
          pointer<const int32_t>(positions), pointer<const int32_t>(query_position),
          pointer<const double>(rotation), pointer(out), pointer<float>(lse), batch, length, heads, head_dim,
          tokens, entries, pairs, dtype, scale},
         pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
#ifdef LONGLIVE_RAG_CUDA_VERSION
  module.def("cuda_driver_version", &cuda_driver_version);
  module.attr("cuda_version") = LONGLIVE_RAG_CUDA_VERSION;
  module.attr("cuda_architectures") = LONGLIVE_RAG_CUDA_ARCHITECTURES;
  module.def("insert", &bind_insert);
  module.def("attend", &bind_attend);
#else
  module.attr("cuda_version") = py::none();
#endif
}

}  // namespace longlive
