// Softmax over scores that arrive in tiles (Milakov and Gimelshein, arXiv 1805.02867).
#pragma once
#include "core/reduce.cuh"
#include "cuda/ptx/math.cuh"

namespace longlive {

// One row's state. Scores are kept unscaled; `scale` is the scores' scale times log2(e), so that an
// exponential is one multiply-add and one ex2. It must be positive: the maximum is taken before scaling.
struct OnlineSoftmax {
  float maximum = -INFINITY;
  float sum = 0.0f;  // of this thread's columns only, until the end

  // Takes the maximum of a new tile; returns what the accumulated output has to be multiplied with.
  __device__ __forceinline__ float raise(float tile_maximum, float scale) {
    const float previous = maximum;
    maximum = fmaxf(maximum, tile_maximum);
    const float correction = ptx::exp2_approximate((previous - finite_maximum()) * scale);
    sum *= correction;
    return correction;
  }

  // A row of scores that are all -inf keeps weights of zero instead of NaN.
  __device__ __forceinline__ float finite_maximum() const { return maximum == -INFINITY ? 0.0f : maximum; }

  __device__ __forceinline__ float weight(float score, float scale) const {
    return ptx::exp2_approximate(score * scale - finite_maximum() * scale);
  }

  // What the output is multiplied with at the end: zero where there was nothing to attend to.
  static __device__ __forceinline__ float normaliser(float row_sum) {
    return row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
  }

  // Natural logarithm of the sum of exponentials, for the whole row's sum. A NaN stays one.
  __device__ __forceinline__ float log_sum_exp(float row_sum, float scale) const {
    return row_sum == 0.0f ? -INFINITY
                           : (maximum * scale + ptx::log2_approximate(row_sum)) * 0.6931471805599453f;
  }
};

// Turns one row's scores of a tile into weights, in place; returns what the output so far has to be
// multiplied with. The scores lie as a matrix product leaves them: in blocks of eight columns, of which each
// of the row's four lanes has two. `score(block, i)` is a reference to the i-th of the two.
template <int kBlocks, class Score>
__device__ __forceinline__ float softmax_tile(OnlineSoftmax& row, float scale, Score score) {
  float maximum = -INFINITY;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
    maximum = fmaxf(maximum, fmaxf(score(block, 0), score(block, 1)));
  const float correction = row.raise(quad_max(maximum), scale);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int i = 0; i < 2; ++i) row.sum += score(block, i) = row.weight(score(block, i), scale);
  return correction;
}

}  // namespace longlive
