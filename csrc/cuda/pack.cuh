// A group of lanes takes one tile of tokens of one head, each lane the same 16 bytes of channels of every
// token. The tile stays in registers between its maxima and its codes, so every byte is read once and written
// once.
#pragma once
#include "core/pages.cuh"
#include "core/scalar.cuh"
#include "cuda/pack.h"
#include "cuda/ptx/math.cuh"

namespace longlive {

constexpr int kPackThreads = 128;
constexpr int kPackBlocks = 3;      // share an SM, in 168 registers a thread; unmeasured
constexpr int kUnpackTokens = 8;    // in flight for each thread; unmeasured
constexpr int kPackMaxLayers = 64;  // of one launch: 1 KB of the 4 KB that parameters may take
constexpr int kPackAlignment = 16;  // of a layer's bytes
constexpr uint16_t kPackNaN = 0x7fc0;

// Tokens that share a scale. 24 divides the frames of Wan at 480 x 832 and 720 x 1280 (1560 and 3600 tokens).
template <int kBits>
constexpr int kPackTile = kBits == 8 ? 24 : 16;
template <int kBits>
constexpr int kPackLargest = kBits == 8 ? 127 : 7;

struct PackPools {
  void* k[kPackMaxLayers];
  void* v[kPackMaxLayers];
};

// The frame, and the parts of one layer's bytes.
struct PackFrame {
  uint8_t* packed;  // of the launch's first layer
  int64_t slot;
  int heads, tokens, head_dim;
  int tiles;  // of a head
  int64_t code_bytes, k_scale_bytes, v_scale_bytes, layer_bytes;
};

template <int kBits>
PackFrame pack_frame(const PackArguments& a) {
  PackFrame f{};
  f.packed = a.packed, f.slot = a.slot;
  f.heads = a.heads, f.tokens = a.tokens, f.head_dim = a.head_dim;
  f.tiles = (a.tokens + kPackTile<kBits> - 1) / kPackTile<kBits>;
  f.code_bytes = int64_t(a.heads) * a.tokens * a.head_dim * kBits / 8;
  f.k_scale_bytes = int64_t(a.heads) * f.tiles * a.head_dim * 2;
  f.v_scale_bytes = kBits == 8 ? int64_t(a.heads) * a.tokens * 2 : f.k_scale_bytes;
  const int64_t used = 2 * f.code_bytes + f.k_scale_bytes + f.v_scale_bytes;
  f.layer_bytes = (used + kPackAlignment - 1) / kPackAlignment * kPackAlignment;
  return f;
}

// Codes of the channels in one vector of T, of one token, in words: single bytes would take a register each.
template <class T, int kBits>
struct alignas(Vector<T>::kSize* kBits / 8) PackCodes {
  using Word = std::conditional_t<Vector<T>::kSize * kBits == 16, uint16_t, uint32_t>;
  static constexpr int kCodes = 8 * sizeof(Word) / kBits;  // in a word
  Word word[Vector<T>::kSize / kCodes];
};

// bfloat16 scales of those channels.
template <class T>
struct alignas(Vector<T>::kSize * 2) PackScales {
  uint16_t bits[Vector<T>::kSize];
};

// What a thread works on.
template <class T, int kBits>
struct PackTile {
  T* page;           // the tile's first token, at the thread's channels
  uint8_t* codes;    // likewise
  uint16_t* scales;  // of the thread's channels, or of the tile's first token
  int tokens;        // of the tile; 0: there is none left for this group of lanes
  int row_bytes;     // of the codes of a token
  int lane, lanes;   // within the group
  bool by_token;     // a scale for each token, else one for each channel
};

// Grid: (groups of lanes over heads and tiles, 2 for K and V, layers).
template <class T, int kBits>
__device__ __forceinline__ PackTile<T, kBits> pack_tile(const PackPools& pools, const PackFrame& f) {
  PackTile<T, kBits> t;
  t.lanes = f.head_dim / Vector<T>::kSize;
  t.lane = threadIdx.x % t.lanes;
  t.row_bytes = f.head_dim * kBits / 8;
  const bool is_value = blockIdx.y == 1;
  t.by_token = kBits == 8 && is_value;
  const unsigned item = blockIdx.x * (blockDim.x / t.lanes) + threadIdx.x / t.lanes;
  const int head = item / f.tiles, token = item % f.tiles * kPackTile<kBits>,
            column = t.lane * Vector<T>::kSize;
  t.tokens = head < f.heads ? min(kPackTile<kBits>, f.tokens - token) : 0;
  T* pages = static_cast<T*>(is_value ? pools.v[blockIdx.z] : pools.k[blockIdx.z]);
  t.page = pages + page_offset(f.slot, head, token, f.heads, f.tokens, f.head_dim) + column;
  uint8_t* layer = f.packed + blockIdx.z * f.layer_bytes;
  const int64_t row = int64_t(head) * f.tokens + token;
  t.codes = layer + is_value * f.code_bytes + row * t.row_bytes + column * kBits / 8;
  t.scales = reinterpret_cast<uint16_t*>(layer + 2 * f.code_bytes + is_value * f.k_scale_bytes) +
             (t.by_token ? row : int64_t(item) * f.head_dim + column);
  return t;
}

// |x| as bits, in whose order infinity comes after every number and NaN after infinity: a maximum loses
// neither.
template <class T>
__device__ __forceinline__ uint32_t magnitude(T x) {
  return __float_as_uint(to_float(x)) & 0x7fffffffu;
}

template <class T>
__device__ __forceinline__ float largest_number() {
  if constexpr (sizeof(T) == 4)
    return 0x1.fffffep127f;
  else
    return std::is_same_v<T, __half> ? 65504.0f : 0x1.fep127f;
}

// Numbers of one token in the four registers that they need: as a Vector<T>, or once converted for the maxima
// and remembered for the codes, the compiler gives each a register of its own.
template <class T>
struct alignas(16) PackRow {
  int word[4] = {};

  __device__ __forceinline__ void load(const T* address) {
    const Vector<T> row = load_vector(address);
    memcpy(word, &row, sizeof word);
  }
  __device__ __forceinline__ Vector<T> numbers() const {
    int copy[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) copy[i] = ptx::opaque(word[i]);
    Vector<T> row;
    memcpy(&row, copy, sizeof row);
    return row;
  }
};

struct PackScale {
  uint16_t bits;
  float inverse;
};

// The scale of numbers up to `largest`, rounded up so that none of them needs a larger code. With a NaN or an
// infinity among them it is NaN and all codes are 0: they come back as NaN, never as numbers.
template <int kBits>
__device__ __forceinline__ PackScale pack_scale(uint32_t largest) {
  if (largest >= 0x7f800000u) return {kPackNaN, 0.0f};
  // Not below the smallest normal number, whose inverse is finite still: there is no scale of zero.
  const float exact = fmaxf(__uint_as_float(largest) * (1.0f / kPackLargest<kBits>), 0x1p-126f);
  const uint32_t bits = (__float_as_uint(exact) + 0xffff) >> 16;
  return {static_cast<uint16_t>(bits), 1.0f / __uint_as_float(bits << 16)};
}

// `inverse(j)` belongs to element j. Converting a NaN, such as an infinity times the inverse 0, gives 0.
template <int kBits, class T, class Inverse>
__device__ __forceinline__ PackCodes<T, kBits> encode(const Vector<T>& row, Inverse inverse) {
  PackCodes<T, kBits> codes{};
#pragma unroll
  for (int j = 0; j < Vector<T>::kSize; ++j) {
    const unsigned code = __float2int_rn(to_float(row.element[j]) * inverse(j));
    codes.word[j / codes.kCodes] |= (code & ((1u << kBits) - 1)) << (j % codes.kCodes * kBits);
  }
  return codes;
}

// The product is exact. Where rounding to codes went beyond the largest number of T, that number; a NaN
// passes.
template <class T>
__device__ __forceinline__ T decode(int code, float scale) {
  const float x = static_cast<float>(code) * scale;
  return from_float<T>(x != x ? x : fminf(fmaxf(x, -largest_number<T>()), largest_number<T>()));
}

template <int kBits, class T, class Scale>
__device__ __forceinline__ Vector<T> decode(const PackCodes<T, kBits>& codes, Scale scale) {
  Vector<T> row;
#pragma unroll
  for (int j = 0; j < Vector<T>::kSize; ++j) {
    const uint32_t on_top = uint32_t(codes.word[j / codes.kCodes]) << (32 - kBits - j % codes.kCodes * kBits);
    row.element[j] = decode<T>(static_cast<int32_t>(on_top) >> (32 - kBits), scale(j));
  }
  return row;
}

template <class T, int kBits>
__global__ void __launch_bounds__(kPackThreads, kPackBlocks)
    pack_kernel(const PackPools pools, const PackFrame f) {
  constexpr int kSize = Vector<T>::kSize;
  using Codes = PackCodes<T, kBits>;
  constexpr int kTile = kPackTile<kBits>;
  const PackTile<T, kBits> t = pack_tile<T, kBits>(pools, f);
  PackRow<T> held[kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i)
    if (i < t.tokens) held[i].load(t.page + i * f.head_dim);

  if (t.by_token) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const Vector<T> row = held[i].numbers();
      uint32_t largest = 0;
#pragma unroll
      for (int j = 0; j < kSize; ++j) largest = max(largest, magnitude(row.element[j]));
      for (int distance = t.lanes / 2; distance > 0; distance /= 2)
        largest = max(largest, __shfl_xor_sync(kFullMask, largest, distance));
      const PackScale scale = pack_scale<kBits>(largest);
      if (i < t.tokens) {
        if (t.lane == 0) t.scales[i] = scale.bits;
        *reinterpret_cast<Codes*>(t.codes + i * t.row_bytes) =
            encode<kBits>(row, [&](int) { return scale.inverse; });
      }
    }
  } else {
    uint32_t largest[kSize] = {};
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const Vector<T> row = held[i].numbers();
#pragma unroll
      for (int j = 0; j < kSize; ++j) largest[j] = max(largest[j], magnitude(row.element[j]));
    }
    PackScales<T> scales;
    float inverse[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const PackScale scale = pack_scale<kBits>(largest[j]);
      scales.bits[j] = scale.bits;
      inverse[j] = scale.inverse;
    }
    if (t.tokens > 0) *reinterpret_cast<PackScales<T>*>(t.scales) = scales;
#pragma unroll
    for (int i = 0; i < kTile; ++i)
      if (i < t.tokens)
        *reinterpret_cast<Codes*>(t.codes + i * t.row_bytes) =
            encode<kBits>(held[i].numbers(), [&](int j) { return inverse[j]; });
  }

  const int64_t used = 2 * f.code_bytes + f.k_scale_bytes + f.v_scale_bytes;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x < f.layer_bytes - used)
    f.packed[blockIdx.z * f.layer_bytes + used + threadIdx.x] = 0;
}

template <class T, int kBits>
__global__ void __launch_bounds__(kPackThreads, kPackBlocks)
    unpack_kernel(const PackPools pools, const PackFrame f) {
  using Codes = PackCodes<T, kBits>;
  const PackTile<T, kBits> t = pack_tile<T, kBits>(pools, f);
  if (t.tokens <= 0) return;
  PackScales<T> of_channel;
  if (!t.by_token) of_channel = *reinterpret_cast<const PackScales<T>*>(t.scales);
  for (int first = 0; first < t.tokens; first += kUnpackTokens) {
    // All loads before the first store, which could be to the same address as far as the compiler knows.
    Codes codes[kUnpackTokens];
    uint16_t of_token[kUnpackTokens];
#pragma unroll
    for (int i = 0; i < kUnpackTokens; ++i)
      if (first + i < t.tokens) {
        codes[i] = *reinterpret_cast<const Codes*>(t.codes + (first + i) * t.row_bytes);
        if (t.by_token) of_token[i] = t.scales[first + i];
      }
#pragma unroll
    for (int i = 0; i < kUnpackTokens; ++i)
      if (first + i < t.tokens)
        *reinterpret_cast<Vector<T>*>(t.page + (first + i) * f.head_dim) =
            decode<kBits, T>(codes[i], [&](int j) {
              return __uint_as_float(uint32_t(t.by_token ? of_token[i] : of_channel.bits[j]) << 16);
            });
  }
}

}  // namespace longlive
