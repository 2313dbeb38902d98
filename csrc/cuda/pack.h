// pack and unpack: the pages of one frame, of all layers, as codes of 8 or 4 bits with their scales, and
// back.
//
// The packed bytes of a layer follow those of the one before. Each has four parts,
//   codes of K, codes of V      [heads, tokens, head_dim] signed numbers of `bits` bits; of two in a byte,
//   the
//                               one of the even channel is the low one
//   scales of K, scales of V    bfloat16; [heads, tiles, head_dim], or [heads, tokens] for V at 8 bits
// and then zeros up to a multiple of 16 bytes.
#pragma once
#include <cstdint>

namespace longlive {

struct PackArguments {
  void* const* k_pages;  // on the host: the address of every layer's pages, [slots, heads, tokens, head_dim]
  void* const* v_pages;
  uint8_t* packed;  // [layers, bytes of a layer]
  int64_t slot;
  int layers, heads, tokens, head_dim;
  int bits;   // 8 or 4
  int dtype;  // DType of the pages
};

// Writes `packed` from the pages of the slot.
void pack(const PackArguments& arguments, void* stream);

// Writes the pages of the slot from `packed`.
void unpack(const PackArguments& arguments, void* stream);

}  // namespace longlive
