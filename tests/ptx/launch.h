// A launch of a translated kernel: what the launchers of csrc/cuda, compiled over host/, hand over, and the
// state of the executor. One translation unit holds one kernel; the state is shared by all.
#pragma once
#include <array>
#include <bit>
#include <cmath>
#include <set>
#include <string>

#include "emulator/simt.h"

namespace ptx {

struct Argument {
  const void* data;
  size_t size, alignment;
};
struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes;
  std::vector<Argument> arguments;
};
struct ParameterSize {
  size_t size, alignment;
};

// The window of shared memory does not begin at zero, so that a null pointer is no address in it.
constexpr uint32_t kSharedBase = 1024;

inline unsigned line = 0;        // of the PTX, of the last instruction that may fault
inline size_t shared_bytes = 0;  // of the launch under way
inline uint64_t parameters_begin = 0, parameters_end = 0;
inline uint32_t barrier_threads[16];
inline std::set<std::string> executed;

[[noreturn]] inline void fault(const std::string& what) {
  throw std::logic_error("PTX line " + std::to_string(line) + ": " + what);
}
// Before every instruction that may fault, wait or branch. A kernel that goes round in circles is stopped.
inline uint64_t steps = 0;
inline void at(unsigned of_ptx) {
  constexpr uint64_t kMost = 200'000'000;
  line = of_ptx;
  if (++steps > kMost) fault("the kernel does not come to an end");
}
inline bool in_parameters(uint64_t address, size_t size) {
  return address >= parameters_begin && address + size <= parameters_end;
}

// Runs `body` with the addresses of its parameters, of which there is one copy for all threads.
inline void run(const char* name, const Launch& launch, const std::vector<ParameterSize>& expected,
                unsigned max_threads, void (*body)(const uint64_t*)) {
  line = 0, steps = 0;
  if (launch.threads > max_threads) fault(std::string(name) + ": more threads than .maxntid");
  if (launch.arguments.size() != expected.size()) fault(std::string(name) + ": wrong number of arguments");
  constexpr size_t kAlignment = 128;
  size_t total = 0;
  std::vector<uint64_t> addresses;
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto [size, alignment] = expected[i];
    if (launch.arguments[i].size != size || launch.arguments[i].alignment != alignment)
      fault(std::string(name) + ": argument " + std::to_string(i) + " has " +
            std::to_string(launch.arguments[i].size) + " bytes, the PTX " + std::to_string(size));
    total = (total + alignment - 1) / alignment * alignment;
    addresses.push_back(total);
    total += size;
  }
  std::vector<unsigned char> memory(total + kAlignment);
  parameters_begin = (reinterpret_cast<uint64_t>(memory.data()) + kAlignment - 1) / kAlignment * kAlignment;
  parameters_end = parameters_begin + total;
  for (size_t i = 0; i < expected.size(); ++i) {
    addresses[i] += parameters_begin;
    std::memcpy(reinterpret_cast<void*>(addresses[i]), launch.arguments[i].data, expected[i].size);
  }
  shared_bytes = launch.shared_bytes;
  executed.insert(name);
  simt::launch(launch.grid, dim3(launch.threads), launch.shared_bytes, [&] { body(addresses.data()); });
}

}  // namespace ptx
