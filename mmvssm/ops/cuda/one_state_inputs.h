// What a CTA has in shared memory, and how the inputs of a chunk get there.
//
// Rows of u, delta and z are copied asynchronously into one of two buffers while the
// other one is worked on. What is small, or has to be converted, goes through registers.
#pragma once

#include "one_state_terms.h"

namespace mmvssm {

// A row of an array is a position, padded against conflicts of banks where threads of a
// warp write different rows.
template <int kDtype>
constexpr int kPitch = (kChannels + (COPY ? 0 : kWidth)) * kSize<kDtype>;
template <int kDtype>
constexpr int kRowsBytes = kPitch<kDtype> * kPositions;

constexpr int kRankPitch = 16 * kRankTiles + 8;
constexpr int kRankPairs = (RANK + 1) / 2;
constexpr int kDtPitch = kChannels + 8;

struct Layout {
  static constexpr int kU = 0;
  static constexpr int kDelta = kU + 2 * kRowsBytes<U_DTYPE>;
  static constexpr int kZ = kDelta + (kProjects ? 0 : 2 * kRowsBytes<DELTA_DTYPE>);
  static constexpr int kPlaces = kZ + (GATE ? 2 * kRowsBytes<U_DTYPE> : 0);
  static constexpr int kWeights = kPlaces + 2 * kPositions * 4;  // B and C
  static constexpr int kCarry = kWeights + 2 * kPositions * 8;
  static constexpr int kParameters = kCarry + 2 * kChannels * 4;
  static constexpr int kLowRank = kParameters + 3 * kChannels * 4;
  static constexpr int kFragments =
      kLowRank + (kProjects ? kTerms * kPositions * kRankPitch * 2 : 0);
  // Step sizes before the softplus; and then, where they have been read, the steps of
  // the teams, and what is to be added to the outputs.
  static constexpr int kDt =
      kFragments + kWeightTerms * kRankTiles * kChannelTiles * 32 * 8;
  static constexpr int kDtRows = kProjects || ADD ? kOwn : 2;  // of a team

  static constexpr int kBytes = kDt + kTeams * kDtRows * kDtPitch * 4;

  static constexpr int kBiasRow = -1;
  // The channel of a column of the matrix of weights, in tiles of 8 columns.
  static MMVSSM_DEVICE int channel_of(int tile, int column) { return 8 * tile + column; }
};

// CTAs that a multiprocessor is to hold, which bounds registers: 16 warps, unless there
// is not enough shared memory for them.
constexpr int kFit = 227 * 1024 / (SHARED + 1024), kWanted = 512 / kThreads;
constexpr int kCtas = kFit < kWanted ? kFit : kWanted;

// What belongs to a channel: kept in shared memory to save registers.
enum Parameter { kRate, kSkip, kShift };

// A, D, and the bias in the log2 domain.
template <typename Memory>
MMVSSM_DEVICE void put_parameters(const ScanPointers& scan, const Chain& chain,
                                  char* smem) {
  float* to = reinterpret_cast<float*>(smem + Memory::kParameters);
#pragma unroll 1
  for (int c = threadIdx.x; c < kChannels; c += kThreads) {
    const bool there = c < chain.count;
    const int channel = chain.channel + c;
    to[kRate * kChannels + c] = there ? scan.A[channel] : 0.0f;
    to[kSkip * kChannels + c] = there && scan.D != nullptr ? scan.D[channel] : 0.0f;
    to[kShift * kChannels + c] =
        there && scan.bias != nullptr ? scan.bias[channel] * kLog2E : 0.0f;
  }
}
template <typename Memory>
MMVSSM_DEVICE void get_parameter(const char* smem, Parameter which, const Own& own,
                                 float (&x)[kWidth]) {
  load_channels<kFloat32>(
      smem + Memory::kParameters + (which * kChannels + own.channel) * 4, x);
}

// The part of one thread in bringing in rows of an array (batch, channel, place).
template <int kDtype>
struct RowCopy {
  const char* from;
  int to, left;  // offset in a buffer; bytes, or channels one by one, that are there

  MMVSSM_DEVICE RowCopy(const char* data, const Strides& strides, const Chain& chain,
                        int position, int helper) {
    from = data + chain.batch * strides.batch + chain.channel * strides.channel;
    to = position * kPitch<kDtype>;
    if constexpr (COPY > 0) {
      from += helper * COPY;
      to += helper * COPY;
      left = chain.count * kSize<kDtype> - helper * COPY;
    } else {
      from += helper * strides.channel;
      to += helper * kSize<kDtype>;
      left = chain.count - helper;
    }
  }

  // Zeros where there is no such place or channel.
  MMVSSM_DEVICE void copy(char* buffer, const Strides& strides, int place) const {
    const char* row = at(from, place, strides.position);
    if constexpr (COPY > 0) {
      constexpr int kStep = kHelpers * COPY;
      constexpr int kPieces = kChannels * kSize<kDtype> / kStep;
      const int there = place >= 0 ? left : 0;
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        copy_async_or_zero<COPY>(buffer + to + i * kStep, row + i * kStep,
                                 i * kStep < there);
    } else {
#pragma unroll 8
      for (int i = 0; i < kChannels / kHelpers; ++i) {
        float x = 0.0f;
        if (place >= 0 && i * kHelpers < left)
          x = to_float<kDtype>(load_bits<kDtype>(row + i * kHelpers * strides.channel));
        store_one<kDtype>(buffer + to + i * kHelpers * kSize<kDtype>, x);
      }
    }
  }
};

// What one thread holds of the next chunk until it is its turn: pairs of the low-rank
// form, and B and C of a position.
struct Held {
  static constexpr int kPairs = (kRankPairs + kHelpers - 1) / kHelpers;
  uint32_t low[kProjects ? kPairs : 1], high[kProjects ? kPairs : 1];
  uint32_t B, C;
};

// Brings in the inputs of a chunk: this thread those of one position, or a part of them.
struct Supply {
  int position, helper;
  int place;  // of the position in the chunk that is next to be fetched
  RowCopy<U_DTYPE> u;
  RowCopy<kProjects ? kFloat32 : DELTA_DTYPE> delta;
  RowCopy<U_DTYPE> z;
  const char *low_rank, *B, *C;
  const ScanPointers& scan;

  // Neighbouring threads have parts of a position, or copying one by one, positions.
  MMVSSM_DEVICE Supply(const Args& p, const Chain& chain)
      : position(COPY > 0 ? threadIdx.x / kHelpers : threadIdx.x % kPositions),
        helper(COPY > 0 ? threadIdx.x % kHelpers : threadIdx.x / kPositions),
        u(p.u, p.u_strides, chain, position, helper),
        delta(p.scans[chain.scan].delta, p.delta_strides, chain, position, helper),
        z(p.z, p.z_strides, chain, position, helper),
        scan(p.scans[chain.scan]) {
    low_rank = scan.delta + chain.batch * p.delta_strides.batch +
               2 * helper * p.delta_strides.channel;
    B = scan.B + chain.batch * p.B_strides.batch + chain.group * p.B_strides.channel;
    C = scan.C + chain.batch * p.C_strides.batch + chain.group * p.C_strides.channel;
    place = place_of(p, scan, chain.begin * kPositions + position);
  }

  // Begins to bring in a chunk, into one of the buffers. It says what comes then, too.
  MMVSSM_DEVICE void fetch(const Args& p, char* smem, int chunk, int buffer,
                           Held& held) {
    u.copy(smem + Layout::kU + buffer * kRowsBytes<U_DTYPE>, p.u_strides, place);
    if constexpr (!kProjects)
      delta.copy(smem + Layout::kDelta + buffer * kRowsBytes<DELTA_DTYPE>,
                 p.delta_strides, place);
    if constexpr (GATE)
      z.copy(smem + Layout::kZ + buffer * kRowsBytes<U_DTYPE>, p.z_strides, place);
    copy_commit();
    if constexpr (kProjects) fetch_low_rank(p, held);
    if (helper == 0)
      reinterpret_cast<int*>(smem + Layout::kPlaces)[buffer * kPositions + position] =
          place;
    held.B = held.C = 0;
    if (helper == 0 && place >= 0) {
      held.B = load_bits<B_DTYPE>(at(B, place, p.B_strides.position));
      held.C = load_bits<B_DTYPE>(at(C, place, p.C_strides.position));
    }
    place = place_of(p, scan, (chunk + 1) * kPositions + position);
  }

  MMVSSM_DEVICE void fetch_low_rank(const Args& p, Held& held) const {
    const char* row = at(low_rank, place, p.delta_strides.position);
    const int64_t next = PAIRS ? kSize<DELTA_DTYPE> : p.delta_strides.channel;
#pragma unroll
    for (int i = 0; i < Held::kPairs; ++i) {
      held.low[i] = held.high[i] = 0;
      const int pair = helper + i * kHelpers;
      if (place < 0 || pair >= kRankPairs) continue;
      const char* from = row + 2 * i * kHelpers * next;
      if constexpr (!PAIRS) {
        held.low[i] = load_bits<DELTA_DTYPE>(from);
        if (2 * pair + 1 < RANK) held.high[i] = load_bits<DELTA_DTYPE>(from + next);
      } else if constexpr (DELTA_DTYPE == kFloat32) {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        held.low[i] = two.x, held.high[i] = two.y;
      } else {
        held.low[i] = *reinterpret_cast<const uint32_t*>(from);
      }
    }
  }

  // Puts what is held into shared memory. B gets the ln(2) that dt has too much.
  MMVSSM_DEVICE void put(char* smem, int buffer, const Held& held) const {
    if constexpr (kProjects) {
#pragma unroll
      for (int i = 0; i < Held::kPairs; ++i)
        if (helper + i * kHelpers < kRankPairs)
          put_pair(smem, helper + i * kHelpers, held.low[i], held.high[i]);
    }
    if (helper == 0) {
      float* weights = reinterpret_cast<float*>(smem + Layout::kWeights) +
                       buffer * 2 * kPositions + position;
      weights[0] = to_float<B_DTYPE>(held.B) * kLn2;
      weights[kPositions] = to_float<B_DTYPE>(held.C);
    }
  }

  MMVSSM_DEVICE void put_pair(char* smem, int pair, uint32_t low, uint32_t high) const {
    uint32_t terms[kTerms];
    if constexpr (DELTA_DTYPE == kFloat32)
      split(float_of(low), float_of(high), terms);
    else
      terms[0] = PAIRS ? low : low | high << 16;
    uint32_t* to = reinterpret_cast<uint32_t*>(smem + Layout::kLowRank) +
                   position * (kRankPitch / 2) + pair;
#pragma unroll
    for (int i = 0; i < kTerms; ++i) to[i * kPositions * (kRankPitch / 2)] = terms[i];
  }

  // Zeros where the rank is filled up.
  MMVSSM_DEVICE void pad_low_rank(char* smem) const {
#pragma unroll 1
    for (int pair = helper; pair < 8 * kRankTiles; pair += kHelpers)
      if (pair >= kRankPairs) put_pair(smem, pair, 0, 0);
  }
};

}  // namespace mmvssm
