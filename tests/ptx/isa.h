// The instructions of PTX that nvcc uses for the kernels of this project, up to sm_80, as functions of C++;
// written from the PTX ISA (9.0) alone, as a second witness beside csrc/emulator and the host parts of
// csrc/cuda/ptx. The translation (translate.py) calls the function of an instruction's name with registers,
// which hold bits, by reference. Fibers, barriers and queues of late copies are the emulator's.
//
// Where the ISA leaves room, the executor takes what is worst for the program: approximations are off by all
// they may be, tensor cores truncate, undefined registers are NaN, copies land at the last moment. Misaligned
// and out-of-bounds accesses are faults.
#pragma once
#include "isa_arithmetic.h"
#include "launch.h"

namespace ptx {

inline unsigned tid_x() { return threadIdx.x; }
inline unsigned ntid_x() { return blockDim.x; }
inline unsigned ctaid_x() { return blockIdx.x; }
inline unsigned ctaid_y() { return blockIdx.y; }
inline unsigned ctaid_z() { return blockIdx.z; }
inline unsigned nctaid_x() { return gridDim.x; }
inline unsigned lane() { return simt::block->current % 32; }

// ---- Memory ----

enum Space { global, shared, param };
using U8 = uint8_t;
using U16 = uint16_t;
using U32 = uint32_t;
using S32 = int32_t;
using F32 = uint32_t;  // registers hold bits
using U64 = uint64_t;
using F64 = uint64_t;

// Where in the emulator's memory `size` bytes of an address lie.
template <Space kSpace>
unsigned char* locate(uint64_t address, size_t size) {
  if (address % size != 0) fault("misaligned access of " + std::to_string(size) + " bytes");
  if constexpr (kSpace == shared) {
    if (address < kSharedBase || address + size > kSharedBase + shared_bytes)
      fault("address " + std::to_string(address) + " is outside of the block's shared memory");
    return simt::block->shared + (address - kSharedBase);
  }
  if constexpr (kSpace == param) {
    if (!in_parameters(address, size)) fault("an address is outside of the kernel's parameters");
  }
  if (address < 4096) fault("access through a null pointer");
  return reinterpret_cast<unsigned char*>(address);
}

// A vector is accessed as one word, aligned to its whole size.
template <Space kSpace, class T, class... Registers>
void ld(uint64_t address, Registers&... d) {
  const unsigned char* from = locate<kSpace>(address, sizeof(T) * sizeof...(d));
  const auto next = [&](auto& r) {
    T value;
    std::memcpy(&value, from, sizeof value);
    from += sizeof value;
    r = static_cast<std::remove_reference_t<decltype(r)>>(value);
  };
  (next(d), ...);
}
template <Space kSpace, class T, class... Values>
void st(uint64_t address, Values... a) {
  unsigned char* to = locate<kSpace>(address, sizeof(T) * sizeof...(a));
  const auto next = [&](auto r) {
    const T value = static_cast<T>(r);
    std::memcpy(to, &value, sizeof value);
    to += sizeof value;
  };
  (next(a), ...);
}

inline void cvta_to_global_u64(uint64_t& d, uint64_t a) { d = a; }
inline void cvta_param_u64(uint64_t& d, uint64_t a) {
  if (!in_parameters(a, 1)) fault("cvta.param of an address outside of the parameters");
  d = a;
}
inline void atom_global_add_u32(uint32_t& d, uint64_t address, uint32_t b) {
  unsigned char* at = locate<global>(address, 4);
  std::memcpy(&d, at, 4);
  const uint32_t sum = d + b;
  std::memcpy(at, &sum, 4);
}
// Threads run one at a time and see each other's stores at once.
inline void membar_gl() {}

// ---- What the threads of a warp do together ----

// Everything here is called with all lanes: anything else would need the lanes left out to be known.
inline void require_all_lanes(uint32_t mask) {
  if (mask != ~0u) fault("a warp instruction with a mask that leaves lanes out is not modelled");
}

// .aligned: all threads of the warp execute the same instruction.
template <unsigned kThreads, class Operands, class Operation>
void aligned(const char* name, Operands& mine, Operation operation) {
  mine.line = line;
  simt::collective<kThreads>(name, mine, [&](Operands* const* all) {
    for (unsigned i = 1; i < kThreads; ++i)
      if (all[i]->line != all[0]->line)
        fault(std::string(name) + " meets the one of line " + std::to_string(all[i]->line));
    operation(all);
  });
}
struct Nothing {
  unsigned line;
};
inline void converge(const char* name) {
  Nothing mine;
  aligned<32>(name, mine, [](Nothing* const*) {});
}

struct Shuffle {
  uint32_t a, d;
  unsigned from;
};
template <class Source>
void shuffle(const char* name, uint32_t& d, bool& p, uint32_t a, uint32_t c, uint32_t mask, Source source) {
  require_all_lanes(mask);
  const int segment = c >> 8 & 31, clamp = c & 31, me = static_cast<int>(lane());
  const int last = (me & segment) | (clamp & ~segment), first = me & segment;
  int from = 0;
  p = source(me, first, last, segment, from);
  Shuffle mine{a, 0, static_cast<unsigned>(p ? from : me)};
  simt::collective<32>(name, mine, [](Shuffle* const* all) {
    for (int i = 0; i < 32; ++i) all[i]->d = all[all[i]->from % 32]->a;
  });
  d = mine.d;
}
inline void shfl_sync_bfly_b32(uint32_t& d, bool& p, uint32_t a, uint32_t b, uint32_t c, uint32_t mask) {
  shuffle("shfl.sync.bfly", d, p, a, c, mask, [b](int me, int, int last, int, int& from) {
    from = me ^ static_cast<int>(b & 31);
    return from <= last;
  });
}
inline void shfl_sync_up_b32(uint32_t& d, bool& p, uint32_t a, uint32_t b, uint32_t c, uint32_t mask) {
  shuffle("shfl.sync.up", d, p, a, c, mask, [b](int me, int, int last, int, int& from) {
    from = me - static_cast<int>(b & 31);
    return from >= last;
  });
}
inline void shfl_sync_down_b32(uint32_t& d, bool& p, uint32_t a, uint32_t b, uint32_t c, uint32_t mask) {
  shuffle("shfl.sync.down", d, p, a, c, mask, [b](int me, int, int last, int, int& from) {
    from = me + static_cast<int>(b & 31);
    return from <= last;
  });
}
inline void shfl_sync_idx_b32(uint32_t& d, bool& p, uint32_t a, uint32_t b, uint32_t c, uint32_t mask) {
  shuffle("shfl.sync.idx", d, p, a, c, mask, [b](int, int first, int last, int segment, int& from) {
    from = first | (static_cast<int>(b & 31) & ~segment);
    return from <= last;
  });
}
inline void vote_sync_ballot_b32(uint32_t& d, bool a, uint32_t mask) {
  require_all_lanes(mask);
  uint32_t mine = a;
  simt::collective<32>("vote.sync.ballot", mine, [](uint32_t* const* all) {
    uint32_t ballot = 0;
    for (int i = 0; i < 32; ++i) ballot |= (*all[i] & 1) << i;
    for (int i = 0; i < 32; ++i) *all[i] = ballot;
  });
  d = mine;
}
inline void bar_warp_sync(uint32_t mask) {
  require_all_lanes(mask);
  int nothing = 0;
  simt::collective<32>("bar.warp.sync", nothing, [](int* const*) {});
}

// ---- Barriers of the block: they count warps, so the whole warp has to come (.aligned) ----

inline void check_barrier(uint32_t id, uint32_t threads) {
  if (id > 15) fault("there are 16 barriers, 0 to 15");
  if (threads == 0 || threads % 32 != 0) fault("a barrier's number of threads is no multiple of the warp");
  // All who take part in one phase of a barrier have to name the same number.
  uint32_t& count = barrier_threads[id];
  if (simt::block->barriers[id].arrived != 0 && count != threads) fault("a barrier with two thread counts");
  count = threads;
}
inline void barrier_cta_sync_aligned(uint32_t id, uint32_t threads) {
  converge("barrier.cta.sync");
  check_barrier(id, threads);
  simt::barrier_sync(id, threads, "barrier.cta.sync");
}
inline void barrier_cta_arrive_aligned(uint32_t id, uint32_t threads) {
  converge("barrier.cta.arrive");
  check_barrier(id, threads);
  simt::barrier_arrive(id, threads);
}
inline void bar_sync(uint32_t id, uint32_t threads) { barrier_cta_sync_aligned(id, threads); }
inline void bar_sync(uint32_t id) { barrier_cta_sync_aligned(id, blockDim.x * blockDim.y * blockDim.z); }

// ---- cp.async ----

// Copies `source_bytes` of 16 and writes zeros over the rest. What the source holds now or later is copied:
// it lands when the thread waits for its group.
inline void cp_async_cg_shared_global_L2_128B(uint32_t to, uint64_t from, uint32_t bytes,
                                              uint32_t source_bytes) {
  if (bytes != 16) fault("cp.async.cg copies 16 bytes");
  if (source_bytes > bytes) fault("cp.async: more source bytes than bytes");
  unsigned char* target = locate<shared>(to, 16);
  if (from % 16 != 0) fault("cp.async from a misaligned address");
  std::memset(target, simt::kPoison, 16);
  simt::current_thread().copies.post([=] {
    if (source_bytes > 0) std::memcpy(target, reinterpret_cast<const void*>(from), source_bytes);
    std::memset(target + source_bytes, 0, 16 - source_bytes);
  });
}
inline void cp_async_commit_group() { simt::current_thread().copies.commit(); }
inline void cp_async_wait_group(unsigned pending) { simt::current_thread().copies.wait(pending); }

// ---- Matrices of a warp ----

template <size_t kCount>
using Registers = std::array<uint32_t*, kCount>;
template <class R, class... Others>
std::array<R*, 1 + sizeof...(Others)> registers(R& r, Others&... others) {
  return {&r, &others...};
}

// Threads 8 i to 8 i + 7 hold the addresses of the rows of matrix i. Thread t receives of each matrix
// elements t % 4 * 2 and the next of row t / 4; .trans: of the transposed matrix.
inline void ldmatrix_x4(const Registers<4>& d, uint32_t address, bool transposed) {
  struct Operands {
    unsigned line;
    const unsigned char* row;
    uint32_t d[4];
  } mine{0, locate<shared>(address, 16), {}};
  aligned<32>(transposed ? "ldmatrix.trans" : "ldmatrix", mine, [transposed](Operands* const* all) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      for (int row = 0; row < 8; ++row) std::memcpy(element[row], all[8 * matrix + row]->row, 16);
      for (int thread = 0; thread < 32; ++thread) {
        const int row = thread / 4, column = thread % 4 * 2;
        const uint32_t low = transposed ? element[column][row] : element[row][column];
        const uint32_t high = transposed ? element[column + 1][row] : element[row][column + 1];
        all[thread]->d[matrix] = low | high << 16;
      }
    }
  });
  for (int i = 0; i < 4; ++i) *d[i] = mine.d[i];
}
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(const Registers<4>& d, uint32_t address) {
  ldmatrix_x4(d, address, false);
}
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(const Registers<4>& d, uint32_t address) {
  ldmatrix_x4(d, address, true);
}

// The sum of a matrix product's terms, exact and then truncated: the ISA asks for single precision and leaves
// order and rounding open.
inline float truncate_to_float(double x) {
  const auto nearest = static_cast<float>(x);
  return std::fabs(nearest) > std::fabs(x) && !std::isinf(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// d [16, 8] = a [16, 16] b [16, 8] + c. The tables of the ISA ("Matrix fragments for mma.m16n8k16"), with
// group = lane / 4 and member = lane % 4: of A, element i is in row group (i < 2 or 4 <= i < 6) or group + 8
// and column member * 2 + (i & 1), 8 more from i = 4 on; of B, row member * 2 + (i & 1), 8 more from i = 2
// on, and column group; of C and D, row group (i < 2) or group + 8, column member * 2 + (i & 1).
template <class T>
void mma_sync_m16n8k16(const Registers<4>& d, const Registers<4>& a, const Registers<2>& b,
                       const Registers<4>& c) {
  struct Operands {
    unsigned line;
    uint32_t a[4], b[2], c[4], d[4];
  } mine{0, {*a[0], *a[1], *a[2], *a[3]}, {*b[0], *b[1]}, {*c[0], *c[1], *c[2], *c[3]}, {}};
  aligned<32>("mma.sync", mine, [](Operands* const* all) {
    const auto half = [](const uint32_t* r, int i) {
      return T::widen(static_cast<uint16_t>(r[i / 2] >> (i % 2 * 16)));
    };
    double A[16][16], B[16][8];
    for (int thread = 0; thread < 32; ++thread) {
      const int group = thread / 4, member = thread % 4;
      for (int i = 0; i < 8; ++i) {
        const bool upper = i < 2 || (4 <= i && i < 6);
        A[upper ? group : group + 8][member * 2 + (i & 1) + (i < 4 ? 0 : 8)] = half(all[thread]->a, i);
      }
      for (int i = 0; i < 4; ++i) B[member * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = half(all[thread]->b, i);
    }
    for (int thread = 0; thread < 32; ++thread)
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? thread / 4 : thread / 4 + 8, column = thread % 4 * 2 + (i & 1);
        double sum = see<float>(all[thread]->c[i]);
        for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
        all[thread]->d[i] = bits(truncate_to_float(sum));
      }
  });
  for (int i = 0; i < 4; ++i) *d[i] = mine.d[i];
}

}  // namespace ptx
