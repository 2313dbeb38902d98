// The extension module longlive_rag._C: addresses, sizes and a stream in, nothing out. Lifetime, devices,
// dtypes and layouts are checked by longlive_rag.ops, which is its only caller.
//
// Every operation is called alike: addresses (0 for null), sizes and strides, the dtype (DType), numbers, and
// last the device and the stream to queue on. Those that need a workspace tell its size when asked with the
// same sizes. attend keeps what it knows by its sizes in an AttendPlan.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#ifdef LONGLIVE_RAG_CUDA_VERSION
#include "cuda/attend.h"
#include "cuda/device.h"
#include "cuda/insert.h"
#include "cuda/pack.h"
#include "cuda/retrieve.h"
#endif

namespace py = pybind11;

namespace longlive {
namespace {

#ifdef LONGLIVE_RAG_CUDA_VERSION

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// data, strides over batch, frame and token, weight, whether the weight is float32
using Rows = std::tuple<Address, int64_t, int64_t, int64_t, Address, bool>;

InsertTensor insert_tensor(const Rows& rows) {
  const auto& [data, batch, frame, token, weight, float_weight] = rows;
  return {.data = pointer(data),
          .batch_stride = batch,
          .frame_stride = frame,
          .token_stride = token,
          .weight = pointer(weight),
          .float_weight = float_weight};
}

void bind_insert(const Rows& k, const Rows& v, const Rows& q, Address k_pages, Address v_pages, Address q_out,
                 Address rotation, Address slots, const std::array<int, 5>& k_shape, int pairs, int dtype,
                 float eps, int device, Address stream) {
  const auto& [batch, frames, tokens, heads, head_dim] = k_shape;
  const DeviceGuard guard(device);
  insert({.k = insert_tensor(k),
          .v = insert_tensor(v),
          .q = insert_tensor(q),
          .k_pages = pointer(k_pages),
          .v_pages = pointer(v_pages),
          .q_out = pointer(q_out),
          .rotation = pointer<const float>(rotation),
          .slots = pointer<const int32_t>(slots),
          .batch = batch,
          .frames = frames,
          .tokens = tokens,
          .heads = heads,
          .head_dim = head_dim,
          .pairs = pairs,
          .dtype = dtype,
          .eps = eps},
         pointer(stream));
}

using PackOperation = void (*)(const PackArguments&, void*);

template <PackOperation kOperation>
void bind_pack(const std::vector<Address>& k_pages, const std::vector<Address>& v_pages, Address packed,
               int64_t slot, const std::array<int, 3>& page_shape, int bits, int dtype, int device,
               Address stream) {
  const auto& [heads, tokens, head_dim] = page_shape;
  std::vector<void*> k(k_pages.size()), v(v_pages.size());
  std::transform(k_pages.begin(), k_pages.end(), k.begin(), pointer<>);
  std::transform(v_pages.begin(), v_pages.end(), v.begin(), pointer<>);
  const DeviceGuard guard(device);
  kOperation({.k_pages = k.data(),
              .v_pages = v.data(),
              .packed = pointer<uint8_t>(packed),
              .slot = slot,
              .layers = static_cast<int>(k.size()),
              .heads = heads,
              .tokens = tokens,
              .head_dim = head_dim,
              .bits = bits,
              .dtype = dtype},
             pointer(stream));
}

size_t bind_retrieve_workspace(int batch, int count, int k, int device) {
  const DeviceGuard guard(device);
  return retrieve_workspace(batch, count, k);
}

void bind_retrieve(Address query, Address keys, Address inverse_norms, Address first, Address last,
                   Address indices, Address similarity, Address workspace,
                   const std::array<int, 3>& keys_shape, const std::array<int64_t, 3>& keys_stride,
                   int64_t norms_stride, int first_stride, int last_stride, int k, int dtype, int device,
                   Address stream) {
  const auto& [batch, count, width] = keys_shape;
  const DeviceGuard guard(device);
  retrieve({.query = pointer(query),
            .keys = pointer(keys),
            .inverse_norms = pointer<const float>(inverse_norms),
            .first = pointer<const int32_t>(first),
            .last = pointer<const int32_t>(last),
            .indices = pointer<int32_t>(indices),
            .similarity = pointer<float>(similarity),
            .keys_batch_stride = keys_stride[0],
            .keys_stride = keys_stride[1],
            .norms_batch_stride = norms_stride,
            .first_stride = first_stride,
            .last_stride = last_stride,
            .batch = batch,
            .count = count,
            .width = width,
            .k = k,
            .dtype = dtype},
           pointer(workspace), pointer(stream));
}

constexpr std::array<const char*, 3> kAttendKernels = {"auto", "sm80", "sm90"};  // AttendKernel

// attend of some sizes on a device: what can be decided without the tensors, so that a call need not.
class AttendPlan {
 public:
  AttendPlan(const std::array<int, 4>& q_shape, const std::array<int, 4>& pages_shape, int entries, int pairs,
             int dtype, const std::string& kernel, int key_tile, int device)
      : device_(device) {
    sizes_.batch = q_shape[0], sizes_.length = q_shape[1];
    sizes_.heads = q_shape[2], sizes_.head_dim = q_shape[3];
    sizes_.page_slots = pages_shape[0], sizes_.tokens = pages_shape[2];
    sizes_.entries = entries;
    sizes_.pairs = pairs;
    sizes_.dtype = dtype;
    const auto wanted = std::find(kAttendKernels.begin(), kAttendKernels.end(), kernel);
    if (wanted == kAttendKernels.end())
      throw std::invalid_argument("kernel must be auto, sm80 or sm90, got " + kernel);
    const DeviceGuard guard(device);
    options_ = {.kernel = static_cast<AttendKernel>(wanted - kAttendKernels.begin()), .key_tile = key_tile};
    options_.kernel = attend_kernel(sizes_, options_);
    workspace_ = attend_workspace(sizes_, options_);
  }

  const char* kernel() const { return kAttendKernels[static_cast<size_t>(options_.kernel)]; }
  size_t workspace() const { return workspace_; }

  void launch(Address q, Address k_pages, Address v_pages, Address slots, Address positions,
              Address query_position, Address frequencies, Address out, Address lse, Address workspace,
              float scale, Address stream) const {
    const DeviceGuard guard(device_);
    AttendArguments a = sizes_;
    a.q = pointer(q);
    a.k_pages = pointer(k_pages);
    a.v_pages = pointer(v_pages);
    a.slots = pointer<const int32_t>(slots);
    a.positions = pointer<const int32_t>(positions);
    a.query_position = pointer<const int32_t>(query_position);
    a.frequencies = pointer<const double>(frequencies);
    a.out = pointer(out);
    a.lse = pointer<float>(lse);
    a.scale = scale;
    attend(a, options_, pointer(workspace), pointer(stream));
  }

 private:
  AttendArguments sizes_{};
  AttendOptions options_;
  size_t workspace_ = 0;
  int device_;
};

#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
#ifdef LONGLIVE_RAG_CUDA_VERSION
  module.def("cuda_driver_version", &cuda_driver_version);
  module.attr("cuda_version") = LONGLIVE_RAG_CUDA_VERSION;
  module.attr("cuda_architectures") = LONGLIVE_RAG_CUDA_ARCHITECTURES;
  module.def("insert", &bind_insert);
  module.def("pack", &bind_pack<pack>);
  module.def("unpack", &bind_pack<unpack>);
  module.def("retrieve", &bind_retrieve);
  module.def("retrieve_workspace", &bind_retrieve_workspace);
  py::class_<AttendPlan>(module, "AttendPlan", py::module_local())
      .def(py::init<const std::array<int, 4>&, const std::array<int, 4>&, int, int, int, const std::string&,
                    int, int>())
      .def_property_readonly("kernel", &AttendPlan::kernel)
      .def_property_readonly("workspace", &AttendPlan::workspace)
      .def("launch", &AttendPlan::launch);
#else
  module.attr("cuda_version") = py::none();
#endif
}

}  // namespace longlive
