// Linear attention: sums over the keys, what the queries read from them, or both.
#include "linear_attention.h"

namespace mmvssm {

// Mean products of turned keys with values, and mean keys, of a block of each.
struct Summary {
  using CopyKeys = RowCopies<K_DTYPE>;
  using CopyValues = RowCopies<V_DTYPE>;
  static constexpr int kKeys = kRowsBytes<K_DTYPE>, kValues = kRowsBytes<V_DTYPE>;
  static constexpr int kStage = kKeys + kValues + ROTARY * 2 * kTable;

  const Args& p;
  const Place& place;
  char *keys, *values;
  Angles angles;
  Accumulator sums;

  MMVSSM_DEVICE Summary(const Args& p, const Place& place)
      : p(p), place(place), angles(p, place) {
    keys = place.of(p.k, p.key_channels, kSize<K_DTYPE>) + CopyKeys::byte() +
           place.key_block * kBlock * kSize<K_DTYPE>;
    values = place.of(p.v, p.value_channels, kSize<V_DTYPE>) + CopyValues::byte() +
             place.value_block * kBlock * kSize<V_DTYPE>;
  }

  MMVSSM_DEVICE void ask(char* to, int row, bool whole) const {
    const int channels = in_block(p.key_channels, place.key_block);
    CopyKeys::fill(to, keys, p.k.position, row, place.end, channels, kNothing<K_DTYPE>,
                   whole);
    CopyValues::fill(to + kKeys, values, p.v.position, row, place.end,
                     in_block(p.value_channels, place.value_block), 0, whole);
    angles.fill(to + kKeys + kValues, place.key_block, row, place.end, channels, whole);
  }

  // Adds the keys of rows to the sums, and turns them.
  MMVSSM_DEVICE void take_keys(const char* from, float (&turned)[2][2][4]) {
    const int g = lane_of() / 4, c = lane_of() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i / 2 * 8 + c + i % 2 * 4;
      Column<K_DTYPE> k;
      Raw<0, 2> cosine, sine;
      k.template read<8>(from, row, g);
      if constexpr (ROTARY) {
        cosine.template read<8>(from + kKeys + kValues, row, g);
        sine.template read<8>(from + kKeys + kValues + kTable, row, g);
      }
      float features[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        features[n] = feature(k[n]);
        if (NORMALISE) sums.keys[n] += features[n];
      }
      turn(features, cosine, sine, turned[i / 2][i % 2]);
    }
  }

  MMVSSM_DEVICE void run(char* ring, float* first, float* second) {
    Walk<kStage> walk(place, ring, are_full(p), *this);
#pragma unroll 1
    for (; walk.goes_on(); walk.advance()) {
      const char* from = walk.rows();
      float turned[2][2][4];
      Column<V_DTYPE> v[2][2];
      take_keys(from, turned);
      read_columns(from + kKeys, v);
      walk.ask_again(*this);
      sums.add<V_DTYPE>(turned, v);
    }
    sums.finish(p, place, reinterpret_cast<float*>(ring), first, second);
  }
};

// What queries read from the sums: a block of values.
struct Reading {
  using CopyQueries = RowCopies<Q_DTYPE>;
  static constexpr int kQueries = kRowsBytes<Q_DTYPE>;
  static constexpr int kOfBlock = kQueries + ROTARY * 2 * kTable;
  static constexpr int kStage = KEY_BLOCKS * kOfBlock;

  const Args& p;
  const Place& place;
  char *queries, *out;
  Angles angles;
  float4* right;
  float keys[KEY_BLOCKS][8];

  MMVSSM_DEVICE Reading(const Args& p, const Place& place, char* memory)
      : p(p), place(place), angles(p, place), right(reinterpret_cast<float4*>(memory)) {
    queries = place.of(p.q, p.key_channels, kSize<Q_DTYPE>) + CopyQueries::byte();
    out = place.of(p.y, p.value_channels, kSize<Y_DTYPE>) +
          (place.value_block * kBlock + lane_of() % 4 * 8) * kSize<Y_DTYPE>;
  }

  MMVSSM_DEVICE void ask(char* to, int row, bool whole) const {
#pragma unroll
    for (int j = 0; j < KEY_BLOCKS; ++j) {
      const int channels = in_block(p.key_channels, j);
      char* rows = to + j * kOfBlock;
      CopyQueries::fill(rows, queries + j * kBlock * kSize<Q_DTYPE>, p.q.position, row,
                        place.end, channels, 0, whole);
      angles.fill(rows + kQueries, j, row, place.end, channels, whole);
    }
  }

  MMVSSM_DEVICE void put(const Sums& sums) {
#pragma unroll
    for (int j = 0; j < KEY_BLOCKS; ++j) {
      put_right(right + j * kFragments, sums, j * kBlock, place.value_block * kBlock,
                false);
#pragma unroll
      for (int n = 0; n < 8; ++n)
        keys[j][n] = sums.key(j * kBlock + lane_of() % 4 * 8 + n);
    }
    sync_cta("sums put");
  }

  MMVSSM_DEVICE void write_values(int first, const float (&sum)[4][4],
                                  const float (&normaliser)[2]) const {
    const int g = lane_of() / 4, c = lane_of() % 4;
    const int channels = in_block(p.value_channels, place.value_block) - 8 * c;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float scale = 1.0f, y[8];
      if constexpr (NORMALISE) {
        const float two = normaliser[i] + shuffle_xor(normaliser[i], 1);
        scale = rcp_fast(two + shuffle_xor(two, 2) + p.eps);
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) y[n] = sum[n / 2][2 * i + n % 2] * scale;
      const int position = first + 8 * i + row_of(g);
      if (position < place.end)
        write<Y_DTYPE>(address(out, position, p.y.position), y, channels);
    }
  }

  MMVSSM_DEVICE void run(char* memory, const Sums& sums) {
    Walk<kStage> walk(place, memory + KEY_BLOCKS * kFragments * 16, are_full(p), *this);
    put(sums);
#pragma unroll 1
    for (; walk.goes_on(); walk.advance()) {
      const char* from = walk.rows();
      TurningRows<Q_DTYPE> q[KEY_BLOCKS];
#pragma unroll
      for (int j = 0; j < KEY_BLOCKS; ++j) q[j].read(from + j * kOfBlock, kQueries);
      walk.ask_again(*this);
      float sum[4][4] = {}, normaliser[2] = {};
#pragma unroll
      for (int j = 0; j < KEY_BLOCKS; ++j) {
        float turned[2][8];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float features[8];
          q[j].take(i, features, turned[i]);
#pragma unroll
          for (int n = 0; n < 8; ++n) normaliser[i] += features[n] * keys[j][n];
        }
        multiply<false>(sum, turned, right + j * kFragments);
      }
      write_values(walk.first, sum, normaliser);
    }
  }
};

}  // namespace mmvssm

MMVSSM_KERNEL(linear_attention_forward, mmvssm::Args, THREADS, RESIDENT) {
  using namespace mmvssm;
  const Place place(p, PASSES == 1 ? KEY_BLOCKS : 1, VALUE_BLOCKS);
  char* memory = shared_memory();
  // For the backward pass, or for the launch that follows.
  float* sums = nullptr;
  if (p.sums != nullptr) sums = place.sums(p, p.sums, kSums ? place.split : 0);
  if constexpr (kSums && kReads) {
    auto* here = reinterpret_cast<float*>(memory);
    memory += kSumsBytes;
    Summary(p, place).run(memory, here, sums);
    sync_cta("sums");
    // Found again, it took no registers in between.
    const Place again(p, 1, 1, fresh_zero());
    Reading(p, again, memory).run(memory, Sums(p, here));
  } else if constexpr (kSums) {
    Summary(p, place).run(memory, sums, nullptr);
  } else {
    Reading(p, place, memory).run(memory, Sums(p, sums));
  }
}
