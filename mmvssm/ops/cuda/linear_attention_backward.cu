// Gradients of linear attention: by queries with those of the sums, by keys and values
// with the latter, or all.
#include "linear_attention.h"

namespace mmvssm {

// With y = n / m, n = turned q times the sums, m = q keys + eps and the gradient g of y:
// the gradients of n and m are g / m and -(g / m) n / m, the latter being
// -turned q (sums g) / m / m, for which n is not needed.
struct Queries {
  static constexpr int kQueries = kRowsBytes<Q_DTYPE>, kGrads = kRowsBytes<Y_DTYPE>;
  static constexpr int kOfBlock = kQueries + ROTARY * 2 * kTable;
  static constexpr int kStage = KEY_BLOCKS * kOfBlock + VALUE_BLOCKS * kGrads;

  // The sums as the left factor of products with gradients: rows 4g + 2m + i % 2 and
  // columns 8c + 2k + i / 2.
  static MMVSSM_DEVICE void put_left(float4* to, const Sums& sums, int row, int column) {
    constexpr int kCount = 2 * 4 * kWarp;
#pragma unroll
    for (int first = 0; first < kCount; first += THREADS) {
      const int n = first + threadIdx.x;
      const int g = n % kWarp / 4, c = n % 4, m = n / kWarp / 4, k = n / kWarp % 4;
      float x[4], high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[i] = sums.at(row + 4 * g + 2 * m + i % 2, column + 8 * c + 2 * k + i / 2);
      split(x, high, low);
      to[n] = {high[0], high[1], high[2], high[3]};
      to[n + kCount] = {low[0], low[1], low[2], low[3]};
    }
  }

  // Sums times gradients: of channels 4g + 2m + i / 2 and rows c + i % 2 * 4 of each half.
  static MMVSSM_DEVICE void multiply_left(float (&sum)[2][2][4], const float4* left,
                                          const Row<Y_DTYPE> (&grad)[2]) {
    constexpr bool kExact = Y_DTYPE != 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float high[2][2], low[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float right[2] = {grad[half][2 * k], grad[half][2 * k + 1]};
        split<kExact>(right, high[half], low[half]);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const float4 a = left[(m * 4 + k) * kWarp + lane_of()];
        const float4 b = left[(m * 4 + k + 8) * kWarp + lane_of()];
        const float left_high[4] = {a.x, a.y, a.z, a.w}, left_low[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma_1688(sum[half][m], left_low, high[half]);
          if constexpr (!kExact) mma_1688(sum[half][m], left_high, low[half]);
          mma_1688(sum[half][m], left_high, high[half]);
        }
      }
    }
  }

  static MMVSSM_DEVICE void run(const Args& p, const Place& place, char* memory, float* first,
                                float* second) {
    const int g = lane_of() / 4, c = lane_of() % 4;
    auto* left = reinterpret_cast<float4*>(memory);
    char* ring = memory + KEY_BLOCKS * VALUE_BLOCKS * kFragments * 16;
    using CopyQueries = RowCopies<Q_DTYPE>;
    using CopyGrads = RowCopies<Y_DTYPE>;
    char* queries = place.of(p.q, p.key_channels, kSize<Q_DTYPE>) + CopyQueries::byte();
    char* grads = place.of(p.y, p.value_channels, kSize<Y_DTYPE>) + CopyGrads::byte();
    const Angles angles(p, place);
    char* out = place.of(p.grad_q, p.key_channels, kSize<Q_DTYPE>) +
                (place.key_block * kBlock + 4 * g) * kSize<Q_DTYPE>;
    const int own_channels = in_block(p.key_channels, place.key_block) - 4 * g;
    const bool writes = place.value_block == 0;

    Accumulator found;
    const auto ask = [&](char* to, int row, bool whole) {
#pragma unroll
      for (int j = 0; j < KEY_BLOCKS; ++j) {
        const int block = block_of(place, j), channels = in_block(p.key_channels, block);
        char* rows = to + j * kOfBlock;
        CopyQueries::fill(rows, queries + block * kBlock * kSize<Q_DTYPE>, p.q.position,
                          row, place.end, channels, 0, whole);
        angles.fill(rows + kQueries, block, row, place.end, channels, whole);
      }
#pragma unroll
      for (int i = 0; i < VALUE_BLOCKS; ++i)
        CopyGrads::fill(to + KEY_BLOCKS * kOfBlock + i * kGrads,
                        grads + i * kBlock * kSize<Y_DTYPE>, p.y.position, row, place.end,
                        in_block(p.value_channels, i), 0, whole);
    };
    Walk<kStage> walk(place, ring, are_full(p), ask);
    const Sums sums(p, place.sums(p, p.sums, 0));
    float keys[KEY_BLOCKS][4];
#pragma unroll
    for (int j = 0; j < KEY_BLOCKS; ++j) {
      const int row = block_of(place, j) * kBlock;
#pragma unroll
      for (int i = 0; i < VALUE_BLOCKS; ++i)
        put_left(left + (j * VALUE_BLOCKS + i) * kFragments, sums, row, i * kBlock);
#pragma unroll
      for (int n = 0; n < 4; ++n) keys[j][n] = sums.key(row + 4 * g + n);
    }
    sync_cta("sums put");
#pragma unroll 1
    for (; walk.goes_on(); walk.advance()) {
      const char* from = walk.rows();
      const char* of_grads = from + KEY_BLOCKS * kOfBlock;
      // Sums times gradients, of all blocks of channels.
      float products[KEY_BLOCKS][2][2][4] = {};
#pragma unroll
      for (int i = 0; i < VALUE_BLOCKS; ++i) {
        Row<Y_DTYPE> grad[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          grad[half].template read<4>(of_grads + i * kGrads, 8 * half + row_of(g), c);
#pragma unroll
        for (int j = 0; j < KEY_BLOCKS; ++j)
          multiply_left(products[j], left + (j * VALUE_BLOCKS + i) * kFragments, grad);
      }
      float scaled[2][2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Column<Q_DTYPE> q[KEY_BLOCKS][2];
        Raw<0, 2> cosine[KEY_BLOCKS][2], sine[KEY_BLOCKS][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int own = 8 * half + c + 4 * i;
#pragma unroll
          for (int j = 0; j < KEY_BLOCKS; ++j) {
            const char* rows = from + j * kOfBlock;
            q[j][i].template read<8>(rows, own, g);
            if constexpr (ROTARY) {
              cosine[j][i].template read<8>(rows + kQueries, own, g);
              sine[j][i].template read<8>(rows + kQueries + kTable, own, g);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // Of the last block, which is the own one.
          float features[4], turned[4], product[4];
          float normaliser = 0.0f, along = 0.0f;
#pragma unroll
          for (int j = 0; j < KEY_BLOCKS; ++j) {
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              features[n] = feature(q[j][i][n]);
              normaliser += features[n] * keys[j][n];
              product[n] = products[j][half][n / 2][n % 2 * 2 + i];
            }
            turn(features, cosine[j][i], sine[j][i], turned);
#pragma unroll
            for (int n = 0; n < 4; ++n) along += turned[n] * product[n];
          }
          float scale = 1.0f, by_normaliser = 0.0f;
          if constexpr (NORMALISE) {
            scale = rcp_fast(sum_columns(normaliser) + p.eps);
            by_normaliser = -scale * scale * sum_columns(along);
          }
          float back[4], by_query[4];
          turn_back(product, cosine[KEY_BLOCKS - 1][i], sine[KEY_BLOCKS - 1][i], back);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            scaled[half][i][n] = turned[n] * scale;
            const float by_feature = back[n] * scale + by_normaliser * keys[KEY_BLOCKS - 1][n];
            by_query[n] = by_feature * slope(features[n]);
            if (NORMALISE) found.keys[n] += features[n] * by_normaliser;
          }
          const int position = walk.first + 8 * half + c + 4 * i;
          if (writes && position < place.end)
            write<Q_DTYPE>(address(out, position, p.grad_q.position), by_query,
                           own_channels);
        }
      }
      Column<Y_DTYPE> grad[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        grad[i / 2][i % 2].template read<8>(of_grads + place.value_block * kGrads,
                                            i / 2 * 8 + c + i % 2 * 4, g);
      walk.ask_again(ask);
      found.add<Y_DTYPE>(scaled, grad);
    }
    found.finish(p, place, reinterpret_cast<float*>(ring), first, second);
  }

  // Blocks of keys in turn, the own one last.
  static MMVSSM_DEVICE int block_of(const Place& place, int j) {
    return KEY_BLOCKS == 1 ? 0 : (place.key_block + 1 + j) % KEY_BLOCKS;
  }
};

// From the gradients of the sums those of a block of keys and one of values.
struct KeysAndValues {
  static constexpr int kKeys = kRowsBytes<K_DTYPE>, kValues = kRowsBytes<V_DTYPE>;
  static constexpr int kOfBlock = kKeys + ROTARY * 2 * kTable;
  static constexpr int kStage = KEY_BLOCKS * kOfBlock + VALUE_BLOCKS * kValues;

  static MMVSSM_DEVICE void run(const Args& p, const Place& place, char* memory,
                                const Sums& grads) {
    const int g = lane_of() / 4, c = lane_of() % 4;
    auto* by_values = reinterpret_cast<float4*>(memory);
    float4* by_keys = by_values + VALUE_BLOCKS * kFragments;
    char* ring = memory + (VALUE_BLOCKS + KEY_BLOCKS) * kFragments * 16;
    // The block of both, of which one may have fewer.
    const int own = place.key_block;
    using CopyKeys = RowCopies<K_DTYPE>;
    using CopyValues = RowCopies<V_DTYPE>;
    char* keys = place.of(p.k, p.key_channels, kSize<K_DTYPE>) + CopyKeys::byte();
    char* values = place.of(p.v, p.value_channels, kSize<V_DTYPE>) + CopyValues::byte();
    const Angles angles(p, place);
    const int column = own * kBlock + 8 * c;
    char* key_out = place.of(p.grad_k, p.key_channels, kSize<K_DTYPE>) +
                    column * kSize<K_DTYPE>;
    char* value_out = place.of(p.grad_v, p.value_channels, kSize<V_DTYPE>) +
                      column * kSize<V_DTYPE>;
    const int key_channels = in_block(p.key_channels, own) - 8 * c;
    const int value_channels = in_block(p.value_channels, own) - 8 * c;

    const auto ask = [&](char* to, int row, bool whole) {
#pragma unroll
      for (int j = 0; j < KEY_BLOCKS; ++j) {
        const int channels = in_block(p.key_channels, j);
        char* rows = to + j * kOfBlock;
        CopyKeys::fill(rows, keys + j * kBlock * kSize<K_DTYPE>, p.k.position, row,
                       place.end, channels, 0, whole);
        angles.fill(rows + kKeys, j, row, place.end, channels, whole);
      }
#pragma unroll
      for (int i = 0; i < VALUE_BLOCKS; ++i)
        CopyValues::fill(to + KEY_BLOCKS * kOfBlock + i * kValues,
                         values + i * kBlock * kSize<V_DTYPE>, p.v.position, row,
                         place.end, in_block(p.value_channels, i), 0, whole);
    };
    Walk<kStage> walk(place, ring, are_full(p), ask);
    // For keys the gradients transposed, for values as they are.
    for (int i = 0; i < VALUE_BLOCKS; ++i)
      put_right(by_values + i * kFragments, grads, own * kBlock, i * kBlock, true);
    for (int j = 0; j < KEY_BLOCKS; ++j)
      put_right(by_keys + j * kFragments, grads, j * kBlock, own * kBlock, false);
    float of_keys[8];
#pragma unroll
    for (int n = 0; n < 8; ++n)
      of_keys[n] = NORMALISE ? grads.key(own * kBlock + 8 * c + n) : 0.0f;
    sync_cta("gradients put");
#pragma unroll 1
    for (; walk.goes_on(); walk.advance()) {
      const char* from = walk.rows();
      Row<K_DTYPE> k[KEY_BLOCKS][2];
      Row<V_DTYPE> v[VALUE_BLOCKS][2];
      Raw<0, 4> cosine[KEY_BLOCKS][2], sine[KEY_BLOCKS][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 8 * i + row_of(g);
#pragma unroll
        for (int j = 0; j < KEY_BLOCKS; ++j) {
          const char* rows = from + j * kOfBlock;
          k[j][i].template read<4>(rows, at, c);
          if constexpr (ROTARY) {
            cosine[j][i].template read<4>(rows + kKeys, at, c);
            sine[j][i].template read<4>(rows + kKeys + kTable, at, c);
          }
        }
#pragma unroll
        for (int j = 0; j < VALUE_BLOCKS; ++j)
          v[j][i].template read<4>(from + KEY_BLOCKS * kOfBlock + j * kValues, at, c);
      }
      walk.ask_again(ask);
      float by_turned[4][4] = {}, by_value[4][4] = {};
#pragma unroll
      for (int j = 0; j < VALUE_BLOCKS; ++j)
        multiply<V_DTYPE != 0>(by_turned, v[j], by_values + j * kFragments);
#pragma unroll
      for (int j = 0; j < KEY_BLOCKS; ++j) {
        float turned[2][8];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float features[8];
#pragma unroll
          for (int n = 0; n < 8; ++n) features[n] = feature(k[j][i][n]);
          turn(features, cosine[j][i], sine[j][i], turned[i]);
          if (j == own) {
            float back[8], grad[8];
#pragma unroll
            for (int n = 0; n < 8; ++n) grad[n] = by_turned[n / 2][2 * i + n % 2];
            turn_back(grad, cosine[j][i], sine[j][i], back);
#pragma unroll
            for (int n = 0; n < 8; ++n)
              grad[n] = (back[n] + of_keys[n]) * slope(features[n]);
            const int position = walk.first + 8 * i + row_of(g);
            if (position < place.end)
              write<K_DTYPE>(address(key_out, position, p.grad_k.position), grad,
                             key_channels);
          }
        }
        multiply<false>(by_value, turned, by_keys + j * kFragments);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float grad[8];
#pragma unroll
        for (int n = 0; n < 8; ++n) grad[n] = by_value[n / 2][2 * i + n % 2];
        const int position = walk.first + 8 * i + row_of(g);
        if (position < place.end)
          write<V_DTYPE>(address(value_out, position, p.grad_v.position), grad,
                         value_channels);
      }
    }
  }
};

}  // namespace mmvssm

MMVSSM_KERNEL(linear_attention_backward, mmvssm::Args, THREADS, RESIDENT) {
  using namespace mmvssm;
  constexpr int kMost = KEY_BLOCKS > VALUE_BLOCKS ? KEY_BLOCKS : VALUE_BLOCKS;
  const Place place(p, PASSES == 1 ? KEY_BLOCKS : kMost, PASSES == 1 ? VALUE_BLOCKS : 1);
  char* memory = shared_memory();
  if constexpr (kSums && kReads) {
    auto* here = reinterpret_cast<float*>(memory);
    memory += kSumsBytes;
    Queries::run(p, place, memory, here, nullptr);
    sync_cta("sums");
    // Found again, it took no registers in between.
    KeysAndValues::run(p, Place(p, 1, 1, fresh_zero()), memory, Sums(p, here));
  } else if constexpr (kSums) {
    Queries::run(p, place, memory, place.sums(p, p.grad_sums, place.split), nullptr);
  } else {
    KeysAndValues::run(p, place, memory, Sums(p, place.sums(p, p.grad_sums, 0)));
  }
}
