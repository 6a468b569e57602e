// What the kernels of the selective scan share.
//
// kLanes neighbouring threads own a channel, kStates states each, and walk a
// stretch of positions with the states in registers. What depends on the channel
// and not on the state (step sizes, inputs, outputs) is worked out once: of every
// kPart positions each of the lanes owns a few, and hands them around by shuffles.
// B and C of a part are in shared memory, for all channels of the block.
#pragma once

#include "problem.h"
#ifdef __CUDACC__
#include "device.h"
#else
#include "cuda_on_host.h"
#endif

#define MMVSSM_EXPORT extern "C" __attribute__((visibility("default")))

namespace mmvssm {

constexpr int kWarp = 32;
constexpr int kThreads = 128;  // of a block, at most
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLargest = 3.4028234663852886e38f;

// How many states a thread has, and how many threads a channel.
template <int kStatesOfThread, int kLanesOfChannel>
struct Layout {
  static constexpr int kStates = kStatesOfThread, kLanes = kLanesOfChannel;
};

// log(1 + exp(x)), accurate in relative terms for any x. The larger part is
// max(x, 0). The other is log(1 + e), e = exp(-abs(x)), as 2 artanh(s),
// s = e / (2 + e) <= 1/3, by a polynomial (4e-9, fitted at the Chebyshev nodes).
MMVSSM_DEVICE float softplus(float x) {
  const float e = exp2_fast(-fabsf(x) * kLog2E);
  const float s = divide_fast(e, 2.0f + e);
  const float q = s * s;
  float p = 0.28157778f;
  p = p * q + 0.27965158f;
  p = p * q + 0.40024595f;
  p = p * q + 0.66666324f;
  p = p * q + 2.0f;
  return fmaxf(x, 0.0f) + s * p;
}

MMVSSM_DEVICE float sigmoid(float x) {
  const float e = exp2_fast(-fabsf(x) * kLog2E);
  return divide_fast(x >= 0.0f ? 1.0f : e, 1.0f + e);
}

// How the positions of a part are shared out among the lanes of a channel. With
// more lanes than positions some lanes hold copies, and only the first of them
// loads, stores and counts.
template <int kPart, int kLanes>
struct Share {
  static constexpr int kOwn = kPart > kLanes ? kPart / kLanes : 1;
  static constexpr int kCopies = kLanes > kPart ? kLanes / kPart : 1;
  static MMVSSM_DEVICE int first(int lane) { return lane / kCopies * kOwn; }
  static MMVSSM_DEVICE bool counts(int lane) { return lane % kCopies == 0; }
  // What its owner has for position t.
  static MMVSSM_DEVICE float get(const float (&own)[kOwn], int t) {
    if constexpr (kLanes == 1) return own[t];
    return shuffle(own[t % kOwn], t / kOwn * kCopies, kLanes);
  }
};

// Adds up kCount values over kLanes lanes that are kStride threads apart. Lane i
// gets the sums from i * kCount / kLanes on, in the first places; with fewer
// values than lanes, neighbouring lanes get the same one.
template <int kCount, int kLanes, int kStride, int kSize>
MMVSSM_DEVICE void scatter_sums(float (&values)[kSize], int lane) {
  if constexpr (kLanes > 1) {
    constexpr int kHalf = kLanes / 2;
    if constexpr (kCount > 1) {
      const bool upper = lane & kHalf;
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const float low = values[i], high = values[i + kCount / 2];
        values[i] =
            (upper ? high : low) + shuffle_xor(upper ? low : high, kHalf * kStride);
      }
    } else {
      values[0] += shuffle_xor(values[0], kHalf * kStride);
    }
    scatter_sums<kCount / 2 + kCount % 2, kHalf, kStride>(values, lane);
  }
}

// The sum of a value over the lanes of a channel.
template <int kLanes>
MMVSSM_DEVICE float sum_lanes(float x) {
  float values[1] = {x};
  scatter_sums<1, kLanes, 1>(values, 0);
  return values[0];
}

// What a thread works on.
template <int kStates, int kLanes>
struct Place {
  int batch, group, tile, stretch, channel;
  int lane;    // among those of the channel
  bool valid;  // whether there is such a channel
  int begin, end;

  MMVSSM_DEVICE explicit Place(const ScanProblem& p) {
    const unsigned tiles = (p.group_size + p.tile - 1) / p.tile;
    unsigned index = blockIdx.x;
    stretch = index % p.stretches;
    index /= p.stretches;
    tile = index % tiles;
    index /= tiles;
    group = index % p.groups;
    batch = index / p.groups;
    const int inside = tile * p.tile + threadIdx.x / kLanes;
    valid = inside < p.group_size;
    channel = group * p.group_size + inside;
    lane = threadIdx.x % kLanes;
    begin = stretch * p.stretch_length;
    end = p.length - begin < p.stretch_length ? p.length : begin + p.stretch_length;
  }

  // Number of the channel in arrays (index, batch, channel).
  MMVSSM_DEVICE int64_t row(const ScanProblem& p, int64_t index) const {
    return (index * p.batch + batch) * (static_cast<int64_t>(p.groups) * p.group_size) +
           channel;
  }

  // The states of this thread in an array (index, batch, channel, state); those
  // that are only there to fill up are zero.
  MMVSSM_DEVICE void load(const ScanProblem& p, const float* from, int64_t index,
                          float (&h)[kStates]) const {
    from += row(p, index) * p.states;
    if (kStates % 4 == 0 && p.states % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kStates / 4; ++i) {
        const int n = lane * kStates + 4 * i;
        float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
        if (valid && n < p.states) four = *reinterpret_cast<const float4*>(from + n);
        h[4 * i] = four.x, h[4 * i + 1] = four.y;
        h[4 * i + 2] = four.z, h[4 * i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const int n = lane * kStates + i;
        h[i] = valid && n < p.states ? from[n] : 0.0f;
      }
    }
  }
  MMVSSM_DEVICE void store(const ScanProblem& p, float* to, int64_t index,
                           const float (&h)[kStates]) const {
    to += row(p, index) * p.states;
    if (kStates % 4 == 0 && p.states % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kStates / 4; ++i) {
        const int n = lane * kStates + 4 * i;
        const float4 four = {h[4 * i], h[4 * i + 1], h[4 * i + 2], h[4 * i + 3]};
        if (valid && n < p.states) *reinterpret_cast<float4*>(to + n) = four;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const int n = lane * kStates + i;
        if (valid && n < p.states) to[n] = h[i];
      }
    }
  }

  // A log2(e): the hardware has powers of two.
  MMVSSM_DEVICE void load_rates(const ScanProblem& p, float (&rates)[kStates]) const {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = lane * kStates + i;
      rates[i] = valid && n < p.states
                     ? p.A[static_cast<int64_t>(channel) * p.states + n] * kLog2E
                     : 0.0f;
    }
  }

  // A parameter of the channel, zero where it has none.
  MMVSSM_DEVICE float parameter(const float* x) const {
    return x != nullptr && valid ? x[channel] : 0.0f;
  }
};

// The place of position t, below 0 if it is padded.
MMVSSM_DEVICE int place_of(const ScanProblem& p, int t) {
  if (p.table != nullptr) return p.table[t];
  if (p.route >= 2) t = p.length - 1 - t;
  if (p.route % 2 == 1) {
    const unsigned height = p.length / p.width;
    t = t % height * p.width + t / height;
  }
  return t;
}

// The places of own positions, from shared memory.
template <int kOwn>
MMVSSM_DEVICE void read_places(const int* from, int (&where)[kOwn]) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) where[i] = from[i];
}

// Whether the first kOwn positions are before the end, and none of them is padded.
template <int kOwn>
MMVSSM_DEVICE bool all_there(const int (&where)[kOwn], int count) {
  int padded = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) padded |= where[i];
  return count >= kOwn && padded >= 0;
}

// One channel of an array (batch, channel, position); the stride is in bytes.
struct Row {
  char* data;
  int dtype, stride;

  template <int kStates, int kLanes>
  MMVSSM_DEVICE Row(const Array& x, const Place<kStates, kLanes>& place, int zero = 0)
      : dtype(static_cast<int>(x.dtype)),
        stride(static_cast<int>(x.stride[2]) * (dtype == kFloat32 ? 4 : 2)) {
    const int64_t offset =
        (place.batch + zero) * x.stride[0] + (place.channel + zero) * x.stride[1];
    data = static_cast<char*>(x.data) + offset * (dtype == kFloat32 ? 4 : 2);
  }
};

// Values as they are in memory, zero from the first `count` on and where padded. They are converted
// later, so that several loads may be under way.
template <typename Bits, int kOwn>
MMVSSM_DEVICE void fetch_as(const Row& row, const int (&where)[kOwn], int count,
                            uint32_t (&bits)[kOwn]) {
  if (all_there(where, count)) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      bits[i] = *reinterpret_cast<const Bits*>(address(row.data, where[i], row.stride));
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      bits[i] = 0;
      if (i < count && where[i] >= 0)
        bits[i] =
            *reinterpret_cast<const Bits*>(address(row.data, where[i], row.stride));
    }
  }
}
template <int kOwn>
MMVSSM_DEVICE void fetch(const Row& row, const int (&where)[kOwn], int count,
                         uint32_t (&bits)[kOwn]) {
  if (row.dtype == kFloat32)
    fetch_as<uint32_t>(row, where, count, bits);
  else
    fetch_as<uint16_t>(row, where, count, bits);
}

MMVSSM_DEVICE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

template <int kOwn>
MMVSSM_DEVICE void convert(int dtype, const uint32_t (&bits)[kOwn], float (&x)[kOwn]) {
  if (dtype == kFloat32) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) x[i] = as_float(bits[i]);
  } else if (dtype == kBfloat16) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) x[i] = as_float(bits[i] << 16);
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) x[i] = from_half(bits[i]);
  }
}

template <typename Value, int kOwn>
MMVSSM_DEVICE void store_as(const Row& row, const int (&where)[kOwn], int count,
                            const Value (&x)[kOwn]) {
  if (all_there(where, count)) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      *reinterpret_cast<Value*>(address(row.data, where[i], row.stride)) = x[i];
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (i < count && where[i] >= 0)
        *reinterpret_cast<Value*>(address(row.data, where[i], row.stride)) = x[i];
  }
}
// Stores the first `count` values that are not padded in the dtype of the array.
template <int kOwn>
MMVSSM_DEVICE void store(const Row& row, const int (&where)[kOwn], int count,
                         const float (&x)[kOwn]) {
  if (row.dtype == kFloat32) {
    store_as(row, where, count, x);
    return;
  }
  uint16_t half[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    half[i] = row.dtype == kBfloat16 ? to_bfloat16(x[i]) : to_half(x[i]);
  store_as(row, where, count, half);
}

// Copies (state, place) of B or C, or (rank, place) of the features, from position
// `first` of the order on into rows of kWidth float32; the rest is zero.
template <int kPart, int kWidth>
MMVSSM_DEVICE void stage(const ScanProblem& p, const Array& x, int64_t offset,
                         int64_t by_state, int64_t by_place, int count, int first,
                         int end, float* to) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kPart * kWidth; i += blockDim.x) {
    const int t = first + i / kWidth, n = i % kWidth;
    float value = 0.0f;
    const int where = t < end && n < count ? place_of(p, t) : -1;
    if (where >= 0) {
      const int64_t at = offset + n * by_state + where * by_place;
      if (x.dtype == kFloat32)
        value = static_cast<const float*>(x.data)[at];
      else if (x.dtype == kBfloat16)
        value = as_float(static_cast<const uint16_t*>(x.data)[at] << 16);
      else
        value = from_half(static_cast<const uint16_t*>(x.data)[at]);
    }
    to[i] = value;
  }
}
template <int kPart, int kWidth, typename Place>
MMVSSM_DEVICE void stage_states(const ScanProblem& p, const Array& x,
                                const Place& place, int first, int end, float* to) {
  const int64_t offset = place.batch * x.stride[0] + place.group * x.stride[1];
  stage<kPart, kWidth>(p, x, offset, x.stride[2], x.stride[3], p.states, first, end,
                       to);
}

// kSize values of a row in shared memory.
template <int kSize>
MMVSSM_DEVICE void load_vector(const float* from, float (&x)[kSize]) {
  if constexpr (kSize % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = from[i];
  }
}

// Step sizes of own positions: with the bias before the softplus, and after it,
// zero behind the end.
template <int kOwn>
MMVSSM_DEVICE void finish_steps(const ScanProblem& p, float shift, int count,
                                float (&raw)[kOwn], float (&dt)[kOwn]) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    raw[i] += shift;
    dt[i] = raw[i];
  }
  if (p.softplus) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) dt[i] = softplus(raw[i]);
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    if (i >= count) dt[i] = 0.0f;
}

// The recurrence: exp(dt A) h + fed B, fed = dt u.
template <int kStates>
MMVSSM_DEVICE void advance(float dt, float fed, const float (&rates)[kStates],
                           const float (&B)[kStates], float (&h)[kStates]) {
#pragma unroll
  for (int i = 0; i < kStates; ++i) h[i] = exp2_fast(dt * rates[i]) * h[i] + fed * B[i];
}

// Channels of a block: so many that whole warps waste the fewest threads, and
// otherwise as many as possible.
inline int tile_of(int lanes, int group_size) {
  int best = 0, fewest = 0;
  for (int threads = kThreads; threads >= kWarp; threads -= kWarp) {
    const int tile = threads / lanes;
    const int padded = (group_size + tile - 1) / tile * tile;
    if (best == 0 || padded < fewest) best = tile, fewest = padded;
  }
  return best;
}

inline int64_t blocks_of(const ScanProblem& p) {
  const int64_t tiles = (p.group_size + p.tile - 1) / p.tile;
  return p.batch * p.groups * tiles * p.stretches;
}

}  // namespace mmvssm
