// The matrix product of a warpgroup, asynchronous, with operands in shared memory (sm_90a).
//
// Order of use: fence, products, commit, wait. From a product to the wait for its group its accumulators and
// operand registers must not be touched, and its shared memory must not be written.
#pragma once
#include <type_traits>

#include "cuda/ptx/mbarrier.cuh"

namespace longlive::ptx {

// Descriptor of a matrix of 16-bit elements whose rows lie in 128-byte swizzled patterns of 8, as TMA leaves
// them: 64 elements across, `stride` bytes from one pattern to the next. If the rows run along K, further
// columns of M or N, 64 at a time, follow after `leading` bytes; otherwise that is not used. The start may be
// moved by multiples of 32 bytes within the first row, because the swizzle goes by address bits.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* start, uint32_t stride, uint32_t leading) {
  constexpr uint64_t kSwizzle128 = 1;
  const auto encode = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return encode(shared_address(start)) | encode(leading) << 16 | encode(stride) << 32 | kSwizzle128 << 62;
}

__device__ __forceinline__ void wgmma_fence() {
#ifdef __CUDA_ARCH__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  simt::wgmma_fence();
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#ifdef __CUDA_ARCH__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  simt::current_thread().products.commit();
#endif
}
// Waits until at most `kGroupsLeft` groups are under way.
template <int kGroupsLeft>
__device__ __forceinline__ void wgmma_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
#elif !defined(__CUDACC__)
  simt::wgmma_wait(kGroupsLeft);
#endif
}

// Keeps a following wgmma_wait from being issued before `value`, a sum of weights, is computed. ptxas sees no
// dependency between arithmetic and the wait and moves the wait up, which would leave nothing to overlap with
// the product; it does keep the order of memory accesses and the wait. The store to `unused` never happens:
// no sum of weights is negative.
__device__ __forceinline__ void finish_first(float value, float* unused) {
#ifdef __CUDA_ARCH__
  asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}" ::"f"(value),
               "r"(shared_address(unused))
               : "memory");
#else
  static_cast<void>(value), static_cast<void>(unused);
#endif
}

enum class Columns { kAlongRows, kAcrossRows };  // how the columns of K lie in B's rows: K-major or MN-major

// d [64, kN] += a [64, 16] * b [16, kN], or without the sum if not `accumulate`. Fragments as in
// mma.m16n8k16: of A 16 rows to a warp; of d column blocks of 8, four registers each.
template <class T, int kN>
struct Wgmma {
  using Fragment = float[kN / 2];

  // A and B from shared memory, both K-major.
  static __device__ __forceinline__ void multiply(Fragment& d, uint64_t a, uint64_t b, bool accumulate);
  // A from registers.
  template <Columns kColumns>
  static __device__ __forceinline__ void multiply(Fragment& d, const uint32_t (&a)[4], uint64_t b,
                                                  bool accumulate);
};

#ifdef __CUDA_ARCH__

// One definition for each kN and type: operand %i of the assembly is d[i], the others follow.
#define WGMMA_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_D16(i) WGMMA_D4(i), WGMMA_D4(i + 4), WGMMA_D4(i + 8), WGMMA_D4(i + 12)
#define WGMMA_D32 WGMMA_D16(0), WGMMA_D16(16)
#define WGMMA_D56 WGMMA_D32, WGMMA_D16(32), WGMMA_D4(48), WGMMA_D4(52)
#define WGMMA_D64 WGMMA_D56, WGMMA_D4(56), WGMMA_D4(60)
#define WGMMA_D72 WGMMA_D64, WGMMA_D4(64), WGMMA_D4(68)
#define WGMMA_D88 WGMMA_D72, WGMMA_D16(72)
#define WGMMA_R32                                                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_R56                                                                                     \
  WGMMA_R32                                                                                           \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55"
#define WGMMA_R64 WGMMA_R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_R72 WGMMA_R64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_R88 WGMMA_R72 ", %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87"

#define WGMMA_DEFINE(T, NAME, N, R, I0, I1, I2, I3, I4, I5, I6)                                          \
  template <>                                                                                            \
  __device__ __forceinline__ void Wgmma<T, N>::multiply(Fragment& d, uint64_t a, uint64_t b,             \
                                                        bool accumulate) {                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " I2                                                  \
                 ", 0;\n"                                                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" WGMMA_R##R         \
                 "}, " I0 ", " I1 ", p, 1, 1, 0, 0;\n}"                                                  \
                 : WGMMA_D##R                                                                            \
                 : "l"(a), "l"(b), "r"(int(accumulate)));                                                \
  }                                                                                                      \
  template <>                                                                                            \
  template <Columns kColumns>                                                                            \
  __device__ __forceinline__ void Wgmma<T, N>::multiply(Fragment& d, const uint32_t (&a)[4], uint64_t b, \
                                                        bool accumulate) {                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " I5                                                  \
                 ", 0;\n"                                                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" WGMMA_R##R         \
                 "}, {" I0 ", " I1 ", " I2 ", " I3 "}, " I4 ", p, 1, 1, " I6 ";\n}"                      \
                 : WGMMA_D##R                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),             \
                   "n"(kColumns == Columns::kAcrossRows ? 1 : 0));                                       \
  }
#define WGMMA_DEFINE_SIZES(T, NAME)                                               \
  WGMMA_DEFINE(T, NAME, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")  \
  WGMMA_DEFINE(T, NAME, 112, 56, "%56", "%57", "%58", "%59", "%60", "%61", "%62") \
  WGMMA_DEFINE(T, NAME, 128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70") \
  WGMMA_DEFINE(T, NAME, 144, 72, "%72", "%73", "%74", "%75", "%76", "%77", "%78") \
  WGMMA_DEFINE(T, NAME, 176, 88, "%88", "%89", "%90", "%91", "%92", "%93", "%94")

WGMMA_DEFINE_SIZES(__half, "f16")
WGMMA_DEFINE_SIZES(__nv_bfloat16, "bf16")

#elif defined(__CUDACC__)

// The host pass of nvcc sees the calls but never makes them.
template <class T, int kN>
void Wgmma<T, kN>::multiply(Fragment&, uint64_t, uint64_t, bool) {}
template <class T, int kN>
template <Columns kColumns>
void Wgmma<T, kN>::multiply(Fragment&, const uint32_t (&)[4], uint64_t, bool) {}

#else

template <class T, int kN>
void Wgmma<T, kN>::multiply(Fragment& d, uint64_t a, uint64_t b, bool accumulate) {
  simt::wgmma<T>(d, kN, nullptr, a, b, accumulate, false);
}
template <class T, int kN>
template <Columns kColumns>
void Wgmma<T, kN>::multiply(Fragment& d, const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  simt::wgmma<T>(d, kN, a, 0, b, accumulate, kColumns == Columns::kAcrossRows);
}

#endif

}  // namespace longlive::ptx
