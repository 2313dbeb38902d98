#include "cuda/pack.cuh"

#include <algorithm>

namespace longlive {
namespace {

struct Pack {
  template <class T, int kBits>
  static constexpr auto kernel = &pack_kernel<T, kBits>;
};
struct Unpack {
  template <class T, int kBits>
  static constexpr auto kernel = &unpack_kernel<T, kBits>;
};

// One launch for up to kPackMaxLayers layers.
template <class Operation, class T, int kBits>
void launch_layers(const char* name, const PackArguments& a, cudaStream_t stream) {
  PackFrame frame = pack_frame<kBits>(a);
  const unsigned groups = kPackThreads / (a.head_dim / Vector<T>::kSize);
  const unsigned blocks = (static_cast<unsigned>(a.heads) * frame.tiles + groups - 1) / groups;
  for (int first = 0; first < a.layers; first += kPackMaxLayers) {
    const int layers = std::min(kPackMaxLayers, a.layers - first);
    PackPools pools{};
    std::copy_n(a.k_pages + first, layers, pools.k);
    std::copy_n(a.v_pages + first, layers, pools.v);
    launch(name, Operation::template kernel<T, kBits>, dim3(blocks, 2, layers), kPackThreads, 0, stream,
           pools, frame);
    frame.packed += layers * frame.layer_bytes;
  }
}

template <class Operation>
void launch_operation(const char* name, const PackArguments& a, void* stream) {
  if (a.heads == 0 || a.tokens == 0) return;
  dispatch(DType(a.dtype), [&](auto element) {
    using T = decltype(element);
    const auto launch_bits = a.bits == 8 ? launch_layers<Operation, T, 8> : launch_layers<Operation, T, 4>;
    launch_bits(name, a, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace

void pack(const PackArguments& arguments, void* stream) { launch_operation<Pack>("pack", arguments, stream); }

void unpack(const PackArguments& arguments, void* stream) {
  launch_operation<Unpack>("unpack", arguments, stream);
}

}  // namespace longlive
