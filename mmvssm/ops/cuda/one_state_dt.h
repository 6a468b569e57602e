// Step sizes of a chunk before the softplus, from their low-rank form: a matrix product
// of 16-bit numbers on the tensor cores, summed up in float32.
#pragma once

#include "one_state_inputs.h"

namespace mmvssm {

constexpr int kWarpTiles = kChannelTiles / (kThreads / 32);  // of 8 channels
static_assert(kWarpTiles * (kThreads / 32) == kChannelTiles, "no rest");

// For 16 positions after the other.
template <bool kAdds, int kRankTile, int kTile = 0>
MMVSSM_DEVICE void multiply_rows(const char* rows,
                                 const uint2 (&b)[kWarpTiles][kWeightTerms],
                                 float (&d)[kPositions / 16][kWarpTiles][4],
                                 const float (&bias)[kWarpTiles][4]) {
  if constexpr (kTile < kPositions / 16) {
    constexpr int kOffset = (16 * kTile * kRankPitch + 16 * kRankTile) * 2;
    constexpr int kTerm = kPositions * kRankPitch * 2;
    uint32_t a[kTerms][4];
    load_matrix<kOffset>(a[0], rows);
    if constexpr (kTerms > 1) load_matrix<kOffset + kTerm>(a[1], rows);
    if constexpr (kTerms > 2) load_matrix<kOffset + 2 * kTerm>(a[2], rows);
#pragma unroll
    for (int j = 0; j < kWarpTiles; ++j)
      multiply_terms<!kAdds && kRankTile == 0>(d[kTile][j], a, b[j], bias[j]);
    multiply_rows<kAdds, kRankTile, kTile + 1>(rows, b, d, bias);
  }
}

// The result of this lane, in tiles of 16 positions and 8 channels: the bias and the
// products, or the products added to what is there.
template <typename Memory, bool kAdds = false, int kRankTile = 0>
MMVSSM_DEVICE void project_tiles(const char* smem,
                                 float (&d)[kPositions / 16][kWarpTiles][4],
                                 const float (&bias)[kWarpTiles][4]) {
  if constexpr (kRankTile < kRankTiles) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint2 b[kWarpTiles][kWeightTerms];
#pragma unroll
    for (int j = 0; j < kWarpTiles; ++j)
#pragma unroll
      for (int i = 0; i < kWeightTerms; ++i)
        b[j][i] = reinterpret_cast<const uint2*>(smem + Memory::kFragments)
            [((i * kRankTiles + kRankTile) * kChannelTiles + warp * kWarpTiles + j) * 32 +
             lane];
    const char* rows = smem + Memory::kLowRank + lane % 16 * kRankPitch * 2 + lane / 16 * 16;
    multiply_rows<kAdds, kRankTile>(rows, b, d, bias);
    project_tiles<Memory, kAdds, kRankTile + 1>(smem, d, bias);
  }
}

// Fills (position, channel) at Layout::kDt, rows of kDtPitch float32.
MMVSSM_DEVICE void project(char* smem) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = warp * kWarpTiles * 8 + lane % 4 * 2;
  float d[kPositions / 16][kWarpTiles][4], bias[kWarpTiles][4];
#pragma unroll
  for (int j = 0; j < kWarpTiles; ++j) {
    const float2 two = *reinterpret_cast<const float2*>(
        smem + Layout::kParameters + (kShift * kChannels + column + 8 * j) * 4);
    bias[j][0] = bias[j][2] = two.x;
    bias[j][1] = bias[j][3] = two.y;
  }
  project_tiles<Layout>(smem, d, bias);
  float* to = reinterpret_cast<float*>(smem + Layout::kDt) + lane / 4 * kDtPitch + column;
#pragma unroll
  for (int m = 0; m < kPositions / 16; ++m)
#pragma unroll
    for (int j = 0; j < kWarpTiles; ++j) {
      float* row = to + 16 * m * kDtPitch + 8 * j;
      *reinterpret_cast<float2*>(row) = float2{d[m][j][0], d[m][j][1]};
      *reinterpret_cast<float2*>(row + 8 * kDtPitch) = float2{d[m][j][2], d[m][j][3]};
    }
}

// dt of own channels at own positions, log2(e) included.
struct StepSizes {
  char* from;

  MMVSSM_DEVICE StepSizes(const Own& own, char* smem) {
    if constexpr (kProjects)
      from = smem + Layout::kDt + (own.team * kOwn * kDtPitch + own.channel) * 4;
    else
      from = smem + Layout::kDelta + own.team * kOwn * kPitch<DELTA_DTYPE> +
             own.channel * kSize<DELTA_DTYPE>;
  }

  // Before the softplus, with the bias, which is `shift` where the rank is 0.
  MMVSSM_DEVICE void read(int buffer, int i, const float (&shift)[kWidth],
                          float (&x)[kWidth]) const {
    if constexpr (kProjects) {
      load_channels<kFloat32>(from + i * kDtPitch * 4, x);
    } else {
      load_channels<DELTA_DTYPE>(
          from + buffer * kRowsBytes<DELTA_DTYPE> + i * kPitch<DELTA_DTYPE>, x);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) x[c] = x[c] * kLog2E + shift[c];
    }
  }

  // After it; zero from position `left` on.
  MMVSSM_DEVICE void finish(int i, int left, float (&x)[kWidth]) const {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      if constexpr (SOFTPLUS)
        x[c] = softplus(x[c]);
      else if (i >= left)
        x[c] = 0.0f;
    }
  }

  // Makes the softplus give zero from position `left` on. No other thread reads that.
  MMVSSM_DEVICE void hide(int buffer, int left) const {
    if constexpr (SOFTPLUS) {
      constexpr int kDtype = kProjects ? kFloat32 : DELTA_DTYPE;
      constexpr int kBytes = kProjects ? kDtPitch * 4 : kPitch<DELTA_DTYPE>;
      char* rows = from + (kProjects ? 0 : buffer * kRowsBytes<kDtype>);
      float low[kWidth];
#pragma unroll
      for (int c = 0; c < kWidth; ++c) low[c] = kDtype == kFloat16 ? -6e4f : -1e30f;
#pragma unroll 1
      for (int i = left < 0 ? 0 : left; i < kOwn; ++i)
        store_channels<kDtype>(rows + i * kBytes, low);
    }
  }
};

}  // namespace mmvssm
