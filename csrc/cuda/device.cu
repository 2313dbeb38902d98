#include "cuda/device.h"

#include "cuda/platform.cuh"

namespace longlive {

int cuda_driver_version() {
  int version = 0;
#ifdef __CUDACC__
  if (cudaDriverGetVersion(&version) != cudaSuccess) return 0;
#endif
  return version;
}

int multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
#else
  return 4;  // few, so that small tests still spread over blocks unevenly
#endif
}

}  // namespace longlive
