// Facts about the machine.
#pragma once
#include <cstddef>

namespace longlive {

// Newest CUDA version the driver supports, such as 13000; 0 without a driver.
int cuda_driver_version();

// Streaming multiprocessors of the current device.
int multiprocessors();

// Bytes of shared memory on each of them.
size_t shared_memory_per_multiprocessor();

}  // namespace longlive
