// Hopper's asynchronous machinery for the emulator: transaction barriers, the tensor memory accelerator and
// the warpgroup matrix product. Written from the PTX ISA (9.0, sections "mbarrier", "cp.async.bulk.tensor"
// and "Asynchronous warpgroup level matrix instructions") and the driver's description of tensor maps; what
// these leave open, and what is assumed there, is listed in docs/attend_hopper.md.
//
// The model is strict where hardware would be silent: a copy destroys its destination when it is issued and
// brings the data when somebody waits for it; accumulators hold NaN from the issue of a product to the wait
// for it; operands in shared memory are read as late as that wait.
#pragma once
#include <bit>
#include <map>

#include "emulator/cuda_names.h"

namespace simt {

[[noreturn]] inline void fault(const std::string& what) { throw std::logic_error(what); }

// A bank-conflict-free arrangement of rows of 128 bytes: bits 4-6 of an address are exclusive-ored with bits
// 7-9. TMA writes it and wgmma reads it, so both see the same function of the address.
inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// Addresses in the shared window; the first kilobyte belongs to the system on a real device.
constexpr uint32_t kSharedBase = 1024, kSharedLimit = 228 * 1024;
inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - block->shared;
  if (offset < 0 || offset >= kSharedLimit) fault("an address that should be in shared memory is not");
  return kSharedBase + static_cast<uint32_t>(offset);
}
inline unsigned char* shared_pointer(uint32_t address) {
  if (address < kSharedBase || address >= kSharedLimit) fault("a descriptor points outside of shared memory");
  return block->shared + (address - kSharedBase);
}

struct BulkCopy {
  void* barrier;
  uint32_t bytes;
  std::function<void()> land;
};

// A thread's accumulator registers while products on them are under way.
struct Accumulator {
  std::vector<float> value;
  int under_way = 0;
};

struct Hopper {
  std::vector<BulkCopy> copies;
  std::map<float*, Accumulator> accumulators;
  std::vector<bool> fenced;  // by thread: wgmma.fence since it last waited for products
};

inline Hopper& hopper() {
  if (!block->extension) {
    const auto state = std::make_shared<Hopper>();
    state->fenced.resize(block->threads.size());
    block->extension = state;
    block->at_end = [state] {
      if (!state->copies.empty()) fault("a block ended with a bulk copy under way");
      if (!state->accumulators.empty()) fault("a block ended with a matrix product under way");
    };
  }
  return *static_cast<Hopper*>(block->extension.get());
}

// ---- mbarrier ---------------------------------------------------------------------------------------------

// The object's content is opaque in PTX; this is the state its operations are described with.
struct Mbarrier {
  int64_t bytes : 21;      // transactions expected and not yet completed
  uint64_t pending : 20;   // arrivals missing in this phase
  uint64_t expected : 20;  // arrivals of a phase
  uint64_t phase : 1;      // parity of the phase under way
  uint64_t valid : 2;      // 1; poison and zeros are not a barrier
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

inline Mbarrier& mbarrier(uint64_t* barrier) {
  auto& state = *reinterpret_cast<Mbarrier*>(barrier);
  if (state.valid != 1) fault("an mbarrier is used before it is initialised");
  return state;
}
inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  *reinterpret_cast<Mbarrier*>(barrier) = {0, arrivals, arrivals, 0, 1};
}
inline bool mbarrier_turn(Mbarrier& state) {
  if (state.pending != 0 || state.bytes != 0) return false;
  state.phase ^= 1;
  state.pending = state.expected;
  return true;
}
inline void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes) {
  Mbarrier& state = mbarrier(barrier);
  if (state.pending == 0) fault("more threads arrive at an mbarrier than it was initialised for");
  state.bytes += expected_bytes;
  state.pending -= 1;
  if (!mbarrier_turn(state)) return;
  // Those who waited for the phase run first: what the calling thread should have done before it arrived but
  // does only now, it does too late.
  wait_until("mbarrier.arrive", [polls = 0]() mutable { return ++polls > 2; });
}
// Waits until the phase of this parity is over.
inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  mbarrier(barrier);
  wait_until("mbarrier.try_wait", [barrier, parity, state = &hopper()] {
    auto& copies = state->copies;
    for (size_t i = 0; i < copies.size();) {
      if (copies[i].barrier != barrier) {
        ++i;
        continue;
      }
      copies[i].land();
      mbarrier(barrier).bytes -= copies[i].bytes;
      copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
      mbarrier_turn(mbarrier(barrier));
    }
    return mbarrier(barrier).phase != parity;
  });
}

// ---- TMA --------------------------------------------------------------------------------------------------

struct TensorMap {
  const unsigned char* base;
  uint64_t size[5], stride[5];  // strides in bytes; that of the first dimension is the element's size
  uint32_t box[5];
};

// cuTensorMapEncodeTiled of rank 5 with a 128-byte swizzle; the requirements are those of cuda.h.
inline TensorMap encode_tensor_map(const void* base, uint64_t element, const uint64_t (&size)[5],
                                   const uint64_t (&stride)[4], const uint32_t (&box)[5]) {
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) fault("tensor map: the address is no multiple of 16");
  if (box[0] * element > 128) fault("tensor map: the box is wider than the swizzle");
  TensorMap map{static_cast<const unsigned char*>(base), {}, {element}, {}};
  for (int d = 0; d < 5; ++d) {
    if (size[d] == 0 || size[d] > uint64_t(1) << 32) fault("tensor map: a size is zero or more than 2^32");
    if (box[d] == 0 || box[d] > 256) fault("tensor map: a box is zero or more than 256 elements long");
    if (d > 0 && (stride[d - 1] % 16 != 0 || stride[d - 1] >= uint64_t(1) << 40))
      fault("tensor map: a stride is no multiple of 16 or not less than 2^40");
    map.size[d] = size[d];
    map.box[d] = box[d];
    if (d > 0) map.stride[d] = stride[d - 1];
  }
  return map;
}

// cp.async.bulk.tensor.5d with a 128-byte swizzle. Elements of the box outside of the tensor arrive as zeros,
// and the barrier is told of the whole box either way.
inline void tma_load(void* target, const TensorMap& map, uint64_t* barrier, const int (&corner)[5]) {
  const uint32_t address = shared_address(target);
  if (address % 1024 != 0) fault("a swizzled box starts off the swizzle's 1024-byte pattern");
  uint32_t bytes = static_cast<uint32_t>(map.stride[0]);
  for (const uint32_t size : map.box) bytes *= size;
  shared_pointer(address + bytes - 1);
  std::memset(target, kPoison, bytes);
  const std::vector<int> from(corner, corner + 5);
  hopper().copies.push_back({barrier, bytes, [=] {
                               const auto element = static_cast<uint32_t>(map.stride[0]);
                               for (uint32_t i = 0; i < bytes / element; ++i) {
                                 uint32_t rest = i;
                                 int64_t source = 0;
                                 bool inside = true;
                                 for (int d = 0; d < 5; ++d) {
                                   const int64_t at = from[d] + int64_t(rest % map.box[d]);
                                   rest /= map.box[d];
                                   inside = inside && at >= 0 && at < static_cast<int64_t>(map.size[d]);
                                   source += at * static_cast<int64_t>(map.stride[d]);
                                 }
                                 unsigned char* to = shared_pointer(swizzle_128(address + i * element));
                                 if (inside)
                                   std::memcpy(to, map.base + source, element);
                                 else
                                   std::memset(to, 0, element);
                               }
                             }});
}

// ---- wgmma ------------------------------------------------------------------------------------------------

// A matrix descriptor: start address, leading and stride dimension byte offsets, base offset, swizzling mode.
struct Matrix {
  uint32_t start, leading, stride;

  explicit Matrix(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) fault("wgmma: only the 128-byte swizzle is modelled");
    if ((descriptor >> 49 & 7) != 0) fault("wgmma: only a base offset of zero is modelled");
  }
  // Row r (of M or N) and column k of a K-major matrix of 16-bit elements.
  const void* k_major(uint32_t r, uint32_t k) const {
    return shared_pointer(swizzle_128(start + r % 8 * 128 + r / 8 * stride + k * 2));
  }
  // The same of an MN-major one: 64 rows lie side by side, 8 columns make a pattern.
  const void* mn_major(uint32_t r, uint32_t k) const {
    return shared_pointer(swizzle_128(start + r % 64 * 2 + r / 64 * leading + k % 8 * 128 + k / 8 * stride));
  }
};

template <class T>
float load_as_float(const void* address) {
  uint16_t bits;
  std::memcpy(&bits, address, sizeof bits);
  return half_of<T>(bits, 0);
}

inline void wgmma_fence() { hopper().fenced[block->current] = true; }
inline void wgmma_wait(size_t groups_left) {
  current_thread().products.wait(groups_left);
  hopper().fenced[block->current] = false;
}

struct WgmmaCall {
  const uint32_t* a;  // null: a_matrix describes it
  uint64_t a_matrix, b_matrix;
  std::shared_ptr<std::vector<float>> rows;  // [64][16] of A from registers
};

// d [64, n] = a [64, 16] * b [16, n], plus d if `accumulate`. A is in registers or K-major in shared memory;
// B is K-major, or MN-major if `b_transposed`. With w, g, t = warp, lane / 4, lane % 4, a thread holds of A
// rows 16 w + g and 8 more, columns 2 t, 2 t + 1 and 8 more, as mma.m16n8k16 has it; and of d the same rows,
// columns 8 j + 2 t and the next for j = 0, 1, ..
template <class T>
void wgmma(float* d, int n, const uint32_t* a, uint64_t a_matrix, uint64_t b_matrix, bool accumulate,
           bool b_transposed) {
  if (!hopper().fenced[block->current]) fault("wgmma without wgmma.fence since the last wait");
  WgmmaCall mine{a, a_matrix, b_matrix, nullptr};
  collective<kWarpgroup>("wgmma", mine, [](WgmmaCall* const* calls) {
    const auto rows = std::make_shared<std::vector<float>>(64 * 16);
    for (unsigned thread = 0; thread < kWarpgroup; ++thread) {
      const WgmmaCall& call = *calls[thread];
      if (call.a_matrix != calls[0]->a_matrix || call.b_matrix != calls[0]->b_matrix)
        fault("wgmma: the descriptors differ within a warpgroup");
      if (call.a)
        for (unsigned i = 0; i < 8; ++i) {
          const unsigned row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
          const unsigned column = thread % 4 * 2 + i / 4 * 8 + i % 2;
          (*rows)[row * 16 + column] = half_of<T>(call.a[i / 2], i % 2);
        }
    }
    for (unsigned thread = 0; thread < kWarpgroup; ++thread) calls[thread]->rows = rows;
  });

  Accumulator& accumulator = hopper().accumulators[d];
  if (accumulator.under_way++ == 0) {
    accumulator.value.assign(d, d + n / 2);
    std::memset(d, kPoison, n / 2 * sizeof *d);
  }
  std::vector<uint32_t> issued;
  if (a) issued.assign(a, a + 4);
  current_thread().products.post([=, thread = block->current % kWarpgroup, rows = mine.rows] {
    if (a && !std::equal(issued.begin(), issued.end(), a))
      fault("wgmma: the registers of A were changed while the product was under way");
    const Matrix b(b_matrix), shared_a(a ? b_matrix : a_matrix);
    std::vector<float>& value = hopper().accumulators[d].value;
    for (int j = 0; j < n / 8; ++j)
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8;
        const unsigned column = j * 8 + thread % 4 * 2 + i % 2;
        double sum = accumulate ? value[j * 4 + i] : 0.0f;
        for (unsigned k = 0; k < 16; ++k) {
          const float x = a ? (*rows)[row * 16 + k] : load_as_float<T>(shared_a.k_major(row, k));
          sum += x * load_as_float<T>(b_transposed ? b.mn_major(column, k) : b.k_major(column, k));
        }
        value[j * 4 + i] = static_cast<float>(sum);
      }
    if (--hopper().accumulators[d].under_way > 0) return;
    for (int i = 0; i < n / 2; ++i)
      if (std::bit_cast<uint32_t>(d[i]) != ~0u)
        fault("wgmma: an accumulator was written while the product was under way");
    std::copy(value.begin(), value.end(), d);
    hopper().accumulators.erase(d);
  });
}

}  // namespace simt
