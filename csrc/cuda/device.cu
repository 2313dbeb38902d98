#include "cuda/device.h"

#include "core/platform.cuh"

#ifdef __CUDACC__
#include <dlfcn.h>
#else
#include <cstdlib>
#include <cstring>
#endif

namespace longlive {

#ifdef __CUDACC__

int cuda_driver_version() {
  // Not cudaDriverGetVersion, which initialises CUDA. The driver stays loaded: CUDA will want it too.
  static const auto get_version = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    return driver ? reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion")) : nullptr;
  }();
  int version = 0;
  return get_version && get_version(&version) == 0 ? version : 0;
}

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&former_), "cudaGetDevice");
  if (former_ == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  changed_ = true;
}
DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(former_);
}

static int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

int compute_capability() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}
int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
size_t shared_memory_per_multiprocessor() { return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }

void clear(void* memory, size_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

#else

static int environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}

int cuda_driver_version() { return 0; }
DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}
// Few multiprocessors, so that small tests spread over blocks unevenly; the rest is as the test wants it.
int compute_capability() { return environment("SIMT_CAPABILITY", 80); }
int multiprocessors() { return 4; }
size_t shared_memory_per_multiprocessor() { return environment("SIMT_SHARED_KB", 164) * size_t(1024); }
void clear(void* memory, size_t bytes, void*) { std::memset(memory, 0, bytes); }

#endif

}  // namespace longlive
