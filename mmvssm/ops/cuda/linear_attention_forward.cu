// Linear attention: sums over the keys, what the queries read from them, or both.
#include "linear_attention.h"

namespace mmvssm {

// Mean products of turned keys with values, and mean keys, of a block of each.
struct Summary {
  static constexpr int kKeys = kRowsBytes<K_DTYPE>, kValues = kRowsBytes<V_DTYPE>;
  static constexpr int kStage = kKeys + kValues + ROTARY * 2 * kTable;

  static MMVSSM_DEVICE void run(const Args& p, const Place& place, char* ring, float* first,
                                float* second) {
    const int g = lane_of() / 4, c = lane_of() % 4;
    using CopyKeys = RowCopies<K_DTYPE>;
    using CopyValues = RowCopies<V_DTYPE>;
    const int key_block = place.key_block, value_block = place.value_block;
    char* keys = place.of(p.k, p.key_channels, kSize<K_DTYPE>) + CopyKeys::byte() +
                 key_block * kBlock * kSize<K_DTYPE>;
    char* values = place.of(p.v, p.value_channels, kSize<V_DTYPE>) + CopyValues::byte() +
                   value_block * kBlock * kSize<V_DTYPE>;
    const Angles angles(p, place);
    const int key_channels = in_block(p.key_channels, key_block);
    const int value_channels = in_block(p.value_channels, value_block);

    Accumulator sums;
    const auto ask = [&](char* to, int row, bool whole) {
      CopyKeys::fill(to, keys, p.k.position, row, place.end, key_channels,
                     kNothing<K_DTYPE>, whole);
      CopyValues::fill(to + kKeys, values, p.v.position, row, place.end, value_channels,
                       0, whole);
      angles.fill(to + kKeys + kValues, key_block, row, place.end, key_channels, whole);
    };
    Walk<kStage> walk(place, ring, are_full(p), ask);
#pragma unroll 1
    for (; walk.goes_on(); walk.advance()) {
      const char* from = walk.rows();
      float turned[2][2][4];
      Column<V_DTYPE> v[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int own = i / 2 * 8 + c + i % 2 * 4;
        Column<K_DTYPE> k;
        Raw<0, 2> cosine, sine;
        k.template read<8>(from, own, g);
        if constexpr (ROTARY) {
          cosine.template read<8>(from + kKeys + kValues, own, g);
          sine.template read<8>(from + kKeys + kValues + kTable, own, g);
        }
        float features[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          features[n] = feature(k[n]);
          if (NORMALISE) sums.keys[n] += features[n];
        }
        turn(features, cosine, sine, turned[i / 2][i % 2]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        v[i / 2][i % 2].template read<8>(from + kKeys, i / 2 * 8 + c + i % 2 * 4, g);
      walk.ask_again(ask);
      sums.add<V_DTYPE>(turned, v);
    }
    sums.finish(p, place, reinterpret_cast<float*>(ring), first, second);
  }
};

// What queries read from the sums: a block of values.
struct Reading {
  static constexpr int kQueries = kRowsBytes<Q_DTYPE>;
  static constexpr int kOfBlock = kQueries + ROTARY * 2 * kTable;
  static constexpr int kStage = KEY_BLOCKS * kOfBlock;

  static MMVSSM_DEVICE void run(const Args& p, const Place& place, char* memory,
                                const Sums& sums) {
    const int g = lane_of() / 4, c = lane_of() % 4;
    auto* right = reinterpret_cast<float4*>(memory);
    char* ring = memory + KEY_BLOCKS * kFragments * 16;
    using CopyQueries = RowCopies<Q_DTYPE>;
    char* queries = place.of(p.q, p.key_channels, kSize<Q_DTYPE>) + CopyQueries::byte();
    const Angles angles(p, place);
    char* out = place.of(p.y, p.value_channels, kSize<Y_DTYPE>) +
                (place.value_block * kBlock + 8 * c) * kSize<Y_DTYPE>;
    const int own_channels = in_block(p.value_channels, place.value_block) - 8 * c;

    const auto ask = [&](char* to, int row, bool whole) {
#pragma unroll
      for (int block = 0; block < KEY_BLOCKS; ++block) {
        const int channels = in_block(p.key_channels, block);
        char* rows = to + block * kOfBlock;
        CopyQueries::fill(rows, queries + block * kBlock * kSize<Q_DTYPE>, p.q.position,
                          row, place.end, channels, 0, whole);
        angles.fill(rows + kQueries, block, row, place.end, channels, whole);
      }
    };
    Walk<kStage> walk(place, ring, are_full(p), ask);
    float keys[KEY_BLOCKS][8];
#pragma unroll
    for (int block = 0; block < KEY_BLOCKS; ++block) {
      const int row = block * kBlock;
      put_right(right + block * kFragments, sums, row, place.value_block * kBlock, false);
#pragma unroll
      for (int n = 0; n < 8; ++n) keys[block][n] = sums.key(row + 8 * c + n);
    }
    sync_cta("sums put");
#pragma unroll 1
    for (; walk.goes_on(); walk.advance()) {
      const char* from = walk.rows();
      Row<Q_DTYPE> q[KEY_BLOCKS][2];
      Raw<0, 4> cosine[KEY_BLOCKS][2], sine[KEY_BLOCKS][2];
#pragma unroll
      for (int i = 0; i < 2 * KEY_BLOCKS; ++i) {
        const int block = i / 2, own = i % 2 * 8 + row_of(g);
        const char* rows = from + block * kOfBlock;
        q[block][i % 2].template read<4>(rows, own, c);
        if constexpr (ROTARY) {
          cosine[block][i % 2].template read<4>(rows + kQueries, own, c);
          sine[block][i % 2].template read<4>(rows + kQueries + kTable, own, c);
        }
      }
      walk.ask_again(ask);
      float sum[4][4] = {}, normaliser[2] = {};
#pragma unroll
      for (int block = 0; block < KEY_BLOCKS; ++block) {
        float turned[2][8];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float features[8];
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            features[n] = feature(q[block][i][n]);
            normaliser[i] += features[n] * keys[block][n];
          }
          turn(features, cosine[block][i], sine[block][i], turned[i]);
        }
        multiply<false>(sum, turned, right + block * kFragments);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float scale = 1.0f, y[8];
        if constexpr (NORMALISE) {
          normaliser[i] += shuffle_xor(normaliser[i], 1);
          scale = rcp_fast(normaliser[i] + shuffle_xor(normaliser[i], 2) + p.eps);
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) y[n] = sum[n / 2][2 * i + n % 2] * scale;
        const int position = walk.first + 8 * i + row_of(g);
        if (position < place.end)
          write<Y_DTYPE>(address(out, position, p.y.position), y, own_channels);
      }
    }
  }
};

}  // namespace mmvssm

MMVSSM_KERNEL(linear_attention_forward, mmvssm::Args, THREADS, RESIDENT) {
  using namespace mmvssm;
  const Place place(p, PASSES == 1 ? KEY_BLOCKS : 1, VALUE_BLOCKS);
  char* memory = shared_memory();
  // For the backward pass, or for the launch that follows.
  float* sums = p.sums == nullptr ? nullptr : place.sums(p, p.sums, kSums ? place.split : 0);
  if constexpr (kSums && kReads) {
    auto* here = reinterpret_cast<float*>(memory);
    memory += kSumsBytes;
    Summary::run(p, place, memory, here, sums);
    sync_cta("sums");
    // Found again, it took no registers in between.
    Reading::run(p, Place(p, 1, 1, fresh_zero()), memory, Sums(p, here));
  } else if constexpr (kSums) {
    Summary::run(p, place, memory, sums, nullptr);
  } else {
    Reading::run(p, place, memory, Sums(p, sums));
  }
}
