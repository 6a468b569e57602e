// What all channels of a CTA read of a chunk: B, C and the low-rank form of delta. It is
// loaded into registers while the chunk before is worked on, then converted and put into
// shared memory.
#pragma once

#include "many_states.h"

namespace mmvssm {

// Two neighbouring numbers of a row, as they are in memory.
template <int kDtype>
struct Pair {
  uint32_t low, high;

  // The first `left` of them. With PAIRS there are both or none.
  MMVSSM_DEVICE void load(const char* from, int64_t step, int left) {
    from = in_global(from);
    low = high = 0;
    if (PAIRS && left > 0) {
      if constexpr (kDtype == kFloat32) {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        low = two.x, high = two.y;
      } else {
        low = *reinterpret_cast<const uint32_t*>(from);
      }
    } else if (!PAIRS) {
      if (left > 0) low = one(from);
      if (left > 1) high = one(from + step);
    }
  }
  MMVSSM_DEVICE static uint32_t one(const char* from) {
    if constexpr (kDtype == kFloat32) return *reinterpret_cast<const uint32_t*>(from);
    return *reinterpret_cast<const uint16_t*>(from);
  }
  // Both in one register, of 16 bits each.
  MMVSSM_DEVICE uint32_t packed() const { return PAIRS ? low : low | high << 16; }
  MMVSSM_DEVICE float2 floats() const {
    if constexpr (kDtype == kFloat32) return float2{float_of(low), float_of(high)};
    const uint32_t both = packed();
    if constexpr (kDtype == kBfloat16)
      return float2{float_of(both << 16), float_of(both & 0xffff0000u)};
    return float2{from_half(both & 0xffff), from_half(both >> 16)};
  }
};

// How the pairs of a chunk's rows are shared out among the threads.
template <int kPairsOfRow>
struct Shares {
  static constexpr int kAll = kPositions * kPairsOfRow;
  static constexpr int kCount = kAll ? (kAll + kThreads - 1) / kThreads : 1;
  int along;

  MMVSSM_DEVICE static uint32_t number(int i) { return i * kThreads + threadIdx.x; }
  MMVSSM_DEVICE static bool there(int i) {
    return kAll % kThreads == 0 || number(i) < kAll;
  }
  MMVSSM_DEVICE int position(int i) const {
    return !PAIRS && along ? number(i) % kPositions : number(i) / kPairsOfRow;
  }
  MMVSSM_DEVICE int pair(int i) const {
    return !PAIRS && along ? number(i) / kPositions : number(i) % kPairsOfRow;
  }
};

// B and C in shared memory: for each position the states of B, then those of C.
constexpr int kWeightsPitch = 2 * kStates;
constexpr int kWeightsBytes = kPositions * kWeightsPitch * 4;

template <bool kWithC>
struct StagedWeights {
  using Own = Shares<kStates / 2>;
  Own own;
  const char *B, *C;
  Pair<B_DTYPE> b[Own::kCount], c[Own::kCount];

  MMVSSM_DEVICE StagedWeights(const Inputs& p, const Work& work) : own{p.states_along} {
    B = hidden(p.B.data + work.batch * p.B.batch + work.group * p.B.group);
    C = hidden(p.C.data + work.batch * p.C.batch + work.group * p.C.group);
  }

  MMVSSM_DEVICE void fetch(const Inputs& p, const int* places) {
#pragma unroll
    for (int i = 0; i < Own::kCount; ++i) {
      if (!Own::there(i)) continue;
      const int n = 2 * own.pair(i), place = places[own.position(i)];
      const int left = place >= 0 ? p.states - n : 0;
      b[i].load(at(B, p.B, n, place), p.B.state, left);
      if (kWithC) c[i].load(at(C, p.C, n, place), p.C.state, left);
    }
  }

  // B gets the ln(2) that dt has too much.
  MMVSSM_DEVICE void put(float* to) const {
#pragma unroll
    for (int i = 0; i < Own::kCount; ++i) {
      if (!Own::there(i)) continue;
      float* row = to + own.position(i) * kWeightsPitch + 2 * own.pair(i);
      const float2 x = b[i].floats();
      *reinterpret_cast<float2*>(row) = float2{x.x * kLn2, x.y * kLn2};
      if (kWithC) *reinterpret_cast<float2*>(row + kStates) = c[i].floats();
    }
  }
  // Times a factor. If `swapped`, the inner two of every four states change places.
  MMVSSM_DEVICE void put_times(float* to, float factor, bool swapped) const {
#pragma unroll
    for (int i = 0; i < Own::kCount; ++i) {
      if (!Own::there(i)) continue;
      const int n = 2 * own.pair(i), step = swapped ? 2 : 1;
      float* row = to + own.position(i) * kWeightsPitch + n - (swapped ? n % 4 / 2 : 0);
      const float2 x = b[i].floats();
      row[0] = x.x * factor, row[step] = x.y * factor;
      if (!kWithC) continue;
      const float2 y = c[i].floats();
      row[kStates] = y.x * factor, row[kStates + step] = y.y * factor;
    }
  }

 private:
  MMVSSM_DEVICE static const char* at(const char* base, const Weights& x, int n,
                                      int place) {
    const char* row =
        address(const_cast<char*>(base), place, static_cast<int>(x.place));
    return row + n * (PAIRS ? kSize<B_DTYPE> : x.state);
  }
};

// The low-rank form of delta as a matrix (position, rank) of 16-bit numbers; float32 is
// the sum of three such matrices. The weight is the sum of WEIGHT_TERMS, as float32 of two
// or of three.
constexpr bool kIsBfloat16 = DELTA_DTYPE != kFloat16;
constexpr int kTerms = DELTA_DTYPE == kFloat32 ? 3 : 1;
constexpr int kTermsOfWeight = WEIGHT_TERMS;
constexpr int kRankPitch = kRank + 8;  // in numbers
constexpr int kLowRankBytes = kRank ? kTerms * kPositions * kRankPitch * 2 : 0;
constexpr int kRankSteps = kRank / 16;
constexpr int kFragments = kRankSteps * kTermsOfWeight * (kWarp / 8);
constexpr int kFragmentsBytes = kFragments * kThreads * 8;
constexpr int kDtPitch = kThreads + 8;
constexpr int kDtBytes = kPositions * kDtPitch * 4;

// The first kCount terms of 16 bits that two numbers are the sums of.
template <int kCount>
MMVSSM_DEVICE void split_terms(float low, float high, uint32_t (&terms)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t both = kIsBfloat16 ? to_bfloat16x2(low, high) : to_half2(low, high);
    terms[i] = both;
    low -= kIsBfloat16 ? float_of(both << 16) : from_half(both & 0xffff);
    high -= kIsBfloat16 ? float_of(both & 0xffff0000u) : from_half(both >> 16);
  }
}

// Pairs that need no conversion are copied past the registers.
constexpr bool kCopiesLowRank = PAIRS && DELTA_DTYPE != kFloat32;

struct StagedLowRank {
  using Own = Shares<kRank / 2>;
  Own own;
  const char* data;
  Pair<DELTA_DTYPE> x[kCopiesLowRank ? 1 : Own::kCount];

  MMVSSM_DEVICE StagedLowRank(const Inputs& p, const Work& work) : own{p.states_along} {
    data = hidden(p.delta.data + work.batch * p.delta.batch);
  }

  // Begins to bring in a chunk, which is to go to `to`.
  MMVSSM_DEVICE void fetch(const Inputs& p, const int* places, char* to) {
#pragma unroll
    for (int i = 0; i < Own::kCount; ++i) {
      if (!Own::there(i)) continue;
      const int r = 2 * own.pair(i), place = places[own.position(i)];
      const char* row =
          address(const_cast<char*>(data), place, static_cast<int>(p.delta.place));
      row += r * (PAIRS ? kSize<DELTA_DTYPE> : p.delta.channel);
      if constexpr (kCopiesLowRank)
        copy_async_or_zero<4>(pair_at(to, i), row, place >= 0 && r < p.rank);
      else
        x[i].load(row, p.delta.channel, place >= 0 ? p.rank - r : 0);
    }
  }

  MMVSSM_DEVICE void put(char* to) const {
    if constexpr (!kCopiesLowRank) {
#pragma unroll
      for (int i = 0; i < Own::kCount; ++i) {
        if (!Own::there(i)) continue;
        uint32_t terms[kTerms];
        if constexpr (DELTA_DTYPE == kFloat32)
          split_terms(float_of(x[i].low), float_of(x[i].high), terms);
        else
          terms[0] = x[i].packed();
        uint32_t* at = pair_at(to, i);
#pragma unroll
        for (int k = 0; k < kTerms; ++k) at[k * kPositions * (kRankPitch / 2)] = terms[k];
      }
    }
  }

 private:
  MMVSSM_DEVICE uint32_t* pair_at(char* to, int i) const {
    return reinterpret_cast<uint32_t*>(to) + own.position(i) * (kRankPitch / 2) +
           own.pair(i);
  }
};

// The products of the low-rank form and the weights of a warp's channels.
struct Projection {
  // Of this thread; read by none else.
  uint2* fragments;

  MMVSSM_DEVICE Projection(const Inputs& p, const Work& work, char* memory)
      : fragments(reinterpret_cast<uint2*>(memory) + threadIdx.x) {
#pragma unroll 1
    for (int step = 0; step < kRankSteps; ++step)
#pragma unroll 1
      for (int block = 0; block < kWarp / 8; ++block) {
        const int channel = work.first + block * 8 + work.lane / 4;
        const int r = step * 16 + work.lane % 4 * 2;
        const float* row = p.dt_weight + static_cast<int64_t>(channel) * p.rank;
        float w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = r + i % 2 + i / 2 * 8;
          w[i] = channel < work.end && k < p.rank ? row[k] : 0.0f;
        }
        uint32_t upper[kTermsOfWeight], lower[kTermsOfWeight];
        split_terms(w[0], w[1], upper);
        split_terms(w[2], w[3], lower);
#pragma unroll
        for (int k = 0; k < kTermsOfWeight; ++k)
          fragment(step, k, block) = uint2{upper[k], lower[k]};
      }
  }

  MMVSSM_DEVICE uint2& fragment(int step, int term, int block) const {
    return fragments[((step * kTermsOfWeight + term) * (kWarp / 8) + block) * kThreads];
  }

  // Delta of all positions of a chunk, to `to`, the column of the warp's first channel
  // in rows of kDtPitch.
  MMVSSM_DEVICE void run(const char* low_rank, int lane, float* to) const {
    float sums[kWarp / 8][4] = {};
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      uint32_t a[kTerms][4];
#pragma unroll
      for (int term = 0; term < kTerms; ++term)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8;
          a[term][i] = *reinterpret_cast<const uint32_t*>(
              low_rank +
              ((term * kPositions + row) * kRankPitch + step * 16 + column) * 2);
        }
      // The smallest products first.
#pragma unroll
      for (int other = kTermsOfWeight - 1; other >= 0; --other)
#pragma unroll
        for (int term = kTerms - 1; term >= 0; --term) {
          if (term + other > 2) continue;
#pragma unroll
          for (int block = 0; block < kWarp / 8; ++block) {
            const uint2 two = fragment(step, other, block);
            const uint32_t b[2] = {two.x, two.y};
            mma_16816<kIsBfloat16>(sums[block], a[term], b);
          }
        }
    }
    to += lane / 4 * kDtPitch + lane % 4 * 2;
#pragma unroll
    for (int block = 0; block < kWarp / 8; ++block) {
      float* at = to + block * 8;
      *reinterpret_cast<float2*>(at) = float2{sums[block][0], sums[block][1]};
      *reinterpret_cast<float2*>(at + 8 * kDtPitch) =
          float2{sums[block][2], sums[block][3]};
    }
  }
};

}  // namespace mmvssm
