// How warps share a chunk in the backward pass, and what they have in shared memory.
//
// A warp has 16 channels of all positions: its lane 4 g + c has positions 8 g to 8 g + 7
// of channels 4 c to 4 c + 3. So the matrix product that makes step sizes leaves each
// lane its own, and states and gradients go from team to team by shuffles. A map in shared
// memory has for each of a thread's positions the numbers of all threads. Registers are
// scarce: pointers and what belongs to channels are kept in shared memory, too.
#pragma once

#include "one_state_dt.h"
#include "one_state_exchange.h"

namespace mmvssm {

constexpr int kWarps = kThreads / 32, kWarpChannels = 16;
static_assert(kWidth == 4 && kTeams == 8 && kWarps * kWarpChannels == kChannels,
              "as a warp multiplies matrices");

// What the backward pass has of each scan besides the forward one. There `out` is the
// gradient of u, with ADD what is there is added; `saved` is read; `add` and `last_state`
// are unused.
struct GradientPointers {
  char *delta, *z;          // (batch, channel, place), z may be null
  float2* weights;          // of B and C (block, batch, group, place)
  float *A, *D, *bias;      // (part of the chunks, batch, channel), D and bias may be null
  const float* last_state;  // (batch, channel), or null
};

struct BackwardArgs : Args {
  GradientPointers gradients[kScans];
  const char* grad_out;
  Strides grad_out_strides, grad_delta_strides, grad_z_strides;
  int64_t places;
};
static_assert(sizeof(BackwardArgs) == BACKWARD_ARGS, "as Python has it");

// The threads' shares of a chunk.
MMVSSM_DEVICE Own own_of_warp(const Chain& chain) {
  Own own(chain);
  const int lane = threadIdx.x % 32;
  own.team = lane / 4;
  own.channel = threadIdx.x / 32 * kWarpChannels + lane % 4 * kWidth;
  own.count = chain.count - own.channel;
  return own;
}
// Own channels of float32, of which the next is `stride` bytes on. Where there are none
// something else may be read.
MMVSSM_DEVICE void fetch_channels(const Own& own, const char* from, int64_t stride,
                                  float (&x)[kWidth]) {
  if constexpr (VECTOR) {
    load_channels<kFloat32>(from, x);
  } else {
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      x[c] = c < own.count ? *reinterpret_cast<const float*>(from + c * stride) : 0.0f;
  }
}
// Of kWidth neighbouring channels.
MMVSSM_DEVICE int number_of_quad() {
  return threadIdx.x / 32 * (kWarpChannels / kWidth) + threadIdx.x % (kWarpChannels / kWidth);
}

// With UNIFORM all maps have the same stride from place to place in elements, and few
// enough elements in a batch element: an index is twice that of an element, else a place.
template <int kDtype>
MMVSSM_DEVICE const char* element(const char* row, int index, int64_t stride) {
  if constexpr (UNIFORM) return global_element<kSize<kDtype> / 2>(row, index);
  return global_pointer(row) + index * stride;
}

// What belongs to kWidth neighbouring channels: pointers to rows of maps, A, D, and the
// bias in the log2 domain.
struct alignas(16) Quad {
  const char *u, *grad_out, *delta, *z;
  char *by_u, *by_delta, *by_z;
  // The states before chunk 1, or anything where there is no such chunk; null if there is
  // no such channel.
  const float* saved;
  float rate[kWidth], skip[kWidth];
  float slope[kWidth];           // A ln(2)
  float shift[kWarpTiles][4];  // as the matrix product has them
  float states[kWidth];        // before the chunk
  float carry[kWidth];         // the gradient of the state behind it

  MMVSSM_DEVICE Quad(const BackwardArgs& p, const Chain& chain, int channel) {
    const ScanPointers& scan = p.scans[chain.scan];
    const GradientPointers& gradients = p.gradients[chain.scan];
    // Where there is none, something else may be read.
    const int64_t number = chain.channel + (channel < chain.count ? channel : 0);
    u = p.u + offset(p.u_strides, chain.batch, number);
    grad_out = p.grad_out + offset(p.grad_out_strides, chain.batch, number);
    delta = scan.delta + offset(p.delta_strides, chain.batch, number);
    z = p.z + offset(p.z_strides, chain.batch, number);
    by_u = scan.out + offset(p.out_strides, chain.batch, number);
    by_delta = gradients.delta + offset(p.grad_delta_strides, chain.batch, number);
    by_z = gradients.z + offset(p.grad_z_strides, chain.batch, number);
    const int64_t channels = static_cast<int64_t>(p.groups) * p.group_size;
    saved = nullptr;
    if (channel < chain.count)
      saved = p.chunks > 1 ? scan.saved + chain.batch * (p.chunks - 1) * channels + number
                           : scan.A;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const bool there = channel + c < chain.count;
      const int64_t one = chain.channel + channel + c;
      rate[c] = there ? scan.A[one] : 0.0f;
      slope[c] = rate[c] * kLn2;
      carry[c] = there && gradients.last_state != nullptr
                     ? gradients.last_state[chain.row(p, 0) + channel + c]
                     : 0.0f;
      skip[c] = there && scan.D != nullptr ? scan.D[one] : 0.0f;
      shift[c / 2][c % 2] = shift[c / 2][c % 2 + 2] =
          there && scan.bias != nullptr ? scan.bias[one] * kLog2E : 0.0f;
    }
  }
  static MMVSSM_DEVICE int64_t offset(const Strides& strides, int64_t batch,
                                      int64_t channel) {
    return batch * strides.batch + channel * strides.channel;
  }
};

// What belongs to the positions of a team: B ln(2) and C, and the indices of places of the
// chunk at hand and the next one.
struct alignas(16) Positions {
  float2 weights[kOwn];
  int indices[2][kOwn];
};

// Pointers of all channels of a CTA.
struct ChainRows {
  const char *low_rank, *B, *C;
  float2* weights;     // the gradients of B and C

  MMVSSM_DEVICE ChainRows(const BackwardArgs& p, const Chain& chain) {
    const ScanPointers& scan = p.scans[chain.scan];
    low_rank = scan.delta + chain.batch * p.delta_strides.batch;
    B = scan.B + chain.batch * p.B_strides.batch + chain.group * p.B_strides.channel;
    C = scan.C + chain.batch * p.C_strides.batch + chain.group * p.C_strides.channel;
    const int64_t block = (chain.channel - chain.group * p.group_size) / kChannels;
    weights = p.gradients[chain.scan].weights +
              ((block * p.batch + chain.batch) * p.groups + chain.group) * p.places;
  }
};

constexpr int kPlaceBuffers = 4;

struct WarpLayout {
  template <int kDtype>
  static constexpr int kMap = kPositions * kChannels * kSize<kDtype>;

  static constexpr int kU = 0;
  static constexpr int kGradOut = kU + kMap<U_DTYPE>;
  static constexpr int kDelta = kGradOut + kMap<GRAD_DTYPE>;
  static constexpr int kZ = kDelta + (kProjects ? 0 : kMap<DELTA_DTYPE>);
  static constexpr int kDt = kZ + (GATE ? kMap<U_DTYPE> : 0);
  static constexpr int kLowRank = kDt + kMap<kFloat32>;
  static constexpr int kFragments =
      kLowRank + (kProjects ? kTerms * kPositions * kRankPitch * 2 : 0);
  static constexpr int kQuads =
      kFragments + kWeightTerms * kRankTiles * kChannelTiles * 32 * 8;
  static constexpr int kTeam = kQuads + kChannels / kWidth * sizeof(Quad);
  static constexpr int kChain = kTeam + kTeams * sizeof(Positions);
  static constexpr int kMissing = kChain + 64;  // indices of nothing
  static constexpr int kPlaces = kMissing + kOwn * 4;
  static constexpr int kSums = kPlaces + kPlaceBuffers * kPositions * 4;
  // Sums are kept in shared memory between chunks, unless 16 warps of a multiprocessor
  // would not fit then.
  static constexpr int kOfSums = 3 * kThreads * kWidth * 4;
  static constexpr bool kKeepsSums = kSums + kOfSums <= 228 * 2 * kThreads - 1024;
  static constexpr int kBytes = kSums + (kKeepsSums ? kOfSums : 0);
  static constexpr int kBiasRow = -1;

  // Column 2 c + e of tile 2 w + j is channel 16 w + 4 c + 2 j + e.
  static MMVSSM_DEVICE int channel_of(int tile, int column) {
    return tile / 2 * kWarpChannels + column / 2 * kWidth + tile % 2 * 2 + column % 2;
  }
};
static_assert(WarpLayout::kBytes == SHARED, "as Python has it");
static_assert(sizeof(Quad) == 176 && sizeof(ChainRows) <= 64, "as Python has it");

MMVSSM_DEVICE Quad& quad(char* smem, int number) {
  return reinterpret_cast<Quad*>(smem + WarpLayout::kQuads)[number];
}
MMVSSM_DEVICE Positions& positions(char* smem, int team) {
  return reinterpret_cast<Positions*>(smem + WarpLayout::kTeam)[team];
}
// Places of a chunk, counted from the last one on.
MMVSSM_DEVICE int* places_of(char* smem, int step) {
  return reinterpret_cast<int*>(smem + WarpLayout::kPlaces) +
         (step & kPlaceBuffers - 1) * kPositions;
}

// Own channels at own position i, in a map in shared memory.
template <int kDtype>
MMVSSM_DEVICE char* own_part(char* map, int i) {
  return map + (i * kThreads + threadIdx.x) * kWidth * kSize<kDtype>;
}

// Begins to bring in the states before a chunk, by the first team.
MMVSSM_DEVICE void fetch_states(const Args& p, const Own& own, int chunk, Quad& quad) {
  if (own.team > 0) return;
  constexpr int kAtOnce = VECTOR ? kWidth : 1;
  const bool there = chunk > 0 && quad.saved != nullptr;
  const float* from =
      global_pointer(quad.saved) + static_cast<int64_t>(chunk - 1) * p.groups * p.group_size;
#pragma unroll
  for (int c = 0; c < kWidth; c += kAtOnce)
    copy_async_or_zero<4 * kAtOnce>(quad.states + c, from + c,
                                    there && (VECTOR || c < own.count));
}

// How the lanes of a warp copy rows of a map: each a part of one of kRows rows at a time.
// Row 8 i + g is position i of team g.
template <int kDtype>
struct RowParts {
  static constexpr int kRow = kWarpChannels * kSize<kDtype>;  // bytes
  static constexpr int kParts = COPY > 0 ? kRow / COPY : kWarpChannels / kWidth;
  static constexpr int kRows = 32 / kParts, kCopies = kPositions / kRows;
  static_assert(kRows % kTeams == 0 || kTeams % kRows == 0, "no rest");

  // Worked out where it is needed: between it would take registers.
  static MMVSSM_DEVICE int thread() { return threadIdx.x + fresh_zero(); }
  // The first channel of the part.
  static MMVSSM_DEVICE int channel() {
    return thread() / 32 * kWarpChannels +
           thread() % kParts * (kWarpChannels / kParts);
  }
  static MMVSSM_DEVICE int first_row() { return thread() % 32 / kParts; }

  // The indices of own rows. Below 0 also where there is no such channel.
  static MMVSSM_DEVICE void look_up(char* smem, int buffer, int channels,
                                    int (&indices)[kCopies]) {
    const int* from = positions(smem, first_row() % kTeams).indices[buffer] +
                      first_row() / kTeams;
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      indices[k] = from[k * kRows % kTeams * (sizeof(Positions) / 4) + k * kRows / kTeams];
      if (channel() >= channels) indices[k] = -1;
    }
  }

  // Begins to bring them in. Zeros where there is nothing.
  static MMVSSM_DEVICE void fetch(char* map, const char* from, const Strides& strides,
                                  const int (&indices)[kCopies], int channels) {
    char* to = map + first_row() / kTeams * (kThreads * kRow / 4) +
               first_row() % kTeams * kRow + thread() / 32 * kTeams * kRow +
               thread() % kParts * (kRow / kParts);
    fetch_from<0>(to, from, strides, indices, channels);
  }
  template <int kCopy>
  static MMVSSM_DEVICE void fetch_from(char* to, const char* from, const Strides& strides,
                                       const int (&indices)[kCopies], int channels) {
    if constexpr (kCopy < kCopies) {
      constexpr int kTo = kCopy * kRows / kTeams * (kThreads * kRow / 4) +
                          kCopy * kRows % kTeams * kRow;
      const int index = indices[kCopy];
      const char* source = element<kDtype>(from, index, strides.position);
      if constexpr (COPY > 0) {
        copy_async_or_zero<COPY, kTo>(to, source, index >= 0);
      } else {
        float x[kWidth];
#pragma unroll
        for (int c = 0; c < kWidth; ++c)
          x[c] = index >= 0 && channel() + c < channels
                     ? to_float<kDtype>(load_bits<kDtype>(source + c * strides.channel))
                     : 0.0f;
        store_channels<kDtype>(to + kTo, x);
      }
      fetch_from<kCopy + 1>(to, from, strides, indices, channels);
    }
  }
};

// Pairs of 16-bit numbers of the low-rank form are copied as they are; others have to be
// converted.
constexpr bool kCopiesPairs = kProjects && PAIRS && DELTA_DTYPE != kFloat32;

// Brings in what belongs to positions: indices, B, C, and the low-rank form. A thread has
// one position, or a part of its pairs.
struct PositionSupply {
  static constexpr int kHeld = kProjects && !kCopiesPairs ? Held::kPairs : 0;
  int helper, position;
  int row;    // of the position in the low-rank form, as the matrix product has it
  int place;  // of the position in the chunk that is fetched next

  MMVSSM_DEVICE PositionSupply()
      : helper(threadIdx.x % kHelpers), position(threadIdx.x / kHelpers) {
    row = position % kOwn * kTeams + position / kOwn;
  }

  // Looks up the places of a chunk, counted from the last one on.
  MMVSSM_DEVICE void look_up(const Args& p, const ScanPointers& scan, int step,
                             char* smem) {
    place = -1;
    if (step < p.chunks)
      place = place_of(p, scan, (p.chunks - 1 - step) * kPositions + position);
    if (helper > 0) return;
    places_of(smem, step)[position] = place;
    int index = place;
    if (UNIFORM && place >= 0)
      index *= static_cast<uint32_t>(p.out_strides.position) / (kSize<OUT_DTYPE> / 2);
    positions(smem, position / kOwn).indices[step & 1][position % kOwn] = index;
  }

  // Begins to copy the low-rank form, or to load it as B and C into registers.
  MMVSSM_DEVICE void fetch(const Args& p, const ChainRows& rows, bool more, char* smem,
                           Held& held) const {
    held.B = held.C = 0;
    const bool there = more && place >= 0;
    if (helper == 0 && there) {
      held.B = load_bits<B_DTYPE>(at(rows.B, place, p.B_strides.position));
      held.C = load_bits<B_DTYPE>(at(rows.C, place, p.C_strides.position));
    }
    if constexpr (kProjects) {
      const int64_t next = PAIRS ? kSize<DELTA_DTYPE> : p.delta_strides.channel;
      const char* from =
          at(rows.low_rank, place, p.delta_strides.position) + 2 * helper * next;
      fetch_pairs<0>(from, next, own_pair(smem, helper), there, held);
      copy_commit();
    }
  }
  template <int kNumber>
  MMVSSM_DEVICE void fetch_pairs(const char* from, int64_t next, uint32_t* to, bool there,
                                 Held& held) const {
    if constexpr (kNumber < Held::kPairs) {
      constexpr int kPair = kNumber * kHelpers;
      const bool is_one = kPair + kHelpers <= kRankPairs || helper + kPair < kRankPairs;
      held.low[kNumber] = held.high[kNumber] = 0;
      if constexpr (kCopiesPairs) {
        if (is_one) copy_async_or_zero<4, 4 * kPair, 4 * kPair>(to, from, there);
      } else if (is_one && there) {
        load_pair(from + 2 * kPair * next, next, helper + kPair, held.low[kNumber],
                  held.high[kNumber]);
      }
      fetch_pairs<kNumber + 1>(from, next, to, there, held);
    }
  }
  static MMVSSM_DEVICE void load_pair(const char* from, int64_t next, int pair,
                                      uint32_t& first, uint32_t& second) {
    if constexpr (PAIRS) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      first = two.x, second = two.y;
    } else {
      first = load_bits<DELTA_DTYPE>(from);
      if (2 * pair + 1 < RANK) second = load_bits<DELTA_DTYPE>(from + next);
    }
  }

  // Puts what is in registers into shared memory. B gets the ln(2) that dt has too much.
  MMVSSM_DEVICE void put(char* smem, const Held& held) const {
    if (helper == 0)
      positions(smem, position / kOwn).weights[position % kOwn] =
          float2{to_float<B_DTYPE>(held.B) * kLn2, to_float<B_DTYPE>(held.C)};
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (helper + i * kHelpers < kRankPairs)
        put_pair(smem, helper + i * kHelpers, held.low[i], held.high[i]);
  }
  MMVSSM_DEVICE uint32_t* own_pair(char* smem, int pair) const {
    return reinterpret_cast<uint32_t*>(smem + WarpLayout::kLowRank) +
           row * (kRankPitch / 2) + pair;
  }
  // Zeros where the rank is filled up.
  MMVSSM_DEVICE void pad(char* smem) const {
#pragma unroll 1
    for (int pair = helper; pair < 8 * kRankTiles; pair += kHelpers)
      if (pair >= kRankPairs) put_pair(smem, pair, 0, 0);
  }
  MMVSSM_DEVICE void put_pair(char* smem, int pair, uint32_t first,
                              uint32_t second) const {
    uint32_t terms[kTerms];
    if constexpr (DELTA_DTYPE == kFloat32)
      split(float_of(first), float_of(second), terms);
    else
      terms[0] = first | second << 16;
    uint32_t* to = own_pair(smem, pair);
#pragma unroll
    for (int i = 0; i < kTerms; ++i) to[i * kPositions * (kRankPitch / 2)] = terms[i];
  }
};

}  // namespace mmvssm
