// Facts about the machine, and what every launcher needs of it.
#pragma once
#include <cstddef>

namespace longlive {

// Newest CUDA version the driver supports, such as 13000; 0 without a driver. CUDA is not initialised: the
// process may still fork, or set CUDA_VISIBLE_DEVICES.
int cuda_driver_version();

// Makes a device CUDA's current one, and sets the former back at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

// Of the current device: 90 for compute capability 9.0.
int compute_capability();

// Streaming multiprocessors of the current device.
int multiprocessors();

// Bytes of shared memory on each of them.
size_t shared_memory_per_multiprocessor();

// Queues on `stream` that `bytes` of the device's memory become zero.
void clear(void* memory, size_t bytes, void* stream);

}  // namespace longlive
