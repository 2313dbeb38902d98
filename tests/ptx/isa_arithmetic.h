// Arithmetic, comparison, conversion and movement of PTX; see isa.h. A register is an unsigned integer of its
// size; an instruction sees its operands' bits as numbers of its type.
#pragma once
#include <algorithm>
#include <type_traits>

#include "launch.h"

namespace ptx {

template <size_t kBytes>
struct UnsignedOf;
template <>
struct UnsignedOf<2> {
  using Type = uint16_t;
};
template <>
struct UnsignedOf<4> {
  using Type = uint32_t;
};
template <>
struct UnsignedOf<8> {
  using Type = uint64_t;
};
template <class T>
using Bits = typename UnsignedOf<sizeof(T)>::Type;
template <class T>
T see(Bits<T> x) {
  return std::bit_cast<T>(x);
}
template <class T>
Bits<T> bits(T x) {
  return std::bit_cast<Bits<T>>(x);
}

// Takes whatever an instruction writes to `_`.
struct Sink {};

// Elements of 16 bits.
struct F16 {
  static float widen(uint16_t x) { return static_cast<float>(std::bit_cast<_Float16>(x)); }
  static uint16_t round(float x) {  // to nearest even
    return std::isnan(x) ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(x));
  }
};
struct BF16 {
  static float widen(uint16_t x) { return see<float>(static_cast<uint32_t>(x) << 16); }
  static uint16_t round(float x) {
    if (std::isnan(x)) return 0x7fff;
    const uint32_t all = bits(x), kept = all >> 16, rest = all & 0xffff;
    const bool up = rest > 0x8000 || (rest == 0x8000 && (kept & 1));
    return static_cast<uint16_t>(kept + up);
  }
};

#define PTX_1(NAME, D, A, ...)                \
  inline void NAME(Bits<D>& d, Bits<A> x) {   \
    const A a = see<A>(x);                    \
    d = bits<D>(static_cast<D>(__VA_ARGS__)); \
  }
#define PTX_2(NAME, D, T, ...)                         \
  inline void NAME(Bits<D>& d, Bits<T> x, Bits<T> y) { \
    const T a = see<T>(x), b = see<T>(y);              \
    d = bits<D>(static_cast<D>(__VA_ARGS__));          \
  }
#define PTX_3(NAME, T, ...)                                       \
  inline void NAME(Bits<T>& d, Bits<T> x, Bits<T> y, Bits<T> z) { \
    const T a = see<T>(x), b = see<T>(y), c = see<T>(z);          \
    d = bits<T>(static_cast<T>(__VA_ARGS__));                     \
  }

// ---- Integers: sums and products wrap around, so the sign does not matter to them ----

PTX_2(add_s32, uint32_t, uint32_t, a + b)
PTX_2(add_s64, uint64_t, uint64_t, a + b)
PTX_2(sub_s32, uint32_t, uint32_t, a - b)
PTX_2(sub_s64, uint64_t, uint64_t, a - b)
PTX_2(mul_lo_s32, uint32_t, uint32_t, a* b)
PTX_2(mul_lo_s64, uint64_t, uint64_t, a* b)
PTX_3(mad_lo_s32, uint32_t, a* b + c)
PTX_2(mul_wide_s32, int64_t, int32_t, int64_t(a) * b)
PTX_2(mul_wide_u32, uint64_t, uint32_t, uint64_t(a) * b)
PTX_2(mul_hi_s32, int32_t, int32_t, int64_t(a) * b >> 32)
PTX_2(mul_hi_u32, uint32_t, uint32_t, uint64_t(a) * b >> 32)
PTX_2(min_s32, int32_t, int32_t, std::min(a, b))
PTX_2(max_s32, int32_t, int32_t, std::max(a, b))
PTX_2(min_s64, int64_t, int64_t, std::min(a, b))
PTX_2(max_s64, int64_t, int64_t, std::max(a, b))
PTX_2(min_u32, uint32_t, uint32_t, std::min(a, b))
PTX_2(max_u32, uint32_t, uint32_t, std::max(a, b))
PTX_2(min_u64, uint64_t, uint64_t, std::min(a, b))
PTX_2(max_u64, uint64_t, uint64_t, std::max(a, b))
PTX_2(and_b32, uint32_t, uint32_t, a& b)
PTX_2(and_b64, uint64_t, uint64_t, a& b)
PTX_2(or_b32, uint32_t, uint32_t, a | b)
PTX_2(or_b64, uint64_t, uint64_t, a | b)
PTX_2(and_b16, uint16_t, uint16_t, a& b)
PTX_2(or_b16, uint16_t, uint16_t, a | b)
PTX_2(xor_b32, uint32_t, uint32_t, a ^ b)
PTX_2(xor_b64, uint64_t, uint64_t, a ^ b)
PTX_1(not_b32, uint32_t, uint32_t, ~a)
PTX_1(popc_b32, uint32_t, uint32_t, std::popcount(a))

template <class T>
T divisor(Bits<T> x) {
  if (x == 0) fault("division by zero");
  return see<T>(x);
}
// -2^31 / -1 does not fit; nor does anything here divide by -1.
inline void div_s32(uint32_t& d, uint32_t a, uint32_t b) {
  d = static_cast<uint32_t>(int64_t(see<int32_t>(a)) / divisor<int32_t>(b));
}
inline void rem_s32(uint32_t& d, uint32_t a, uint32_t b) {
  d = static_cast<uint32_t>(int64_t(see<int32_t>(a)) % divisor<int32_t>(b));
}
inline void div_u32(uint32_t& d, uint32_t a, uint32_t b) { d = a / divisor<uint32_t>(b); }
inline void rem_u32(uint32_t& d, uint32_t a, uint32_t b) { d = a % divisor<uint32_t>(b); }

// A shift by more than the width is one by the width.
inline void shl_b16(uint16_t& d, uint16_t a, uint32_t b) {
  d = b > 15 ? uint16_t{0} : static_cast<uint16_t>(a << b);
}
inline void shl_b32(uint32_t& d, uint32_t a, uint32_t b) { d = b > 31 ? 0 : a << b; }
inline void shl_b64(uint64_t& d, uint64_t a, uint32_t b) { d = b > 63 ? 0 : a << b; }
inline void shr_u32(uint32_t& d, uint32_t a, uint32_t b) { d = b > 31 ? 0 : a >> b; }
inline void shr_u64(uint64_t& d, uint64_t a, uint32_t b) { d = b > 63 ? 0 : a >> b; }
inline void shr_s32(uint32_t& d, uint32_t a, uint32_t b) { d = bits(see<int32_t>(a) >> std::min(b, 31u)); }
inline void shr_s64(uint64_t& d, uint64_t a, uint32_t b) { d = bits(see<int64_t>(a) >> std::min(b, 63u)); }

// `length` bits of a, put into b from bit `position` on.
template <class T>
T insert_bits(T a, T b, uint32_t position, uint32_t length) {
  position &= 0xff, length &= 0xff;
  for (uint32_t i = 0; i < length && position + i < 8 * sizeof(T); ++i) {
    const T bit = T(1) << (position + i);
    b = (a >> i & 1) ? b | bit : b & ~bit;
  }
  return b;
}
inline void bfi_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c, uint32_t e) {
  d = insert_bits(a, b, c, e);
}
inline void bfi_b64(uint64_t& d, uint64_t a, uint64_t b, uint32_t c, uint32_t e) {
  d = insert_bits(a, b, c, e);
}

// Each hexadecimal digit of `selection` chooses a byte of a (0 to 3) or b (4 to 7); with 8 added, its sign.
inline void prmt_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t selection) {
  const uint64_t bytes = a | uint64_t(b) << 32;
  uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const uint32_t digit = selection >> 4 * i & 15, byte = bytes >> 8 * (digit & 7) & 0xff;
    result |= (digit < 8 ? byte : byte >> 7 ? 0xff : 0) << 8 * i;
  }
  d = result;
}

// ---- Floating point: round to nearest even, subnormal numbers kept unless .ftz ----

PTX_2(add_f32, float, float, a + b)
PTX_2(add_rn_f32, float, float, a + b)
PTX_2(sub_f32, float, float, a - b)
PTX_2(mul_f32, float, float, a* b)
PTX_2(mul_rn_f32, float, float, a* b)
PTX_3(fma_rn_f32, float, std::fma(a, b, c))
PTX_2(div_rn_f32, float, float, a / b)
PTX_1(rcp_rn_f32, float, float, 1.0f / a)
PTX_1(sqrt_rn_f32, float, float, std::sqrt(a))
PTX_2(add_f64, double, double, a + b)
PTX_2(sub_f64, double, double, a - b)
PTX_2(mul_f64, double, double, a* b)
PTX_1(abs_f32, float, float, std::fabs(a))
PTX_1(neg_f32, float, float, -a)
// The number, if the other is NaN; +0 is more than -0.
inline float larger(float a, float b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
PTX_2(max_f32, float, float, larger(a, b))
PTX_2(min_f32, float, float, -larger(-a, -b))

// Approximations are off by all that the ISA allows, up or down by the operand's bits; rounding to
// float comes on top.
inline double direction(float a) { return bits(a) * 2654435761u >> 31 ? 1.0 : -1.0; }
inline float off_by(double exact, double error, float a) {
  return static_cast<float>(exact * (1 + error * direction(a)));
}
inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float exp2_ftz(float a) {
  return flush(a) == 0.0f ? 1.0f : flush(off_by(std::exp2(double(a)), 0x1p-22, a));
}
inline float log2_ftz(float a) {
  const double exact = std::log2(double(flush(a)));
  // Between 1/2 and 2 the error is absolute.
  if (a > 0.5f && a < 2.0f) return static_cast<float>(exact + 0x1p-22 * direction(a));
  return off_by(exact, 0x1p-22, a);
}
PTX_1(ex2_approx_ftz_f32, float, float, exp2_ftz(a))
PTX_1(lg2_approx_ftz_f32, float, float, log2_ftz(a))
PTX_1(rcp_approx_ftz_f32, float, float, flush(off_by(1.0 / double(flush(a)), 0x1p-23, a)))
PTX_1(rsqrt_approx_f32, float, float, off_by(1.0 / std::sqrt(double(a)), 0x1.1p-23, a))

// ---- Comparison and selection ----

#define PTX_SETP(KIND, T)                                                                   \
  inline void setp_eq_##KIND(bool& p, Bits<T> a, Bits<T> b) { p = see<T>(a) == see<T>(b); } \
  inline void setp_ne_##KIND(bool& p, Bits<T> a, Bits<T> b) { p = see<T>(a) != see<T>(b); } \
  inline void setp_lt_##KIND(bool& p, Bits<T> a, Bits<T> b) { p = see<T>(a) < see<T>(b); }  \
  inline void setp_le_##KIND(bool& p, Bits<T> a, Bits<T> b) { p = see<T>(a) <= see<T>(b); } \
  inline void setp_gt_##KIND(bool& p, Bits<T> a, Bits<T> b) { p = see<T>(a) > see<T>(b); }  \
  inline void setp_ge_##KIND(bool& p, Bits<T> a, Bits<T> b) { p = see<T>(a) >= see<T>(b); }
PTX_SETP(s16, int16_t)
PTX_SETP(s32, int32_t)
PTX_SETP(u32, uint32_t)
PTX_SETP(b32, uint32_t)
PTX_SETP(s64, int64_t)
PTX_SETP(u64, uint64_t)
// Of NaN the ordered comparisons are false, the unordered ones (..u) true.
#define PTX_SETP_F32(ORDERED, UNORDERED, OPERATOR)                      \
  inline void setp_##ORDERED##_f32(bool& p, uint32_t x, uint32_t y) {   \
    const float a = see<float>(x), b = see<float>(y);                   \
    p = !std::isnan(a) && !std::isnan(b) && a OPERATOR b;               \
  }                                                                     \
  inline void setp_##UNORDERED##_f32(bool& p, uint32_t x, uint32_t y) { \
    const float a = see<float>(x), b = see<float>(y);                   \
    p = std::isnan(a) || std::isnan(b) || a OPERATOR b;                 \
  }
PTX_SETP_F32(eq, equ, ==)
PTX_SETP_F32(ne, neu, !=)
PTX_SETP_F32(lt, ltu, <)
PTX_SETP_F32(le, leu, <=)
PTX_SETP_F32(gt, gtu, >)
PTX_SETP_F32(ge, geu, >=)

inline void setp_nan_f32(bool& p, uint32_t x, uint32_t y) {
  p = std::isnan(see<float>(x)) || std::isnan(see<float>(y));
}

#define PTX_SELP(KIND, T) \
  inline void selp_##KIND(T& d, T a, T b, bool c) { d = c ? a : b; }
PTX_SELP(u16, uint16_t)
PTX_SELP(b32, uint32_t)
PTX_SELP(u32, uint32_t)
PTX_SELP(s32, uint32_t)
PTX_SELP(f32, uint32_t)
PTX_SELP(b64, uint64_t)
inline void and_pred(bool& d, bool a, bool b) { d = a && b; }
inline void or_pred(bool& d, bool a, bool b) { d = a || b; }
inline void not_pred(bool& d, bool a) { d = !a; }

// ---- Movement and conversion ----

#define PTX_MOV(KIND, T) \
  inline void mov_##KIND(T& d, T a) { d = a; }
PTX_MOV(pred, bool)
PTX_MOV(u16, uint16_t)
PTX_MOV(b32, uint32_t)
PTX_MOV(u32, uint32_t)
PTX_MOV(f32, uint32_t)
PTX_MOV(b64, uint64_t)
PTX_MOV(u64, uint64_t)
PTX_MOV(f64, uint64_t)
// mov of a vector: the first element is the least significant.
inline void pack(uint32_t& d, uint16_t a, uint16_t b) { d = a | uint32_t(b) << 16; }
inline void pack(uint64_t& d, uint32_t a, uint32_t b) { d = a | uint64_t(b) << 32; }
inline void unpack(uint16_t& d, uint16_t& e, uint32_t a) {
  d = static_cast<uint16_t>(a);
  e = static_cast<uint16_t>(a >> 16);
}
inline void unpack(uint32_t& d, uint32_t& e, uint64_t a) {
  d = static_cast<uint32_t>(a);
  e = static_cast<uint32_t>(a >> 32);
}

// To an integer: NaN becomes 0, what does not fit the nearest that does.
inline int32_t saturate(float a) {
  if (std::isnan(a)) return 0;
  return static_cast<int32_t>(std::clamp(double(a), -2147483648.0, 2147483647.0));
}
PTX_1(cvt_u64_u32, uint64_t, uint32_t, a)
PTX_1(cvt_s64_s32, int64_t, int32_t, a)
PTX_1(cvt_u32_u16, uint32_t, uint16_t, a)
PTX_1(cvt_u16_u32, uint16_t, uint32_t, a)
PTX_1(cvt_s32_s8, int32_t, uint32_t, static_cast<int8_t>(a))
PTX_1(cvt_u32_u64, uint32_t, uint64_t, a)
PTX_1(cvt_rn_f32_s32, float, int32_t, a)
PTX_1(cvt_rn_f64_s32, double, int32_t, a)
PTX_1(cvt_rn_f32_f64, float, double, a)
PTX_1(cvt_rni_f32_f32, float, float, std::nearbyint(a))
PTX_1(cvt_rni_f64_f64, double, double, std::nearbyint(a))
PTX_1(cvt_rzi_f32_f32, float, float, std::trunc(a))
PTX_1(cvt_rzi_s32_f32, int32_t, float, saturate(a))
PTX_1(cvt_rni_s32_f32, int32_t, float, saturate(std::nearbyint(a)))
inline void cvt_f32_f16(uint32_t& d, uint16_t a) { d = bits(F16::widen(a)); }
inline void cvt_f32_bf16(uint32_t& d, uint16_t a) { d = bits(BF16::widen(a)); }
inline void cvt_rn_f16_f32(uint16_t& d, uint32_t a) { d = F16::round(see<float>(a)); }
inline void cvt_rn_bf16_f32(uint16_t& d, uint32_t a) { d = BF16::round(see<float>(a)); }
// The first operand goes to the upper half.
template <class T>
uint32_t round_pair(uint32_t upper, uint32_t lower) {
  return static_cast<uint32_t>(T::round(see<float>(upper))) << 16 | T::round(see<float>(lower));
}
inline void cvt_rn_f16x2_f32(uint32_t& d, uint32_t a, uint32_t b) { d = round_pair<F16>(a, b); }
inline void cvt_rn_bf16x2_f32(uint32_t& d, uint32_t a, uint32_t b) { d = round_pair<BF16>(a, b); }

}  // namespace ptx
