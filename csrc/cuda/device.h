// Facts about the machine.
#pragma once

namespace longlive {

// Newest CUDA version the driver supports, such as 13000; 0 without a driver.
int cuda_driver_version();

// Streaming multiprocessors of the current device.
int multiprocessors();

}  // namespace longlive
