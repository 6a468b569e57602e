// The selective scan with one state a channel: what its kernels share.
//
// A CTA walks CHANNELS channels of a sequence in chunks of POSITIONS positions, or does
// one chunk and looks back at what the CTAs before it found. Of a chunk every thread has
// kOwn consecutive positions of kWidth neighbouring channels; the kLanes threads that
// have the same positions are a team. Step sizes are in the log2 domain: dt stands for
// dt log2(e), because the hardware has powers of two.
#pragma once

#include "device.h"

namespace mmvssm {

constexpr int kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLargest = 3.4028234663852886e38f;

constexpr int kChannels = CHANNELS, kPositions = POSITIONS, kThreads = THREADS;
constexpr int kOwn = 8;
constexpr int kTeams = kPositions / kOwn, kLanes = kThreads / kTeams;
constexpr int kWidth = kChannels / kLanes;
// Threads that bring in what belongs to a position.
constexpr int kHelpers = kThreads / kPositions;
static_assert(kLanes * kTeams == kThreads && kWidth * kLanes == kChannels, "no rest");

// Strides in bytes of an array (batch, channel, place).
struct Strides {
  int64_t batch, channel, position;
};

// What the scans of a launch have of their own. Float arrays are contiguous.
struct ScanPointers {
  const char* delta;    // (batch, channel, place), or with RANK (batch, rank, place)
  const char *B, *C;    // (batch, group, place)
  const float* weight;  // (channel, rank)
  const float *A, *D, *bias;  // (channel); D and bias may be null
  char* out;                  // (batch, channel, place)
  const float* add;           // the same, to be added, or null
  float* saved;               // states before the chunks but the first, or null:
                              // (chunks - 1, batch, channel)
  float* last_state;          // (batch, channel), or null
  const int32_t* order;  // (length), -1 for a padded place; null for a route:
  int32_t start, step;   // position t is number start + step t, 1 or -1, of the rows
  int32_t columns;       // or of the columns of a map
  int32_t unused;
};

constexpr int kScans = 4;  // of a launch, at most

struct Args {
  ScanPointers scans[kScans];
  const char *u, *z;  // (batch, channel, place); z is null without GATE
  Strides u_strides, z_strides, delta_strides;
  Strides B_strides, C_strides, out_strides, add_strides;
  uint64_t* published;  // of CTAs that look back, see one_state_exchange.h
  int32_t batch, groups, group_size;  // channels are groups * group_size
  int32_t blocks;                     // of CHANNELS channels in a group
  int32_t chains;                     // scans * batch * groups * blocks
  int32_t length, width, height;
  uint32_t height_inverse, height_shift;  // to divide by the height
  int32_t chunks, chunks_of_cta;          // all, or one
};
static_assert(sizeof(Args) == ARGS, "as Python has it");

// What a CTA works on.
struct Chain {
  int scan, batch, group;
  int channel, count;  // the first channel of all, and how many there are
  int begin, end;      // chunks

  MMVSSM_DEVICE explicit Chain(const Args& p) {
    unsigned index = blockIdx.x;
    begin = index / p.chains * p.chunks_of_cta;
    end = p.chunks - begin < p.chunks_of_cta ? p.chunks : begin + p.chunks_of_cta;
    index %= p.chains;
    const int first = index % p.blocks * kChannels;
    index /= p.blocks;
    group = index % p.groups;
    index /= p.groups;
    batch = index % p.batch;
    scan = index / p.batch;
    channel = group * p.group_size + first;
    count = p.group_size - first < kChannels ? p.group_size - first : kChannels;
  }

  // Number of the first channel in arrays (index, batch, channel).
  MMVSSM_DEVICE int64_t row(const Args& p, int64_t index) const {
    const int64_t channels = static_cast<int64_t>(p.groups) * p.group_size;
    return (index * p.batch + batch) * channels + channel;
  }
};

// The place of position t of a route.
MMVSSM_DEVICE int place_on_route(const Args& p, const ScanPointers& scan, int t) {
  t = scan.start + scan.step * t;
  if (scan.columns) {
    const uint64_t product = static_cast<uint64_t>(2u * t) * p.height_inverse;
    const int column = static_cast<uint32_t>(product >> 32) >> p.height_shift;
    t = (t - column * p.height) * p.width + column;
  }
  return t;
}

// The place of position t, below 0 if it is padded or behind the end.
MMVSSM_DEVICE int place_of(const Args& p, const ScanPointers& scan, int t) {
  if (t >= p.length) return -1;
  return scan.order != nullptr ? scan.order[t] : place_on_route(p, scan, t);
}

// Where a place is in a row of an array; the stride, in bytes, is one of 32 bits.
MMVSSM_DEVICE const char* at(const char* row, int place, int64_t stride) {
  return global_address(row, place, static_cast<int>(stride));
}

// Values as they are in memory, and what they stand for

template <int kDtype>
constexpr int kSize = kDtype == kFloat32 ? 4 : 2;

template <int kDtype>
MMVSSM_DEVICE uint32_t load_bits(const char* from) {
  if constexpr (kDtype == kFloat32) return *reinterpret_cast<const uint32_t*>(from);
  return *reinterpret_cast<const uint16_t*>(from);
}
template <int kDtype>
MMVSSM_DEVICE float to_float(uint32_t bits) {
  if constexpr (kDtype == kFloat32) return float_of(bits);
  if constexpr (kDtype == kBfloat16) return float_of(bits << 16);
  return from_half(bits);
}
template <int kDtype>
MMVSSM_DEVICE void store_one(char* to, float x) {
  if constexpr (kDtype == kFloat32)
    *reinterpret_cast<float*>(to) = x;
  else
    *reinterpret_cast<uint16_t*>(to) = kDtype == kBfloat16 ? to_bfloat16(x) : to_half(x);
}

// Two 16-bit numbers, the first in the lower half.
template <int kDtype>
MMVSSM_DEVICE void unpack(uint32_t bits, float& low, float& high) {
  low = to_float<kDtype>(kDtype == kBfloat16 ? bits : bits & 0xffff);
  high = kDtype == kBfloat16 ? float_of(bits & 0xffff0000u) : from_half(bits >> 16);
}
template <int kDtype>
MMVSSM_DEVICE uint32_t pack(float low, float high) {
  return kDtype == kBfloat16 ? to_bfloat16x2(low, high) : to_half2(low, high);
}

// kWidth neighbouring numbers, aligned as a whole.
template <int kDtype>
MMVSSM_DEVICE void load_channels(const char* from, float (&x)[kWidth]) {
  static_assert(kWidth == 2 || kWidth == 4, "as vectors are");
  if constexpr (kDtype == kFloat32 && kWidth == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else if constexpr (kDtype == kFloat32) {
    const float2 two = *reinterpret_cast<const float2*>(from);
    x[0] = two.x, x[1] = two.y;
  } else if constexpr (kWidth == 4) {
    const uint2 four = *reinterpret_cast<const uint2*>(from);
    unpack<kDtype>(four.x, x[0], x[1]);
    unpack<kDtype>(four.y, x[2], x[3]);
  } else {
    unpack<kDtype>(*reinterpret_cast<const uint32_t*>(from), x[0], x[1]);
  }
}

// The same as they are in memory.
template <int kDtype>
MMVSSM_DEVICE auto pack_channels(const float (&x)[kWidth]) {
  if constexpr (kDtype == kFloat32 && kWidth == 4)
    return float4{x[0], x[1], x[2], x[3]};
  else if constexpr (kDtype == kFloat32)
    return float2{x[0], x[1]};
  else if constexpr (kWidth == 4)
    return uint2{pack<kDtype>(x[0], x[1]), pack<kDtype>(x[2], x[3])};
  else
    return pack<kDtype>(x[0], x[1]);
}
template <typename Packed>
MMVSSM_DEVICE void store_packed(char* to, Packed x) {
  *reinterpret_cast<Packed*>(to) = x;
}
template <int kDtype>
MMVSSM_DEVICE void store_channels(char* to, const float (&x)[kWidth]) {
  store_packed(to, pack_channels<kDtype>(x));
}

// The channels of this thread among those of the CTA.
struct Own {
  int team, channel;
  int count;  // how many of them there are

  MMVSSM_DEVICE explicit Own(const Chain& chain) {
    team = threadIdx.x / kLanes;
    channel = threadIdx.x % kLanes * kWidth;
    count = chain.count - channel;
  }

  // kWidth of the numbers of all channels of the CTA, which may be absent.
  MMVSSM_DEVICE void load(const float* from, float (&x)[kWidth]) const {
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      x[c] = from != nullptr && c < count ? from[channel + c] : 0.0f;
  }

  // In an array whose next channel is `stride` bytes on, if there is such a place. With
  // VECTOR either all channels of a thread are there or none.
  template <int kDtype>
  MMVSSM_DEVICE void store(char* to, int64_t stride, bool there,
                           const float (&x)[kWidth]) const {
    if constexpr (VECTOR) {
      const auto packed = pack_channels<kDtype>(x);
      if (there && count > 0) store_packed(to, packed);
    } else {
#pragma unroll
      for (int c = 0; c < kWidth; ++c)
        if (there && c < count) store_one<kDtype>(to + c * stride, x[c]);
    }
  }
  // The same of float32 numbers that are read; zero where there is none.
  MMVSSM_DEVICE void fetch(const char* from, int64_t stride, bool there,
                           float (&x)[kWidth]) const {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) x[c] = 0.0f;
    if constexpr (VECTOR) {
      if (there && count > 0) load_channels<kFloat32>(from, x);
    } else {
#pragma unroll
      for (int c = 0; c < kWidth; ++c)
        if (there && c < count) x[c] = *reinterpret_cast<const float*>(from + c * stride);
    }
  }
  MMVSSM_DEVICE void store_states(float* to, const float (&x)[kWidth]) const {
    store<kFloat32>(reinterpret_cast<char*>(to + channel), 4, true, x);
  }
};

// log2(1 + 2^x), accurate in relative terms for any x. The larger part is max(x, 0).
// The other is log2(1 + e), e = 2^-abs(x), as 2 artanh(s) / ln(2), s = e / (2 + e) <=
// 1/3, by a polynomial (error 1.8e-7, fitted at the Chebyshev nodes).
MMVSSM_DEVICE float softplus(float x) {
  const float e = exp2_fast(-fabsf(x));
  const float s = e * rcp_fast(2.0f + e);
  const float q = s * s;
  float p = 0.49377754f;
  p = p * q + 0.5711552f;
  p = p * q + 0.9619314f;
  p = p * q + 2.8853896f;
  return s * p + fmaxf(x, 0.0f);
}

}  // namespace mmvssm
