// What the kernels of linear attention share.
//
// A CTA has a head of a batch element and a split of its positions, or all. Its warps
// take kRows positions in turn, which have been copied to their own part of shared
// memory some turns before. Channels of a head come in blocks of 32. Those that a block
// lacks, and positions behind the last one, are filled up there so that the arithmetic
// need not ask: the sums of such channels are taken for 0 where they are read, and the
// results not written.
//
// Products are those of tensor cores in tf32, each float32 number being the sum of two
// in tf32: what is left out is 2^-22 of a term. Numbers that come in 16 bits are exact.
// No product begins where another warp's ends, so sums are in one order always.
//
// A lane of number 4 g + c has one of two shares of a block of rows:
//   by columns: channels 4g .. 4g + 3 of the rows c and c + 4 of every eight. Sums over
//     positions take these, as either factor;
//   by rows: channels 8c .. 8c + 7 of the rows kRow(g) and 8 + kRow(g). Products with
//     what all positions share take these, and give them.
#pragma once

#include "device.h"

namespace mmvssm {

constexpr int kWarp = 32, kWarps = THREADS / kWarp;
constexpr int kBlock = CHANNELS;
constexpr int kRows = POSITIONS / kWarps;
static_assert(kBlock == 32 && kRows == 16, "as the tensor cores have it");
constexpr bool kSums = PASSES & 1, kReads = PASSES & 2;
constexpr int kSumsBytes = (kBlock + 1) * kBlock * 4;
constexpr int kTable = kRows * kBlock / 2 * 4;  // bytes of cosine or sine
constexpr float kLog2E = 1.4426950408889634f;

// A tensor (batch, position, channel) with strides in bytes, of neighbouring channels.
struct Rows {
  char* data;
  int64_t batch, position;
};

struct Args {
  Rows q, k, v, y;  // y: the output, or its gradient
  Rows grad_q, grad_k, grad_v;
  Rows cosine, sine;  // float32, with no batch
  // (split, batch, head, sums): mean products of keys with values, and mean keys; and
  // their gradients. Those that are written have splits, those that are read do not.
  float *sums, *grad_sums;
  int32_t batch, heads, length;
  int32_t split_length;
  int32_t key_channels, value_channels;  // of a head
  float eps, scale;                      // 1 / length
};

// What a CTA works on.
struct Place {
  int batch, head, key_block, value_block, split, begin, end;

  MMVSSM_DEVICE Place(const Args& p, int key_blocks, int value_blocks, int zero = 0) {
    // CTAs of all batch elements read the same angles at about the same time.
    unsigned index = blockIdx.x + zero;
    batch = index % p.batch;
    index /= p.batch;
    head = index % p.heads;
    index /= p.heads;
    key_block = index % key_blocks;
    index /= key_blocks;
    value_block = index % value_blocks;
    split = index / value_blocks;
    begin = split * p.split_length;
    end = p.length - begin < p.split_length ? p.length : begin + p.split_length;
  }

  // The first channel of this head, at position 0.
  MMVSSM_DEVICE char* of(const Rows& x, int channels, int bytes) const {
    return x.data + batch * x.batch + static_cast<int64_t>(head) * channels * bytes;
  }

  // Place of the sums of this head.
  MMVSSM_DEVICE float* sums(const Args& p, float* data, int of_split) const {
    const int64_t element = static_cast<int64_t>(of_split) * p.batch + batch;
    const int of_head = p.key_channels * (p.value_channels + 1);
    return data + (element * p.heads + head) * of_head;
  }
};

MMVSSM_DEVICE int lane_of() { return threadIdx.x % kWarp; }
MMVSSM_DEVICE int row_of(int g) { return g / 2 + g % 2 * 4; }

MMVSSM_DEVICE bool are_full(const Args& p) {
  return p.key_channels == KEY_BLOCKS * kBlock &&
         p.value_channels == VALUE_BLOCKS * kBlock;
}
// Channels of a head that a block has.
MMVSSM_DEVICE int in_block(int channels, int block) {
  const int left = channels - block * kBlock;
  return left < 0 ? 0 : left < kBlock ? left : kBlock;
}

template <int kDtype>
constexpr int kSize = kDtype == 0 ? 4 : 2;
template <int kDtype>
constexpr int kRowsBytes = kRows * kBlock * kSize<kDtype>;

// Rows in shared memory

// Where 16 bytes of a row are, so that neither share meets a bank twice.
template <int kRowBytes>
MMVSSM_DEVICE int place_of(int row, int piece) {
  const int n = row * (kRowBytes / 16) + piece;
  return 16 * (kRowBytes == 64 ? n ^ (row & 6) : n ^ ((row & 3) * 2 | (row >> 2 & 1)));
}

template <bool kFirst, typename First, typename Second>
struct Choice {
  using Type = First;
};
template <typename First, typename Second>
struct Choice<false, First, Second> {
  using Type = Second;
};

// Infinitely far below 0 the feature is 0: such a key counts for nothing.
template <int kDtype>
constexpr uint32_t kNothing = kDtype == 0   ? 0xff800000u
                              : kDtype == 1 ? 0xff80ff80u
                                            : 0xfc00fc00u;

// How a warp copies rows: each lane has a column of units.
template <int kDtype, int kRowBytes>
struct Copies {
  static constexpr int kUnit = VECTOR ? 16 : kSize<kDtype>;
  static constexpr int kUnits = kRowBytes / kUnit, kStep = kWarp / kUnits;

  static MMVSSM_DEVICE int byte() { return lane_of() % kUnits * kUnit; }
  static MMVSSM_DEVICE int row() { return lane_of() / kUnits; }
  static MMVSSM_DEVICE char* place(char* to, int i) {
    return to + place_of<kRowBytes>(i + row(), byte() / 16) + byte() % 16;
  }

  // Asks for kRows rows from `first` on, which are there if `whole`; else those before
  // `end` are, and the first `channels` channels, and the rest is filled with the bits
  // of `missing`. `from` is the own column's.
  static MMVSSM_DEVICE void fill(char* to, char* from, int stride, int first, int end,
                                 int channels, uint32_t missing, bool whole) {
    if (VECTOR && whole) {
#pragma unroll
      for (int i = 0; i < kRows; i += kStep)
        copy_async<16>(place(to, i), address(from, first + i + row(), stride));
      return;
    }
    const bool there = byte() < channels * kSize<kDtype>;
#pragma unroll 1
    for (int i = 0; i < kRows; i += kStep) {
      const char* found = address(from, first + i + row(), stride);
      const bool copies = there && first + i + row() < end;
      if constexpr (VECTOR) {
        if (copies) copy_async<16>(place(to, i), found);
        else
          *reinterpret_cast<uint4*>(place(to, i)) = {missing, missing, missing, missing};
      } else {
        using Word = typename Choice<kSize<kDtype> == 4, uint32_t, uint16_t>::Type;
        const Word word = copies ? *reinterpret_cast<const Word*>(found) : missing;
        *reinterpret_cast<Word*>(place(to, i)) = word;
      }
    }
  }
};

template <int kDtype>
using RowCopies = Copies<kDtype, kBlock * kSize<kDtype>>;

// One of kShares equal parts of a row.
template <int kRowBytes, int kShares>
MMVSSM_DEVICE void read(const char* from, int row, int share,
                        uint32_t (&words)[kRowBytes / kShares / 4]) {
  constexpr int kBytes = kRowBytes / kShares;
  if constexpr (kBytes == 8) {
    const auto two = *reinterpret_cast<const uint2*>(
        from + place_of<kRowBytes>(row, share / 2) + share % 2 * 8);
    words[0] = two.x, words[1] = two.y;
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const auto four = *reinterpret_cast<const uint4*>(
          from + place_of<kRowBytes>(row, share * (kBytes / 16) + i));
      words[4 * i] = four.x, words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
  }
}

// A lane's share of rows, as it is in memory.
template <int kDtype, int kCount>
struct Raw {
  uint32_t words[kCount * kSize<kDtype> / 4];

  template <int kShares>
  MMVSSM_DEVICE void read(const char* from, int row, int share) {
    mmvssm::read<kCount * kSize<kDtype> * kShares, kShares>(from, row, share, words);
  }
  MMVSSM_DEVICE float operator[](int i) const {
    if constexpr (kDtype == 0) return float_of(words[i]);
    const uint32_t bits = words[i / 2];
    if constexpr (kDtype == 1) return float_of(i % 2 ? bits & 0xffff0000u : bits << 16);
    return from_half(i % 2 ? bits >> 16 : bits & 0xffffu);
  }
};
template <int kDtype>
using Column = Raw<kDtype, 4>;
template <int kDtype>
using Row = Raw<kDtype, 8>;

template <typename Share>
MMVSSM_DEVICE void read_rows(const char* from, Share (&x)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    x[i].template read<4>(from, 8 * i + row_of(lane_of() / 4), lane_of() % 4);
}
template <typename Share>
MMVSSM_DEVICE void read_columns(const char* from, Share (&x)[2][2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    x[i / 2][i % 2].template read<8>(from, i / 2 * 8 + lane_of() % 4 + i % 2 * 4,
                                     lane_of() / 4);
}

// Writes neighbouring channels of a row, of which `channels` are there.
template <int kDtype, int kCount>
MMVSSM_DEVICE void write(char* to, const float (&x)[kCount], int channels) {
  if constexpr (VECTOR) {
    if (channels <= 0) return;
    uint32_t words[kCount * kSize<kDtype> / 4];
#pragma unroll
    for (int i = 0; i < kCount * kSize<kDtype> / 4; ++i)
      words[i] = kDtype == 0   ? bits_of(x[i])
                 : kDtype == 1 ? to_bfloat16x2(x[2 * i % kCount], x[(2 * i + 1) % kCount])
                               : to_half2(x[2 * i % kCount], x[(2 * i + 1) % kCount]);
    if constexpr (sizeof words == 8)
      *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
    else
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof words / 16); ++i)
        reinterpret_cast<uint4*>(to)[i] = {words[4 * i], words[4 * i + 1],
                                           words[4 * i + 2], words[4 * i + 3]};
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= channels) continue;
      if constexpr (kDtype == 0) reinterpret_cast<float*>(to)[i] = x[i];
      else
        reinterpret_cast<uint16_t*>(to)[i] =
            kDtype == 1 ? to_bfloat16(x[i]) : to_half(x[i]);
    }
  }
}

// Features

// elu(x) + 1, accurate in relative terms far below 0 as well.
MMVSSM_DEVICE float feature(float x) {
  const float below = exp2_fast(x * kLog2E);
  return x > 0.0f ? x + 1.0f : below;
}
// Its derivative, from the feature.
MMVSSM_DEVICE float slope(float feature) { return feature > 1.0f ? 1.0f : feature; }

// Turns pairs of channels by angles, or back.
template <int kCount>
MMVSSM_DEVICE void turn(const float (&x)[kCount], const Raw<0, kCount / 2>& cosine,
                        const Raw<0, kCount / 2>& sine, float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const float cos = ROTARY ? cosine[i / 2] : 1.0f, sin = ROTARY ? sine[i / 2] : 0.0f;
    out[i] = ROTARY ? x[i] * cos - x[i + 1] * sin : x[i];
    out[i + 1] = ROTARY ? x[i + 1] * cos + x[i] * sin : x[i + 1];
  }
}
template <int kCount>
MMVSSM_DEVICE void turn_back(const float (&x)[kCount], const Raw<0, kCount / 2>& cosine,
                             const Raw<0, kCount / 2>& sine, float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    out[i] = ROTARY ? x[i] * cosine[i / 2] + x[i + 1] * sine[i / 2] : x[i];
    out[i + 1] = ROTARY ? x[i + 1] * cosine[i / 2] - x[i] * sine[i / 2] : x[i + 1];
  }
}

// A lane's share by rows of what is turned.
template <int kDtype>
struct TurningRows {
  Row<kDtype> x[2];
  Raw<0, 4> cosine[2], sine[2];

  // The angles stand `table` bytes behind the rows.
  MMVSSM_DEVICE void read(const char* from, int table) {
    read_rows(from, x);
    if constexpr (ROTARY) read_rows(from + table, cosine);
    if constexpr (ROTARY) read_rows(from + table + kTable, sine);
  }
  // Features of one of the rows, and the same turned.
  MMVSSM_DEVICE void take(int i, float (&features)[8], float (&turned)[8]) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) features[n] = feature(x[i][n]);
    turn(features, cosine[i], sine[i], turned);
  }
};

// Cosines and sines of a head.
struct Angles {
  using Copy = Copies<0, kBlock / 2 * 4>;
  const Args& p;
  int first;  // byte of a row

  MMVSSM_DEVICE Angles(const Args& p, const Place& place)
      : p(p), first(place.head * p.key_channels / 2 * 4 + Copy::byte()) {}
  // Of a block of channels.
  MMVSSM_DEVICE void fill(char* to, int block, int row, int end, int channels,
                          bool whole) const {
    if constexpr (!ROTARY) return;
    const int at = first + block * kBlock / 2 * 4;
    Copy::fill(to, p.cosine.data + at, p.cosine.position, row, end, channels / 2, 0,
               whole);
    Copy::fill(to + kTable, p.sine.data + at, p.sine.position, row, end, channels / 2, 0,
               whole);
  }
};

// Products

// Numbers as sums of two in tf32, of which those that are exact need the first only.
template <bool kExact = false, int kCount>
MMVSSM_DEVICE void split(const float (&x)[kCount], float (&high)[kCount],
                         float (&low)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    high[i] = kExact ? x[i] : float_of(bits_of(x[i]) & 0xffffe000u);
    low[i] = x[i] - high[i];
  }
}

// sum += a b, where b is exact in tf32 or not.
template <bool kExact>
MMVSSM_DEVICE void add_product(float (&sum)[4], const float (&a)[4],
                               const float (&b)[2]) {
  float a_high[4], a_low[4], b_high[2], b_low[2];
  split(a, a_high, a_low);
  split<kExact>(b, b_high, b_low);
  mma_1688(sum, a_low, b_high);
  if constexpr (!kExact) mma_1688(sum, a_high, b_low);
  mma_1688(sum, a_high, b_high);
}

// Sums over positions of a CTA: products of keys with values, and keys.
struct Accumulator {
  float products[2][4][4] = {}, keys[4] = {};

  // Adds the products of 16 rows, both by columns.
  template <int kDtype>
  MMVSSM_DEVICE void add(const float (&a)[2][2][4], const Column<kDtype> (&b)[2][2]) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // Tensor cores cut off what float32 has no room for: of a long sum too much.
        float sum[4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto& x = a[half];
          const float left[4] = {x[0][2 * m], x[0][2 * m + 1], x[1][2 * m],
                                 x[1][2 * m + 1]};
          const float right[2] = {b[half][0][j], b[half][1][j]};
          add_product<kDtype != 0>(sum, left, right);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) products[m][j][i] += sum[i];
      }
  }

  // Adds up all warps' and writes (key, value) and (key) to one or two places, either
  // of which may be missing. The workspace is kWarps * kAccumulated floats.
  MMVSSM_DEVICE void finish(const Args& p, const Place& place, float* workspace,
                            float* first, float* second) {
    const int lane = lane_of(), g = lane / 4, c = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      keys[i] += shuffle_xor(keys[i], 1);
      keys[i] += shuffle_xor(keys[i], 2);
    }
    sync_cta("read");
    float* own = workspace + threadIdx.x / kWarp * kSumsBytes / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        own[(4 * g + i) * kBlock + 8 * c + j] = products[i / 2][j % 4][i % 2 * 2 + j / 4];
      if (c == 0) own[kBlock * kBlock + 4 * g + i] = keys[i];
    }
    sync_cta("parts");
    const int columns = p.value_channels;
    const int key = place.key_block * kBlock, value = place.value_block * kBlock;
#pragma unroll 1
    for (int n = threadIdx.x; n < kBlock * kBlock + kBlock; n += THREADS) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += workspace[i * kSumsBytes / 4 + n];
      const bool of_keys = n >= kBlock * kBlock;
      const int row = of_keys ? n - kBlock * kBlock + key : n / kBlock + key;
      const int column = of_keys ? 0 : n % kBlock + value;
      if (row >= p.key_channels || column >= columns || (of_keys && value > 0)) continue;
      const int to = of_keys ? p.key_channels * columns + row : row * columns + column;
      if (first != nullptr) first[to] = sum * p.scale;
      if (second != nullptr) second[to] = sum * p.scale;
    }
  }
};

// Sums of a head, in global or shared memory.
struct Sums {
  const float* data;
  int rows, columns;

  MMVSSM_DEVICE Sums(const Args& p, const float* data)
      : data(data), rows(p.key_channels), columns(p.value_channels) {}
  MMVSSM_DEVICE float at(int row, int column) const {
    return row < rows && column < columns ? data[row * columns + column] : 0.0f;
  }
  MMVSSM_DEVICE float key(int row) const {
    return row < rows ? data[rows * columns + row] : 0.0f;
  }
};

constexpr int kFragments = 4 * 4 * kWarp;  // float4 of a block of sums

// Puts a block of sums, or it transposed, as the right factor of products by rows.
MMVSSM_DEVICE void put_right(float4* to, const Sums& sums, int row, int column,
                             bool transposed) {
#pragma unroll
  for (int first = 0; first < kFragments; first += THREADS) {
    const int n = first + threadIdx.x;
    const int g = n % kWarp / 4, c = n % 4, i = n / kWarp / 4, j = n / kWarp % 4;
    const int from = 8 * c + 2 * i, other = g / 2 * 8 + 2 * j + g % 2;
    float x[2], high[2], low[2];
#pragma unroll
    for (int k = 0; k < 2; ++k)
      x[k] = transposed ? sums.at(row + other, column + from + k)
                        : sums.at(row + from + k, column + other);
    split(x, high, low);
    to[n] = {high[0], high[1], low[0], low[1]};
  }
}

// sum += x times a block of sums, both by rows.
template <bool kExact, typename Values>
MMVSSM_DEVICE void multiply(float (&sum)[4][4], const Values (&x)[2],
                            const float4* right) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float left[4] = {x[0][2 * i], x[1][2 * i], x[0][2 * i + 1], x[1][2 * i + 1]};
    float high[4], low[4];
    split<kExact>(left, high, low);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 b = right[(i * 4 + j) * kWarp + lane_of()];
      const float b_high[2] = {b.x, b.y}, b_low[2] = {b.z, b.w};
      if constexpr (!kExact) mma_1688(sum[j], low, b_high);
      mma_1688(sum[j], high, b_low);
      mma_1688(sum[j], high, b_high);
    }
  }
}

// One of the two rows of what `multiply` gives.
MMVSSM_DEVICE void row_of_sum(const float (&sum)[4][4], int i, float (&out)[8]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) out[n] = sum[n / 2][2 * i + n % 2];
}

// A number of each lane, added up over g: over the lanes that have the same rows.
MMVSSM_DEVICE float sum_columns(float x) {
  x += shuffle_xor(x, 4);
  x += shuffle_xor(x, 8);
  return x + shuffle_xor(x, 16);
}

// The way of a warp over its positions, kRows at once, with copies under way of those
// that come next. `pass.ask(to, first, whole)` asks for the rows from `first` on.
template <int kStageBytes>
struct Walk {
  char* ring;
  int stage, first, end;
  bool full;  // all blocks of channels

  template <typename Pass>
  MMVSSM_DEVICE Walk(const Place& place, char* memory, bool full, const Pass& pass)
      : full(full) {
    const int warp = threadIdx.x / kWarp;
    ring = memory + warp * (STAGES * kStageBytes);
    stage = 0, first = place.begin + warp * kRows, end = place.end;
#pragma unroll
    for (int i = 0; i < STAGES; ++i)
      ask(ring + i * kStageBytes, first + i * POSITIONS, pass);
  }
  template <typename Pass>
  MMVSSM_DEVICE void ask(char* to, int row, const Pass& pass) const {
    if (full && row + kRows <= end) {
      pass.ask(to, row, true);
    } else if (rarely(row < end)) {
      pass.ask(to, row, false);
    }
    copy_commit();
  }
  MMVSSM_DEVICE bool goes_on() const { return first < end; }
  // The rows that are next.
  MMVSSM_DEVICE const char* rows() const {
    copy_wait<STAGES - 1>();
    sync_warp("filled");
    return ring + stage;
  }
  // They have been read.
  template <typename Pass>
  MMVSSM_DEVICE void ask_again(const Pass& pass) const {
    sync_warp("emptied");
    ask(ring + stage, first + STAGES * POSITIONS, pass);
  }
  MMVSSM_DEVICE void advance() {
    first += POSITIONS;
    stage = stage + kStageBytes == STAGES * kStageBytes ? 0 : stage + kStageBytes;
  }
};

}  // namespace mmvssm
