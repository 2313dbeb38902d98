// The tensor maps of the executor: what cuTensorMapEncodeTiled (cuda.h) takes, kept as it came in the 128
// bytes that CUDA's opaque object has. A kernel only passes its address.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace ptx {

struct alignas(128) TensorMap {
  static constexpr uint32_t kMagic = 0x54'4d'41'70;

  uint32_t magic;
  uint32_t element;  // bytes
  const unsigned char* base;
  uint64_t size[5];    // in elements
  uint64_t stride[4];  // in bytes, of the dimensions after the first
  uint32_t box[5];
};
static_assert(sizeof(TensorMap) == 128);

// Of rank 5, not interleaved, with a 128-byte swizzle and zeros outside. Refuses what cuda.h says is refused.
inline TensorMap encode_tensor_map(const void* base, uint64_t element, const uint64_t (&size)[5],
                                   const uint64_t (&stride)[4], const uint32_t (&box)[5]) {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("tensor map: ") + what);
  };
  TensorMap map{
      TensorMap::kMagic, static_cast<uint32_t>(element), static_cast<const unsigned char*>(base), {}, {}, {}};
  require(reinterpret_cast<uintptr_t>(base) % 16 == 0, "globalAddress must be aligned to 16 bytes");
  for (int d = 0; d < 5; ++d) {
    require(size[d] >= 1 && size[d] <= 1ull << 32, "globalDim must be 1 to 2^32");
    require(box[d] >= 1 && box[d] <= 256, "boxDim must be 1 to 256");
    map.size[d] = size[d], map.box[d] = box[d];
  }
  for (int d = 0; d < 4; ++d) {
    require(stride[d] % 16 == 0 && stride[d] < 1ull << 40,
            "globalStrides must be multiples of 16 below 2^40");
    map.stride[d] = stride[d];
  }
  require(box[0] * element % 16 == 0, "boxDim[0] must be a multiple of 16 bytes");
  require(box[0] * element <= 128, "boxDim[0] must fit the swizzle of 128 bytes");
  require(stride[0] >= size[0] * element, "rows overlap");
  return map;
}

}  // namespace ptx
