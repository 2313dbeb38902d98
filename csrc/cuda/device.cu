#include "cuda/device.h"

#include "core/platform.cuh"

namespace longlive {

int cuda_driver_version() {
  int version = 0;
#ifdef __CUDACC__
  if (cudaDriverGetVersion(&version) != cudaSuccess) return 0;
#endif
  return version;
}

#ifdef __CUDACC__
static int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
size_t shared_memory_per_multiprocessor() { return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }
#else
// Few multiprocessors, so that small tests spread over blocks unevenly, and shared memory as the test wants
// it.
int multiprocessors() { return 4; }
size_t shared_memory_per_multiprocessor() {
  const char* kilobytes = std::getenv("SIMT_SHARED_KB");
  return (kilobytes ? std::atoi(kilobytes) : 164) * size_t(1024);
}
#endif

}  // namespace longlive
