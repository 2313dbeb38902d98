// The instructions of PTX for Hopper (sm_90a); see isa.h. From the PTX ISA 9.0: "Parallel synchronization and
// communication instructions: mbarrier", "cp.async.bulk.tensor", "Asynchronous warpgroup level matrix
// multiply-accumulate instructions", "setmaxnreg".
#pragma once
#include <map>

#include "isa.h"
#include "tensor_map.h"

namespace ptx {

// ---- What a block holds besides the emulator's state ----

// The object in shared memory is opaque; it holds a mark, so that whatever overwrites it is noticed.
struct Mbarrier {
  uint32_t expected, pending;
  int64_t bytes = 0;  // tx-count
  uint64_t phase = 0;
  bool is_visible = false;  // to the asynchronous proxy, by fence.mbarrier_init
};
constexpr uint64_t kMark = 0x6d62'6172'7269'6572;

struct BulkCopy {
  uint32_t barrier, bytes;
  std::function<void()> land;
};

// Accumulators of a thread that products are under way on, by the address of their first register.
struct Accumulators {
  std::vector<float> value;
  int products = 0;
};

struct HopperThread {
  bool accessed = true;  // registers of a product, since the last wgmma.fence
  bool timed_out = false;
  unsigned registers = 0;
  std::map<uint32_t*, Accumulators> accumulators;
};

struct HopperBlock {
  std::map<uint32_t, Mbarrier> barriers;
  std::vector<BulkCopy> copies;
  std::vector<HopperThread> threads;
  unsigned free_registers = 0;
};

inline HopperBlock& hopper() {
  if (!simt::block->extension) {
    const auto state = std::make_shared<HopperBlock>();
    const auto count = static_cast<unsigned>(simt::block->threads.size());
    // What ptxas may give each thread of a block of this size, in steps of eight.
    const unsigned registers = std::min(65536 / count / 8 * 8, 255u);
    state->threads.resize(count);
    for (HopperThread& thread : state->threads) thread.registers = registers;
    simt::block->extension = state;
    simt::block->at_end = [state] {
      if (!state->copies.empty()) fault("the block ended with a bulk copy under way");
      for (const HopperThread& thread : state->threads)
        if (!thread.accumulators.empty()) fault("the block ended with a product under way");
    };
  }
  return *static_cast<HopperBlock*>(simt::block->extension.get());
}
inline HopperThread& hopper_thread() { return hopper().threads[simt::block->current]; }

// ---- setmaxnreg: a warpgroup gives registers back to the block, or waits until there are enough ----

inline void set_registers(unsigned count, bool more) {
  if (count < 24 || count > 256 || count % 8 != 0) fault("setmaxnreg takes multiples of 8 from 24 to 256");
  Nothing mine;
  aligned<simt::kWarpgroup>("setmaxnreg", mine, [](Nothing* const*) {});
  unsigned& registers = hopper_thread().registers;
  unsigned& free = hopper().free_registers;
  if (more ? count < registers : count > registers)
    fault("setmaxnreg from " + std::to_string(registers) + " to " + std::to_string(count));
  if (more) {
    const unsigned wanted = count - registers;
    simt::wait_until("setmaxnreg.inc", [&free, wanted] { return free >= wanted; });
    free -= wanted;
  } else {
    free += registers - count;
  }
  registers = count;
}
inline void setmaxnreg_inc_sync_aligned_u32(unsigned count) { set_registers(count, true); }
inline void setmaxnreg_dec_sync_aligned_u32(unsigned count) { set_registers(count, false); }

// ---- mbarrier ----

inline Mbarrier& mbarrier(uint32_t address) {
  uint64_t mark;
  std::memcpy(&mark, locate<shared>(address, 8), 8);
  const auto found = hopper().barriers.find(address);
  if (found == hopper().barriers.end()) fault("an mbarrier is used before it is initialised");
  if (mark != (kMark ^ address)) fault("an mbarrier was overwritten");
  return found->second;
}
inline void mbarrier_init_shared_cta_b64(uint32_t address, uint32_t count) {
  if (count < 1 || count >= 1u << 20) fault("mbarrier.init takes 1 to 2^20 - 1");
  const uint64_t mark = kMark ^ address;
  std::memcpy(locate<shared>(address, 8), &mark, 8);
  hopper().barriers[address] = {count, count};
}
// Makes the initialisations of the calling thread (which all barriers here are initialised by) visible to
// copies.
inline void fence_mbarrier_init_release_cluster() {
  for (auto& [address, barrier] : hopper().barriers) barrier.is_visible = true;
}
// A phase is complete when no arrival and no byte is missing; the next begins at once.
inline bool complete_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return false;
  barrier.pending = barrier.expected;
  ++barrier.phase;
  return true;
}
inline void change_bytes(Mbarrier& barrier, int64_t change) {
  barrier.bytes += change;
  if (std::abs(barrier.bytes) >= 1 << 20) fault("the tx-count of an mbarrier leaves its range");
}
inline void mbarrier_arrive_shared_cta_b64(Sink&, uint32_t address) {
  Mbarrier& barrier = mbarrier(address);
  if (barrier.pending == 0) fault("more arrivals at an mbarrier than it expects");
  --barrier.pending;
  // Those who waited go first: what the thread should have done before it arrived, it does too late.
  if (complete_phase(barrier))
    simt::wait_until("mbarrier.arrive", [polls = 0]() mutable { return ++polls > 2; });
}
inline void mbarrier_arrive_expect_tx_shared_cta_b64(Sink& sink, uint32_t address, uint32_t bytes) {
  change_bytes(mbarrier(address), bytes);
  mbarrier_arrive_shared_cta_b64(sink, address);
}
// True if the phase of this parity is complete: the current one never is; the one before it always.
// Asynchronous copies that report to the barrier land now, when somebody asks. The instruction may give up
// after a while, and does so once before it waits for as long as it takes.
inline void mbarrier_try_wait_parity_shared_cta_b64(bool& complete, uint32_t address, uint32_t parity) {
  mbarrier(address);
  const auto is_complete = [address, parity, state = &hopper()] {
    Mbarrier& barrier = mbarrier(address);
    auto& copies = state->copies;
    for (size_t i = 0; i < copies.size();) {
      if (copies[i].barrier != address) {
        ++i;
        continue;
      }
      const BulkCopy copy = std::move(copies[i]);
      copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
      copy.land();
      change_bytes(mbarrier(address), -int64_t(copy.bytes));
      complete_phase(barrier);
    }
    return (barrier.phase & 1) != parity;
  };
  complete = is_complete();
  bool& timed_out = hopper_thread().timed_out;
  if (complete) {
    timed_out = false;
  } else if (!timed_out) {
    simt::wait_until("mbarrier.try_wait", [polls = 0]() mutable { return ++polls > 1; });
    timed_out = true;
  } else {
    simt::wait_until("mbarrier.try_wait", is_complete);
    complete = true;
    timed_out = false;
  }
}

// ---- Tensor copies ----

struct Box {
  uint64_t map;
  uint32_t corner[5];
};

inline const TensorMap& tensor_map(uint64_t address) {
  if (address % 64 != 0) fault("a tensor map's address is no multiple of 64");
  if (!in_parameters(address, sizeof(TensorMap))) fault("a tensor map that is no kernel parameter");
  const auto& map = *reinterpret_cast<const TensorMap*>(address);
  if (map.magic != TensorMap::kMagic) fault("the address is not that of a tensor map");
  return map;
}
inline void prefetch_tensormap(uint64_t address) { tensor_map(address); }

// The box goes to shared memory element by element, the first dimension the fastest, each 16-byte chunk of a
// 128-byte line in the place that is its number exclusive-or the line's modulo 8 (swizzle 128B). Coordinates
// are signed; outside of the tensor there are zeros. The barrier is told of the whole box.
inline void cp_async_bulk_tensor_5d_shared_cluster_global_mbarrier_complete_tx_bytes(uint32_t to,
                                                                                     const Box& box,
                                                                                     uint32_t barrier) {
  const TensorMap& map = tensor_map(box.map);
  if (!mbarrier(barrier).is_visible) fault("a copy uses an mbarrier without fence.mbarrier_init");
  uint32_t elements = 1;
  for (const uint32_t size : map.box) elements *= size;
  const uint32_t bytes = elements * map.element;
  if (to % 128 != 0) fault("a tensor copy's destination is no multiple of 128");
  if (to < kSharedBase || to + bytes > kSharedBase + shared_bytes) fault("a tensor copy past shared memory");
  std::memset(simt::block->shared + (to - kSharedBase), simt::kPoison, bytes);
  hopper().copies.push_back({barrier, bytes, [&map, box, to, elements] {
                               for (uint32_t i = 0; i < elements; ++i) {
                                 uint32_t rest = i;
                                 const unsigned char* from = map.base;
                                 bool is_inside = true;
                                 for (int d = 0; d < 5; ++d) {
                                   const int64_t at =
                                       int64_t(static_cast<int32_t>(box.corner[d])) + rest % map.box[d];
                                   rest /= map.box[d];
                                   is_inside = is_inside && at >= 0 && at < int64_t(map.size[d]);
                                   from += at * int64_t(d == 0 ? map.element : map.stride[d - 1]);
                                 }
                                 const uint32_t plain = to + i * map.element;
                                 const uint32_t line_of_8 = plain / 128 % 8, chunk = plain / 16 % 8;
                                 const uint32_t swizzled = plain - chunk * 16 + (chunk ^ line_of_8) * 16;
                                 unsigned char* target = simt::block->shared + (swizzled - kSharedBase);
                                 if (is_inside)
                                   std::memcpy(target, from, map.element);
                                 else
                                   std::memset(target, 0, map.element);
                               }
                             }});
}

}  // namespace ptx
