// In place of csrc/emulator/hopper.h where the launchers are compiled for translated PTX: tensor maps of the
// size that CUDA's have, and the names that the C++ bodies use, which are never run.
#pragma once
#include "emulator/cuda_names.h"
#include "tensor_map.h"

namespace simt {

using TensorMap = ptx::TensorMap;
using ptx::encode_tensor_map;

[[noreturn]] inline void not_run() { throw std::logic_error("a C++ body ran in place of its PTX"); }
inline uint32_t shared_address(const void*) { not_run(); }
inline void mbarrier_init(uint64_t*, unsigned) { not_run(); }
inline void mbarrier_arrive(uint64_t*, uint32_t) { not_run(); }
inline void mbarrier_wait(uint64_t*, unsigned) { not_run(); }
inline void tma_load(void*, const TensorMap&, uint64_t*, const int (&)[5]) { not_run(); }
inline void wgmma_fence() { not_run(); }
inline void wgmma_wait(size_t) { not_run(); }
template <class T>
void wgmma(float*, int, const uint32_t*, uint64_t, uint64_t, bool, bool) {
  not_run();
}

}  // namespace simt
