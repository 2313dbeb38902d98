// Descriptions of tensors for the tensor memory accelerator, made on the host.
#pragma once
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#include "core/scalar.cuh"
#include "cuda/ptx/tma.cuh"

namespace longlive {

// Rows of `head_dim` elements as attend loads them: in boxes of `rows` rows of one head, all of its elements.
// The row is split in pieces of 64 elements, the 128 bytes that a swizzled box may be wide, and the pieces
// are a dimension of their own outside of the rows; so one box brings each piece's rows one after the other,
// as wgmma reads them. A bank of pages: [slot][head][token][dim]; queries: [sample][row][head][dim].
struct HeadRows {
  const void* data;
  DType dtype;
  int head_dim;
  int64_t rows, heads, outer;                     // how many there are
  int64_t row_stride, head_stride, outer_stride;  // in elements
  int box_rows;
};

#ifdef __CUDACC__

// The driver's encoder, found at run time: the extension is not linked with the driver, so that it can be
// imported without one.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                                cudaEnableDefault, &found);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    check(status, "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("attend: the driver has no cuTensorMapEncodeTiled; it must support CUDA 12.0");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

#endif

inline ptx::TensorMap encode_tensor_map(const HeadRows& t) {
  constexpr uint64_t kElement = 2, kPiece = 64;
  const uint64_t size[5] = {kPiece, static_cast<uint64_t>(t.rows), t.head_dim / kPiece,
                            static_cast<uint64_t>(t.heads), static_cast<uint64_t>(t.outer)};
  const uint64_t stride[4] = {t.row_stride * kElement, kPiece * kElement, t.head_stride * kElement,
                              t.outer_stride * kElement};
  const uint32_t box[5] = {kPiece, static_cast<uint32_t>(t.box_rows),
                           static_cast<uint32_t>(t.head_dim / kPiece), 1, 1};
  ptx::TensorMap map;
#ifdef __CUDACC__
  const uint32_t every[5] = {1, 1, 1, 1, 1};
  const CUresult status = tensor_map_encoder()(
      &map, t.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      5, const_cast<void*>(t.data), size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("attend: cuTensorMapEncodeTiled failed with CUDA driver error " +
                             std::to_string(static_cast<int>(status)));
#else
  map = simt::encode_tensor_map(t.data, kElement, size, stride, box);
#endif
  return map;
}

// The same, remembered: a map depends on its arguments alone, and a bank stays where it is.
inline ptx::TensorMap tensor_map(const HeadRows& t) {
  using Key = std::array<int64_t, 10>;
  static std::map<Key, ptx::TensorMap> known;
  static std::mutex mutex;
  constexpr size_t kMany = 1024;  // queries move about; 160 KB of their maps are enough
  const Key key = {reinterpret_cast<int64_t>(t.data),
                   static_cast<int>(t.dtype),
                   t.head_dim,
                   t.rows,
                   t.heads,
                   t.outer,
                   t.row_stride,
                   t.head_stride,
                   t.outer_stride,
                   t.box_rows};
  const std::lock_guard lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() >= kMany) known.clear();
  return known.emplace(key, encode_tensor_map(t)).first->second;
}

}  // namespace longlive
