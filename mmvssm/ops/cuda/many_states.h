// What the kernels of the selective scan of several states share.
//
// A CTA has one thread for each channel of its block and walks the positions in chunks.
// kLanes neighbouring lanes share kLanes channels, the own ones of these lanes, and each
// has STATES / kLanes states of all of them. Registers have channels by number, see
// `lane_of`.
//
// dt is kept times log2(e), as the hardware has powers of two, and B times ln(2), or in
// the backward pass u.
#pragma once

#include "device.h"

namespace mmvssm {

constexpr int kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2;
constexpr int kWarp = 32;
constexpr int kThreads = THREADS, kStates = STATES, kRank = RANK;
constexpr int kPositions = POSITIONS;  // of a chunk
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLargest = 3.4028234663852886e38f;
static_assert(CHANNELS == THREADS && THREADS % kWarp == 0, "a thread for a channel");
static_assert(kPositions == 16, "rows of a product on tensor cores");

template <int kDtype>
constexpr int kSize = kDtype == kFloat32 ? 4 : 2;

// An array (batch, channel, place), or with the rank for channels; strides in bytes.
struct Rows {
  char* data;
  int64_t batch, channel, place;
};
// B or C (batch, group, state, place), likewise.
struct Weights {
  const char* data;
  int64_t batch, group, state, place;
};

// What forward and backward pass read; null for what is not there. Plain pointers are
// contiguous float32. The `places` of the map, with rows of `width`, lie in memory in
// the order of the image; an order says which of them each of `length` positions is:
// route 0 row by row, 1 column by column, 2 and 3 the same from the end, or a table,
// in which -1 is a padded place: there everything is zero and nothing is stored.
struct Inputs {
  int32_t batch, groups, group_size;  // channels are groups * group_size
  int32_t length, places, width, route;
  int32_t states, rank;
  int32_t blocks;  // of the channels of a group
  int32_t chains;  // batch * groups * blocks
  int32_t splits, chunks_of_split;
  int32_t along;         // neighbouring places are next to each other, not channels
  int32_t states_along;  // so are they in B and C
  const int32_t* order;  // (length), null for a route
  Rows u, z;
  Rows delta;  // or with a rank, its low-rank form
  Weights B, C;
  const float* dt_weight;  // (channel, rank)
  const float *A, *D, *bias;
  uint64_t* published;  // see splits.h
};

// Numbers in memory

template <int kDtype>
MMVSSM_DEVICE float load_float(const char* from) {
  if constexpr (kDtype == kFloat32) return *reinterpret_cast<const float*>(from);
  const uint32_t bits = *reinterpret_cast<const uint16_t*>(from);
  if constexpr (kDtype == kBfloat16) return float_of(bits << 16);
  return from_half(bits);
}
template <int kDtype>
MMVSSM_DEVICE void store_float(char* to, float x) {
  if constexpr (kDtype == kFloat32)
    *reinterpret_cast<float*>(to) = x;
  else
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(
        kDtype == kBfloat16 ? to_bfloat16x2(x, 0.0f) : to_half2(x, 0.0f));
}

// kCount neighbouring floats, aligned as a whole or to 16 bytes.
template <int kCount>
MMVSSM_DEVICE void load_floats(const float* from, float (&x)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  } else if constexpr (kCount == 2) {
    const float2 two = *reinterpret_cast<const float2*>(from);
    x[0] = two.x, x[1] = two.y;
  } else {
    static_assert(kCount == 1, "a power of two");
    x[0] = *from;
  }
}
template <int kCount>
MMVSSM_DEVICE void store_floats(float* to, const float (&x)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4)
      *reinterpret_cast<float4*>(to + i) = float4{x[i], x[i + 1], x[i + 2], x[i + 3]};
  } else if constexpr (kCount == 2) {
    *reinterpret_cast<float2*>(to) = float2{x[0], x[1]};
  } else {
    *to = x[0];
  }
}

// The same in global memory, unless not `valid`.
template <int kCount>
MMVSSM_DEVICE void store_global(float* to, bool valid, const float (&x)[kCount]) {
  constexpr int kPiece = kCount < 4 ? kCount : 4;
#pragma unroll
  for (int i = 0; i < kCount; i += kPiece) {
    uint32_t words[kPiece];
#pragma unroll
    for (int k = 0; k < kPiece; ++k) words[k] = bits_of(x[i + k]);
    store_bytes<4 * kPiece>(to + i, valid, words);
  }
}

// Functions

// log2(1 + exp(x ln 2)), accurate in relative terms for any x. The larger part is
// max(x, 0). The other is log2(1 + e), e = 2^-abs(x), as 2 artanh(s) log2(e),
// s = e / (2 + e) <= 1/3, by a polynomial (4e-9, fitted at the Chebyshev nodes).
MMVSSM_DEVICE float softplus_of_log2(float x, float e) {
  const float s = e * rcp_fast(2.0f + e);
  const float q = s * s;
  float p = 0.28157778f * kLog2E;
  p = p * q + 0.27965158f * kLog2E;
  p = p * q + 0.40024595f * kLog2E;
  p = p * q + 0.66666324f * kLog2E;
  p = p * q + 2.0f * kLog2E;
  return fmaxf(x, 0.0f) + s * p;
}

MMVSSM_DEVICE float minus_infinity() { return float_of(0xff800000u); }

// The sigmoid of x ln(2), and of x, over `inverse`.
MMVSSM_DEVICE float sigmoid_of_log2(float x, float inverse) {
  return rcp_fast(exp2_fast(-x) * inverse + inverse);
}
MMVSSM_DEVICE float sigmoid(float x, float inverse) {
  return sigmoid_of_log2(kLog2E * x, inverse);
}

// The lane whose own channel has a number. Two lanes exchange by shuffles, and name a
// channel by how lanes differ: number 0 is the own one, and nothing is chosen by the
// number of the lane. Four exchange through shared memory, and name them in order.
template <int kLanes>
MMVSSM_DEVICE int lane_of(int lane, int k) {
  return kLanes == 2 ? lane ^ k : lane / kLanes * kLanes + k;
}

// What the lanes that share channels have each for its own one, by number.
template <int kLanes>
MMVSSM_DEVICE void spread(float own, float (&x)[kLanes]) {
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
    x[k] = kLanes > 2 ? shuffle(own, k, kLanes) : k ? shuffle_xor(own, k) : own;
}
// The sum of what all that share a channel have for the lane's own one.
template <int kLanes>
MMVSSM_DEVICE float gather(const float (&x)[kLanes]) {
  if constexpr (kLanes == 2) {
    return x[0] + shuffle_xor(x[1], 1);
  } else {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const float one = shuffle(x[k], i, kLanes);
        if (static_cast<int>(threadIdx.x) % kLanes == k) sum += one;
      }
    return sum;
  }
}

// What a CTA, a warp and a lane work on

struct Work {
  int batch, group, block, split;
  int chain;              // numbers batch, group and block
  int warp, lane;
  int first, end;         // channels of the warp; the end is that of the group
  int own;                // the lane's channel
  bool valid;             // whether there is such a channel
  int begin_chunk, end_chunk;

  // A CTA has a higher number than those of its chain's splits that come `before` it.
  MMVSSM_DEVICE Work(const Inputs& p, bool from_end) {
    chain = blockIdx.x % p.chains;
    split = blockIdx.x / p.chains;
    if (from_end) split = p.splits - 1 - split;
    block = chain % p.blocks;
    group = chain / p.blocks % p.groups;
    batch = chain / p.blocks / p.groups;
    warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    end = (group + 1) * p.group_size;
    first = group * p.group_size + block * kThreads + warp * kWarp;
    own = first + lane;
    valid = own < end;
    const int chunks = (p.length + kPositions - 1) / kPositions;
    begin_chunk = split * p.chunks_of_split;
    end_chunk = begin_chunk + p.chunks_of_split;
    if (end_chunk > chunks) end_chunk = chunks;
  }

  MMVSSM_DEVICE float parameter(const float* x, int channel) const {
    return x != nullptr && channel < end ? x[channel] : 0.0f;
  }
  MMVSSM_DEVICE float parameter(const float* x) const { return parameter(x, own); }
  // Of all channels that the lane shares.
  template <int kLanes>
  MMVSSM_DEVICE void parameters(const float* x, float (&found)[kLanes]) const {
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      found[k] = parameter(x, first + lane_of<kLanes>(lane, k));
  }
  template <int kLanes>
  MMVSSM_DEVICE bool is_valid(int k) const {
    return first + lane_of<kLanes>(lane, k) < end;
  }
};

// The states of a thread, by channel.
template <int kLanes>
using States = float[kLanes][kStates / kLanes];

// The place in memory of the thread's states of a channel, in an array (batch, channel,
// `states`) of float32.
template <int kLanes>
MMVSSM_DEVICE int64_t offset_of_states(const Inputs& p, const Work& work, int k,
                                       int states) {
  const int64_t channels = static_cast<int64_t>(p.groups) * p.group_size;
  const int64_t row = work.batch * channels + work.first + lane_of<kLanes>(work.lane, k);
  return row * states + work.lane % kLanes * (kStates / kLanes);
}

// From or to an array of as many states as there are; those that fill up are zero.
template <int kLanes>
MMVSSM_DEVICE void load_states(const Inputs& p, const Work& work, const float* from,
                               States<kLanes>& x) {
  constexpr int kOwn = kStates / kLanes;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    const float* row = from + offset_of_states<kLanes>(p, work, k, p.states);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      x[k][i] = work.is_valid<kLanes>(k) && work.lane % kLanes * kOwn + i < p.states
                    ? row[i]
                    : 0.0f;
  }
}
template <int kLanes>
MMVSSM_DEVICE void store_states(const Inputs& p, const Work& work, float* to,
                                const States<kLanes>& x) {
  constexpr int kOwn = kStates / kLanes;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    float* row = to + offset_of_states<kLanes>(p, work, k, p.states);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (work.is_valid<kLanes>(k) && work.lane % kLanes * kOwn + i < p.states)
        row[i] = x[k][i];
  }
}
// A: of every channel, whatever the batch.
template <int kLanes>
MMVSSM_DEVICE void load_rates(const Inputs& p, const Work& work, States<kLanes>& x) {
  Work first = work;
  first.batch = 0;
  load_states<kLanes>(p, first, p.A, x);
}

// The states before every KEPT-th position but the first, kept for the backward pass:
// (number, batch, channel, STATES), those that fill up as well.
constexpr int kKept = KEPT;
static_assert(kPositions % kKept == 0, "whole parts of a chunk");

template <int kLanes>
struct KeptStates {
  float* data;  // before position 0, of the first of the thread's channels
  int64_t stride;
  int offsets[kLanes];
  bool valid[kLanes];

  MMVSSM_DEVICE KeptStates(const Inputs& p, const Work& work, float* kept)
      : stride(static_cast<int64_t>(p.batch) * p.groups * p.group_size * kStates) {
    const int64_t channels = static_cast<int64_t>(p.groups) * p.group_size;
    const int64_t row =
        work.batch * channels + work.first + work.lane / kLanes * kLanes;
    data = kept + row * kStates - stride;
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      offsets[k] = lane_of<kLanes>(work.lane, k) % kLanes * kStates +
                   work.lane % kLanes * (kStates / kLanes);
      // Vectors hold channels of one group.
      valid[k] = work.is_valid<kLanes>(VECTOR ? 0 : k);
    }
  }

  MMVSSM_DEVICE float* at(int t, int k) const {
    return data + t / kKept * stride + offsets[k];
  }
};

// Positions of a chunk that there are.
MMVSSM_DEVICE int count_of(const Inputs& p, int chunk) {
  const int left = p.length - chunk * kPositions;
  return left < kPositions ? left : kPositions;
}

// The place of position t, below 0 if there is none.
MMVSSM_DEVICE int place_of(const Inputs& p, int t) {
  if (t < 0 || t >= p.length) return -1;
  if (p.order != nullptr) return p.order[t];
  if (p.route >= 2) t = p.length - 1 - t;
  if (p.route % 2 == 1) {
    const int height = p.length / p.width, column = t / height;
    t = (t - column * height) * p.width + column;
  }
  return t;
}

// The places of chunks, found for kBatch of them at once, in the order in which they are
// walked; those of two batches are kept.
struct Places {
  static constexpr int kBatch = 4;
  static constexpr int kBytes = 2 * kBatch * kPositions * 4;
  int* data;
  int first, step;  // chunk, and from one to the next

  MMVSSM_DEVICE int* of(int chunk) const {
    return data + ((chunk - first) * step & (2 * kBatch - 1)) * kPositions;
  }
  MMVSSM_DEVICE bool is_due(int chunk) const {
    return ((chunk - first) * step & (kBatch - 1)) == 0;
  }
  MMVSSM_DEVICE void find(const Inputs& p, int first_of_batch) const {
    int* to = of(first_of_batch);
#pragma unroll 1
    for (int i = threadIdx.x; i < kBatch * kPositions; i += kThreads) {
      const int chunk = first_of_batch + i / kPositions * step;
      to[i] = place_of(p, chunk * kPositions + i % kPositions);
    }
  }
};

// A chunk of an array of rows: what one warp has of it in shared memory, its 32 channels
// of each position. With VECTOR it is copied by 16 bytes, else number by number.
template <int kDtype>
struct RowsOfWarp {
  static constexpr int kPitch = (VECTOR ? kWarp : kWarp + 2) * kSize<kDtype>;
  static constexpr int kBytes = kPositions * kPitch;
  static constexpr int kPieces = kWarp * kSize<kDtype> / 16;  // of a row
  static constexpr int kRowsAtOnce = kWarp / kPieces;
  char* memory;  // of the CTA
  int stride;
  int64_t of_channel, of_lane;
  int lane, along;
  int in_array;  // from where arrays of warps begin to what the lane copies
  bool valid;

  MMVSSM_DEVICE RowsOfWarp(const Rows& x, const Work& work, int is_along)
      : stride(static_cast<int>(x.place)), of_channel(x.channel), lane(work.lane),
        along(is_along) {
    int channel = work.first;
    if (VECTOR)
      channel += lane % kPieces * (16 / kSize<kDtype>);
    else
      channel += along ? lane / 16 : lane;
    valid = channel < work.end;
    left = work.end - channel;
    in_array = work.warp * kBytes;
    if (VECTOR) in_array += lane / kPieces * kPitch + lane % kPieces * 16;
    in_array = hidden(in_array);
    const int first = work.first - work.warp * kWarp;
    memory = hidden(x.data + work.batch * x.batch + first * x.channel);
    of_lane = VECTOR ? (channel - first) * kSize<kDtype> : (channel - first) * x.channel;
  }
  MMVSSM_DEVICE char* at(int place) const {
    return memory + offset_of(place, stride, of_lane);
  }

  // Those of the lane's rows, for all arrays of a dtype.
  struct Own {
    int places[kPositions / kRowsAtOnce];
    MMVSSM_DEVICE Own(const int* of_chunk, const Work& work) {
#pragma unroll
      for (int i = 0; i < kPositions / kRowsAtOnce; ++i)
        places[i] = of_chunk[i * kRowsAtOnce + work.lane / kPieces];
    }
  };

  // Begins to copy in what is there; the rest is zero. It goes to the warp's part of
  // `array`.
  MMVSSM_DEVICE void load(char* array, const int* places, const Own& own) const {
    char* tile = array + in_array;
    if constexpr (VECTOR) {
#pragma unroll
      for (int i = 0; i < kPositions; i += kRowsAtOnce) {
        const int place = own.places[i / kRowsAtOnce];
        copy_async_or_zero<16>(tile + i * kPitch, at(place),
                               valid && place >= 0);
      }
    } else {
      float x[kPositions];
#pragma unroll
      for (int i = 0; i < kPositions; ++i) {
        const int place = places[position(i)];
        x[i] = there(i, place) ? load_float<kDtype>(element(i, place)) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kPositions; ++i)
        store_float<kDtype>(tile + position(i) * kPitch + offset(i), x[i]);
    }
  }

  // Copies out. The warp has written all of it.
  MMVSSM_DEVICE void store(const char* array, const int* places, const Own& own) const {
    const char* tile = array + in_array;
    if constexpr (VECTOR) {
#pragma unroll
      for (int i = 0; i < kPositions; i += kRowsAtOnce) {
        const int place = own.places[i / kRowsAtOnce];
        const uint4 row = *reinterpret_cast<const uint4*>(tile + i * kPitch);
        const uint32_t words[4] = {row.x, row.y, row.z, row.w};
        store_bytes<16>(at(place), valid && place >= 0, words);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPositions; ++i) {
        const int place = places[position(i)];
        if (there(i, place))
          store_float<kDtype>(
              element(i, place),
              load_float<kDtype>(tile + position(i) * kPitch + offset(i)));
      }
    }
  }

  MMVSSM_DEVICE float get(const char* tile, int t) const {
    return load_float<kDtype>(tile + t * kPitch + lane * kSize<kDtype>);
  }
  MMVSSM_DEVICE void put(char* tile, int t, float x) const {
    store_float<kDtype>(tile + t * kPitch + lane * kSize<kDtype>, x);
  }

  // The four channels at an address, `by` positions on.
  MMVSSM_DEVICE static void get_four(const char* at, int by, float (&x)[4]) {
    at += by * kPitch;
    if constexpr (!VECTOR) {
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = load_float<kDtype>(at + k * kSize<kDtype>);
    } else if constexpr (kDtype == kFloat32) {
      load_floats(reinterpret_cast<const float*>(at), x);
    } else {
      const uint2 two = *reinterpret_cast<const uint2*>(at);
      const uint32_t words[2] = {two.x, two.y};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        x[2 * i] = kDtype == kBfloat16 ? float_of(words[i] << 16)
                                       : from_half(words[i] & 0xffff);
        x[2 * i + 1] = kDtype == kBfloat16 ? float_of(words[i] & 0xffff0000u)
                                           : from_half(words[i] >> 16);
      }
    }
  }
  MMVSSM_DEVICE static void put_four(char* at, int by, const float (&x)[4]) {
    at += by * kPitch;
    if constexpr (!VECTOR) {
#pragma unroll
      for (int k = 0; k < 4; ++k) store_float<kDtype>(at + k * kSize<kDtype>, x[k]);
    } else if constexpr (kDtype == kFloat32) {
      store_floats(reinterpret_cast<float*>(at), x);
    } else {
      uint2 two;
      two.x = kDtype == kBfloat16 ? to_bfloat16x2(x[0], x[1]) : to_half2(x[0], x[1]);
      two.y = kDtype == kBfloat16 ? to_bfloat16x2(x[2], x[3]) : to_half2(x[2], x[3]);
      *reinterpret_cast<uint2*>(at) = two;
    }
  }

 private:
  int left;

  // Number by number: neighbouring lanes have neighbours in memory.
  MMVSSM_DEVICE int position(int i) const { return along ? lane % 16 : i; }
  MMVSSM_DEVICE int offset(int i) const {
    return (along ? 2 * i + lane / 16 : lane) * kSize<kDtype>;
  }
  MMVSSM_DEVICE bool there(int i, int place) const {
    return place >= 0 && (along ? 2 * i < left : valid);
  }
  MMVSSM_DEVICE char* element(int i, int place) const {
    return in_global(at(place)) + (along ? 2 * i * of_channel : 0);
  }
};

}  // namespace mmvssm
