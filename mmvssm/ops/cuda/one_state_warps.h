// How warps share a chunk in the backward pass, and what they have in shared memory.
//
// A warp has 16 channels of all positions: its lane 4 g + c has positions 8 g to 8 g + 7
// of channels 4 c to 4 c + 3. So the matrix product that makes step sizes leaves each
// lane its own, and states and gradients go from team to team by shuffles. In shared
// memory row 8 i + g is position 8 g + i: lanes that are at the same of their positions
// read neighbouring rows. Rows of maps have the 16 channels of a warp, one warp after the
// other. Registers are scarce: pointers are kept in shared memory, too.
#pragma once

#include "one_state_dt.h"
#include "one_state_exchange.h"

namespace mmvssm {

constexpr int kWarps = kThreads / 32, kWarpChannels = 16;
static_assert(kWidth == 4 && kTeams == 8 && kWarps * kWarpChannels == kChannels,
              "as a warp multiplies matrices");

// What the backward pass has of each scan besides the forward one. There `out` is the
// gradient of u, `saved` is read, and `last_state` unused.
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
// Own channels of float32, where there are any, of which the next is `stride` bytes on.
MMVSSM_DEVICE void fetch_channels(const Own& own, const char* from, int64_t stride,
                                  float (&x)[kWidth]) {
  if constexpr (VECTOR) {
    if (own.count > 0) load_channels<kFloat32>(from, x);
  } else {
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      if (c < own.count) x[c] = *reinterpret_cast<const float*>(from + c * stride);
  }
}
MMVSSM_DEVICE int row_of(int position) {
  return position % kOwn * kTeams + position / kOwn;
}

// With UNIFORM all maps have the same stride from place to place in elements, and few
// enough elements in a batch element: an index is that of an element, else of a place.
template <int kDtype>
MMVSSM_DEVICE const char* element(const char* row, int index, int64_t stride) {
  if constexpr (UNIFORM) return global_element<kSize<kDtype>>(row, index);
  return global_pointer(row) + index * stride;
}

// Pointers to channels of the rows of maps.
struct MapRows {
  const char *u, *grad_out, *delta, *z, *add;
  char *by_u, *by_delta, *by_z;

  MMVSSM_DEVICE MapRows(const BackwardArgs& p, const Chain& chain, int channel) {
    const ScanPointers& scan = p.scans[chain.scan];
    const GradientPointers& gradients = p.gradients[chain.scan];
    const int64_t number = chain.channel + channel;
    u = p.u + offset(p.u_strides, chain.batch, number);
    grad_out = p.grad_out + offset(p.grad_out_strides, chain.batch, number);
    delta = scan.delta + offset(p.delta_strides, chain.batch, number);
    z = p.z + offset(p.z_strides, chain.batch, number);
    add = reinterpret_cast<const char*>(scan.add) +
          offset(p.add_strides, chain.batch, number);
    by_u = scan.out + offset(p.out_strides, chain.batch, number);
    by_delta = gradients.delta + offset(p.grad_delta_strides, chain.batch, number);
    by_z = gradients.z + offset(p.grad_z_strides, chain.batch, number);
  }
  static MMVSSM_DEVICE int64_t offset(const Strides& strides, int64_t batch,
                                      int64_t channel) {
    return batch * strides.batch + channel * strides.channel;
  }
};

// Pointers of all channels of a CTA.
struct ChainRows {
  const char *low_rank, *B, *C;
  const float* saved;  // of the first channel; the states before chunk 1
  float2* weights;     // the gradients of B and C

  MMVSSM_DEVICE ChainRows(const BackwardArgs& p, const Chain& chain) {
    const ScanPointers& scan = p.scans[chain.scan];
    low_rank = scan.delta + chain.batch * p.delta_strides.batch;
    B = scan.B + chain.batch * p.B_strides.batch + chain.group * p.B_strides.channel;
    C = scan.C + chain.batch * p.C_strides.batch + chain.group * p.C_strides.channel;
    const int64_t channels = static_cast<int64_t>(p.groups) * p.group_size;
    saved = scan.saved + chain.batch * (p.chunks - 1) * channels + chain.channel;
    const int64_t block = (chain.channel - chain.group * p.group_size) / kChannels;
    weights = p.gradients[chain.scan].weights +
              ((block * p.batch + chain.batch) * p.groups + chain.group) * p.places;
  }
};

constexpr int kIndexBuffers = 2, kPlaceBuffers = 4;

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
  static constexpr int kParameters =
      kFragments + kWeightTerms * kRankTiles * kChannelTiles * 32 * 8;
  static constexpr int kRows = kParameters + 3 * kChannels * 4;  // MapRows of kWidth channels
  static constexpr int kChain = kRows + kChannels / kWidth * 64;  // ChainRows
  static constexpr int kWeights = kChain + 64;                    // B and C
  static constexpr int kIndices = kWeights + kPositions * 8;
  static constexpr int kPlaces = kIndices + kIndexBuffers * kPositions * 4;
  static constexpr int kBytes = kPlaces + kPlaceBuffers * kPositions * 4;
  static constexpr int kBiasRow = -1;

  // Column 2 c + e of tile 2 w + j is channel 16 w + 4 c + 2 j + e.
  static MMVSSM_DEVICE int channel_of(int tile, int column) {
    return tile / 2 * kWarpChannels + column / 2 * kWidth + tile % 2 * 2 + column % 2;
  }
};
static_assert(WarpLayout::kBytes == SHARED, "as Python has it");
static_assert(sizeof(MapRows) == 64 && sizeof(ChainRows) <= 64, "there is room");

// Of positions of a chunk, counted from the last chunk on.
MMVSSM_DEVICE int* indices_of(char* smem, int step) {
  return reinterpret_cast<int*>(smem + WarpLayout::kIndices) +
         step % kIndexBuffers * kPositions;
}
MMVSSM_DEVICE int* places_of(char* smem, int step) {
  return reinterpret_cast<int*>(smem + WarpLayout::kPlaces) +
         step % kPlaceBuffers * kPositions;
}

// Own channels at own position i, in a map in shared memory.
template <int kDtype>
MMVSSM_DEVICE char* own_part(char* map, int i) {
  const int first = threadIdx.x / 32 * kPositions * kWarpChannels +
                    threadIdx.x % 32 * kWidth;
  return map + first * kSize<kDtype> + i * 32 * kWidth * kSize<kDtype>;
}

// A warp's rows of a map, copied by its lanes, each a part of a row.
template <int kDtype>
struct WarpRows {
  static constexpr int kBytes = kWarpChannels * kSize<kDtype>;  // of a row
  static constexpr int kParts = COPY > 0 ? kBytes / COPY : kWarpChannels / kWidth;
  static constexpr int kRowsAtOnce = 32 / kParts;

  // The first channel of the part.
  static MMVSSM_DEVICE int channel() {
    return threadIdx.x / 32 * kWarpChannels +
           threadIdx.x % kParts * (kWarpChannels / kParts);
  }

  // The indices of rows that this lane copies, of a half of the chunk: 0 or 1, of the
  // earlier or later four of each thread's positions. Below 0 also where there is no
  // such channel.
  static MMVSSM_DEVICE void look_up(int half, int channels, const int* indices,
                                    int (&own)[kParts]) {
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      own[k] = indices[(half * kParts + k) * kRowsAtOnce + threadIdx.x % 32 / kParts];
      if (channel() >= channels) own[k] = -1;
    }
  }

  // Begins to bring them in. Zeros where there is nothing.
  static MMVSSM_DEVICE void fetch(char* map, int half, const char* from,
                                  const Strides& strides, const int (&indices)[kParts],
                                  int channels) {
    char* to = map + threadIdx.x / 32 * kPositions * kBytes +
               threadIdx.x % 32 * (kBytes / kParts) + half * 32 * kBytes;
#pragma unroll
    for (int k = 0; k < kParts; ++k, to += kRowsAtOnce * kBytes) {
      const char* source = element<kDtype>(from, indices[k], strides.position);
      if constexpr (COPY > 0) {
        // Wide copies may begin between the pointers that are kept.
        copy_async_or_zero<COPY>(to, source, indices[k] >= 0);
      } else {
        float x[kWidth];
#pragma unroll
        for (int c = 0; c < kWidth; ++c)
          x[c] = indices[k] >= 0 && channel() + c < channels
                     ? to_float<kDtype>(load_bits<kDtype>(source + c * strides.channel))
                     : 0.0f;
        store_channels<kDtype>(to, x);
      }
    }
  }
};

// Brings in what belongs to positions: indices, B, C, and the low-rank form. A thread has
// one position, or a part of its pairs.
struct PositionSupply {
  int row, helper, position;
  int place;  // of the position in the chunk that is fetched next
  uint32_t low[kProjects ? Held::kPairs : 1], high[kProjects ? Held::kPairs : 1];
  uint32_t B, C;

  MMVSSM_DEVICE PositionSupply()
      : helper(threadIdx.x % kHelpers), position(threadIdx.x / kHelpers) {
    row = row_of(position);
  }

  // Looks up the places of a chunk, counted from the last one on.
  MMVSSM_DEVICE void look_up(const Args& p, const ScanPointers& scan, int step,
                             char* smem) {
    place = -1;
    if (step < p.chunks)
      place = place_of(p, scan, (p.chunks - 1 - step) * kPositions + position);
    if (helper > 0) return;
    places_of(smem, step)[row] = place;
    int index = place;
    if (UNIFORM && place >= 0)
      index *= static_cast<uint32_t>(p.out_strides.position) / kSize<OUT_DTYPE>;
    indices_of(smem, step)[row] = index;
  }

  MMVSSM_DEVICE void fetch(const Args& p, const ChainRows& rows) {
    B = C = 0;
    if (helper == 0 && place >= 0) {
      B = load_bits<B_DTYPE>(at(rows.B, place, p.B_strides.position));
      C = load_bits<B_DTYPE>(at(rows.C, place, p.C_strides.position));
    }
    if constexpr (!kProjects) return;
    const int64_t next = PAIRS ? kSize<DELTA_DTYPE> : p.delta_strides.channel;
    const char* from = at(rows.low_rank, place, p.delta_strides.position) +
                       2 * helper * next;
#pragma unroll
    for (int i = 0; i < Held::kPairs; ++i, from += 2 * kHelpers * next) {
      low[i] = high[i] = 0;
      const int pair = helper + i * kHelpers;
      if (place < 0 || pair >= kRankPairs) continue;
      if constexpr (!PAIRS) {
        low[i] = load_bits<DELTA_DTYPE>(from);
        if (2 * pair + 1 < RANK) high[i] = load_bits<DELTA_DTYPE>(from + next);
      } else if constexpr (DELTA_DTYPE == kFloat32) {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        low[i] = two.x, high[i] = two.y;
      } else {
        low[i] = *reinterpret_cast<const uint32_t*>(from);
      }
    }
  }

  // Puts what was fetched into shared memory. B gets the ln(2) that dt has too much.
  MMVSSM_DEVICE void put(char* smem) const {
    if (helper == 0)
      reinterpret_cast<float2*>(smem + WarpLayout::kWeights)[row] =
          float2{to_float<B_DTYPE>(B) * kLn2, to_float<B_DTYPE>(C)};
    if constexpr (!kProjects) return;
#pragma unroll
    for (int i = 0; i < Held::kPairs; ++i)
      if (helper + i * kHelpers < kRankPairs)
        put_pair(smem, helper + i * kHelpers, low[i], high[i]);
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
      terms[0] = PAIRS ? first : first | second << 16;
    uint32_t* to = reinterpret_cast<uint32_t*>(smem + WarpLayout::kLowRank) +
                   row * (kRankPitch / 2) + pair;
#pragma unroll
    for (int i = 0; i < kTerms; ++i) to[i * kPositions * (kRankPitch / 2)] = terms[i];
  }
};

}  // namespace mmvssm
