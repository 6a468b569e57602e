// Neighbouring elements of an array, loaded and stored in one piece.
#pragma once

#include "device.h"

namespace mmvssm {

constexpr int kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2;
// In place of a dtype: there is no such array.
constexpr int kAbsent = -1;
constexpr int kWarp = 32;

template <int kDtype>
constexpr int kBytesOf = kDtype == kFloat32 ? 4 : 2;

// As it is in memory, so that few registers hold what is loaded ahead.
template <int kDtype, int kCount>
struct Vector {
  static constexpr int kBytes = kBytesOf<kDtype> * kCount;
  uint32_t words[(kBytes + 3) / 4];

  // Zeros unless `valid`.
  MMVSSM_DEVICE void load(const char* from, bool valid) {
    load_bytes<kBytes>(from, valid, words);
  }

  // Of shared memory.
  MMVSSM_DEVICE void read(const char* from) { read_bytes<kBytes>(from, words); }

  // Nothing unless `valid`.
  MMVSSM_DEVICE void store(char* to, bool valid) const {
    store_bytes<kBytes>(to, valid, words);
  }

  MMVSSM_DEVICE float operator[](int i) const {
    if constexpr (kDtype == kFloat32) {
      return float_of(words[i]);
    } else {
      const uint32_t word = words[i / 2];
      if constexpr (kDtype == kBfloat16)
        return float_of(i % 2 ? word & 0xffff0000u : word << 16);
      return from_half(i % 2 ? word >> 16 : word & 0xffff);
    }
  }

  MMVSSM_DEVICE static Vector of(const float (&values)[kCount]) {
    Vector found;
    if constexpr (kDtype == kFloat32) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) found.words[i] = bits_of(values[i]);
    } else if constexpr (kCount == 1) {
      found.words[0] = kDtype == kBfloat16 ? to_bfloat16(values[0]) : to_half(values[0]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const float low = values[2 * i], high = values[2 * i + 1];
        found.words[i] =
            kDtype == kBfloat16 ? to_bfloat16x2(low, high) : to_half2(low, high);
      }
    }
    return found;
  }
};

// There is nothing, which counts as zeros.
template <int kCount>
struct Vector<kAbsent, kCount> {
  MMVSSM_DEVICE void load(const char*, bool) {}
  MMVSSM_DEVICE void store(char*, bool) const {}
  MMVSSM_DEVICE float operator[](int) const { return 0.0f; }
  MMVSSM_DEVICE static Vector of(const float (&)[kCount]) { return {}; }
};

// An array (batch, row, channel) of channels that are next to each other. Strides are
// in bytes.
struct Rows {
  char* data;
  int64_t of_batch;
  int64_t of_row;

  // Of a channel in row 0.
  MMVSSM_DEVICE char* at(int batch, int64_t bytes) const {
    return data + batch * of_batch + bytes;
  }
};

}  // namespace mmvssm
