// The temporal rotary embedding, applied to the query by the difference of positions.
#pragma once
#include "core/platform.cuh"

namespace longlive {

// Cosine and sine of frames * radians_per_frame. The product and its reduction to one turn are in double: an
// hour of video is 14,400 latent frames, where a float angle would be off by a milliradian. What is left
// needs float only.
__device__ __forceinline__ float2 temporal_rotation(double frames, double radians_per_frame) {
  const double turns = frames * radians_per_frame * 0.15915494309189535;  // 1 / (2 pi)
  float sine, cosine;
  sincospif(static_cast<float>(2.0 * (turns - rint(turns))), &sine, &cosine);
  return make_float2(cosine, sine);
}

__device__ __forceinline__ float2 rotate(float2 pair, float2 rotation) {
  return make_float2(pair.x * rotation.x - pair.y * rotation.y, pair.x * rotation.y + pair.y * rotation.x);
}

}  // namespace longlive
