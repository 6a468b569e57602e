// Products of the low-rank form of delta and its weight on the tensor cores: numbers as
// sums of 16-bit terms.
#pragma once

#include "one_state.h"

namespace mmvssm {

constexpr bool kProjects = RANK > 0;

// The low-rank form of delta is a matrix (position, rank) of 16-bit numbers, float32 as
// the sum of three; the weight, float32, is the sum of two or three.
constexpr bool kIsBfloat16 = DELTA_DTYPE != kFloat16;
constexpr int kTerms = DELTA_DTYPE == kFloat32 ? 3 : 1;
constexpr int kWeightTerms = DELTA_DTYPE == kFloat32 ? 3 : 2;
constexpr int kRankTiles = (RANK + 15) / 16, kChannelTiles = kChannels / 8;

// Splits two numbers into terms of 16 bits that add up to them.
template <int kCount>
MMVSSM_DEVICE void split(float low, float high, uint32_t (&terms)[kCount]) {
  constexpr int kDtype = kIsBfloat16 ? kBfloat16 : kFloat16;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float x, y;
    terms[i] = pack<kDtype>(low, high);
    unpack<kDtype>(terms[i], x, y);
    low -= x;
    high -= y;
  }
}

// What the terms of a weight lack.
MMVSSM_DEVICE float rest_of(float x) {
  uint32_t terms[kWeightTerms];
  split(x, 0.0f, terms);
#pragma unroll
  for (int i = 0; i < kWeightTerms; ++i) {
    float low, high;
    unpack<kIsBfloat16 ? kBfloat16 : kFloat16>(terms[i], low, high);
    x -= low;
  }
  return x;
}

// Puts the weights into shared memory as mma_16816 wants them, times log2(e). `Memory`
// says where that is, which channel a column is, and which row, if any, is for the bias
// (that is to be multiplied by 1), and the one behind it for what its terms lack.
template <typename Memory>
MMVSSM_DEVICE void put_dt_weight(const ScanPointers& scan, const Chain& chain,
                                 char* smem) {
  constexpr int kCount = kRankTiles * kChannelTiles * 32 * 2;
  uint32_t* fragments = reinterpret_cast<uint32_t*>(smem + Memory::kFragments);
  const float* weight = scan.weight + static_cast<int64_t>(chain.channel) * RANK;
#pragma unroll 4
  for (int first = 0; first < kCount; first += kThreads) {
    const int index = first + threadIdx.x;
    if (kCount % kThreads != 0 && index >= kCount) break;
    const int lane = index / 2 % 32, tile = index / 64;
    const int channel = Memory::channel_of(tile % kChannelTiles, lane / 4);
    const int r = tile / kChannelTiles * 16 + index % 2 * 8 + lane % 4 * 2;
    float low = 0.0f, high = 0.0f;
    if (channel < chain.count) {
      if (r < RANK) low = weight[channel * RANK + r] * kLog2E;
      if (r + 1 < RANK) high = weight[channel * RANK + r + 1] * kLog2E;
      if (r == Memory::kBiasRow && scan.bias != nullptr) {
        low = scan.bias[chain.channel + channel] * kLog2E;
        high = rest_of(low);
      }
    }
    uint32_t terms[kWeightTerms];
    split(low, high, terms);
#pragma unroll
    for (int i = 0; i < kWeightTerms; ++i) fragments[i * kCount + index] = terms[i];
  }
}

// The products of the terms of one piece of the rank, the smallest first.
template <bool kFirst>
MMVSSM_DEVICE void multiply_terms(float (&d)[4], const uint32_t (&a)[kTerms][4],
                                  const uint2 (&b)[kWeightTerms], const float (&c)[4]) {
#pragma unroll
  for (int order = kWeightTerms - 1; order >= 0; --order)
#pragma unroll
    for (int i = 0; i < kTerms && i <= order; ++i) {
      const uint2 two = b[order - i];
      const uint32_t pair[2] = {two.x, two.y};
      if (kFirst && order == kWeightTerms - 1 && i == 0)
        mma_16816<kIsBfloat16>(d, a[i], pair, c);
      else
        mma_16816<kIsBfloat16>(d, a[i], pair);
    }
}

}  // namespace mmvssm
