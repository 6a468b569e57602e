// Gradients of linear attention: by queries with those of the sums, by keys and values
// with the latter, or all.
#include "linear_attention.h"

namespace mmvssm {

// The sums as the left factor of products with gradients by rows: in lane 4 g + c rows
// 4g + 2m + i % 2 and columns 8c + 2k + i / 2.
constexpr int kLeft = 2 * 4 * kWarp;
MMVSSM_DEVICE void put_left(float4* to, const Sums& sums, int row, int column) {
#pragma unroll
  for (int first = 0; first < kLeft; first += THREADS) {
    const int n = first + threadIdx.x;
    const int g = n % kWarp / 4, c = n % 4, m = n / kWarp / 4, k = n / kWarp % 4;
    float x[4], high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] = sums.at(row + 4 * g + 2 * m + i % 2, column + 8 * c + 2 * k + i / 2);
    split(x, high, low);
    to[n] = {high[0], high[1], high[2], high[3]};
    to[n + kLeft] = {low[0], low[1], low[2], low[3]};
  }
}

// Adds sums times gradients: of channels 4g + 2m + i / 2 and, of each half of the rows,
// c + i % 2 * 4.
MMVSSM_DEVICE void multiply_left(float (&sum)[2][2][4], const float4* left,
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
      const float4 b = left[(m * 4 + k) * kWarp + lane_of() + kLeft];
      const float left_high[4] = {a.x, a.y, a.z, a.w};
      const float left_low[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma_1688(sum[half][m], left_low, high[half]);
        if constexpr (!kExact) mma_1688(sum[half][m], left_high, low[half]);
        mma_1688(sum[half][m], left_high, high[half]);
      }
    }
  }
}

// With y = n / m, n = turned q times the sums, m = q keys + eps and the gradient g of y:
// the gradients of n and m are g / m and -(g / m) n / m, the latter being
// -turned q (sums g) / m / m, for which n is not needed.
struct Queries {
  using CopyQueries = RowCopies<Q_DTYPE>;
  using CopyGrads = RowCopies<Y_DTYPE>;
  static constexpr int kQueries = kRowsBytes<Q_DTYPE>, kGrads = kRowsBytes<Y_DTYPE>;
  static constexpr int kOfBlock = kQueries + ROTARY * 2 * kTable;
  static constexpr int kStage = KEY_BLOCKS * kOfBlock + VALUE_BLOCKS * kGrads;
  static constexpr int kOwn = KEY_BLOCKS - 1;

  const Args& p;
  const Place& place;
  char *queries, *grads, *out;
  Angles angles;
  float4* left;
  float keys[KEY_BLOCKS][4];
  Accumulator found;

  MMVSSM_DEVICE Queries(const Args& p, const Place& place, char* memory)
      : p(p), place(place), angles(p, place), left(reinterpret_cast<float4*>(memory)) {
    queries = place.of(p.q, p.key_channels, kSize<Q_DTYPE>) + CopyQueries::byte();
    grads = place.of(p.y, p.value_channels, kSize<Y_DTYPE>) + CopyGrads::byte();
    out = place.of(p.grad_q, p.key_channels, kSize<Q_DTYPE>) +
          (place.key_block * kBlock + lane_of() / 4 * 4) * kSize<Q_DTYPE>;
  }

  // Blocks of keys in turn, the own one last.
  MMVSSM_DEVICE int block_of(int j) const {
    return KEY_BLOCKS == 1 ? 0 : (place.key_block + 1 + j) % KEY_BLOCKS;
  }

  MMVSSM_DEVICE void ask(char* to, int row, bool whole) const {
#pragma unroll
    for (int j = 0; j < KEY_BLOCKS; ++j) {
      const int block = block_of(j), channels = in_block(p.key_channels, block);
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
  }

  MMVSSM_DEVICE void put(const Sums& sums) {
#pragma unroll
    for (int j = 0; j < KEY_BLOCKS; ++j) {
      const int row = block_of(j) * kBlock;
#pragma unroll
      for (int i = 0; i < VALUE_BLOCKS; ++i)
        put_left(left + (j * VALUE_BLOCKS + i) * kFragments, sums, row, i * kBlock);
#pragma unroll
      for (int n = 0; n < 4; ++n) keys[j][n] = sums.key(row + lane_of() / 4 * 4 + n);
    }
    sync_cta("sums put");
  }

  // Sums times gradients of the rows, for all blocks of keys.
  MMVSSM_DEVICE void multiply_sums(const char* of_grads,
                                   float (&products)[KEY_BLOCKS][2][2][4]) const {
    const int g = lane_of() / 4, c = lane_of() % 4;
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
  }

  // Writes the gradient of a row of queries; gives the turned ones over the normaliser.
  MMVSSM_DEVICE void take_row(const char* from, int position, int row,
                              const float (&products)[KEY_BLOCKS][4],
                              float (&scaled)[4]) {
    const int g = lane_of() / 4;
    // In the end those of the own block.
    float features[4], turned[4];
    Raw<0, 2> cosine, sine;
    float normaliser = 0.0f, along = 0.0f;
#pragma unroll
    for (int j = 0; j < KEY_BLOCKS; ++j) {
      const char* rows = from + j * kOfBlock;
      Column<Q_DTYPE> q;
      q.template read<8>(rows, row, g);
      if constexpr (ROTARY) {
        cosine.template read<8>(rows + kQueries, row, g);
        sine.template read<8>(rows + kQueries + kTable, row, g);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        features[n] = feature(q[n]);
        normaliser += features[n] * keys[j][n];
      }
      turn(features, cosine, sine, turned);
#pragma unroll
      for (int n = 0; n < 4; ++n) along += turned[n] * products[j][n];
    }
    float scale = 1.0f, by_normaliser = 0.0f;
    if constexpr (NORMALISE) {
      scale = rcp_fast(sum_columns(normaliser) + p.eps);
      by_normaliser = -scale * scale * sum_columns(along);
    }
    float grad[4];
    turn_back(products[kOwn], cosine, sine, grad);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      scaled[n] = turned[n] * scale;
      grad[n] = (grad[n] * scale + by_normaliser * keys[kOwn][n]) * slope(features[n]);
      if (NORMALISE) found.keys[n] += features[n] * by_normaliser;
    }
    if (place.value_block == 0 && position < place.end)
      write<Q_DTYPE>(address(out, position, p.grad_q.position), grad,
                     in_block(p.key_channels, place.key_block) - 4 * g);
  }

  MMVSSM_DEVICE void run(char* memory, float* first, float* second) {
    char* ring = memory + KEY_BLOCKS * VALUE_BLOCKS * kFragments * 16;
    Walk<kStage> walk(place, ring, are_full(p), *this);
    put(Sums(p, place.sums(p, p.sums, 0)));
#pragma unroll 1
    for (; walk.goes_on(); walk.advance()) {
      const char* from = walk.rows();
      const char* of_grads = from + KEY_BLOCKS * kOfBlock;
      float products[KEY_BLOCKS][2][2][4] = {}, scaled[2][2][4];
      multiply_sums(of_grads, products);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i / 2 * 8 + lane_of() % 4 + i % 2 * 4;
        float own[KEY_BLOCKS][4];
#pragma unroll
        for (int n = 0; n < 4 * KEY_BLOCKS; ++n)
          own[n / 4][n % 4] = products[n / 4][i / 2][n % 4 / 2][n % 2 * 2 + i % 2];
        take_row(from, walk.first + row, row, own, scaled[i / 2][i % 2]);
      }
      Column<Y_DTYPE> grad[2][2];
      read_columns(of_grads + place.value_block * kGrads, grad);
      walk.ask_again(*this);
      found.add<Y_DTYPE>(scaled, grad);
    }
    found.finish(p, place, reinterpret_cast<float*>(ring), first, second);
  }
};

// From the gradients of the sums those of a block of keys and one of values.
struct KeysAndValues {
  using CopyKeys = RowCopies<K_DTYPE>;
  using CopyValues = RowCopies<V_DTYPE>;
  static constexpr int kKeys = kRowsBytes<K_DTYPE>, kValues = kRowsBytes<V_DTYPE>;
  static constexpr int kOfBlock = kKeys + ROTARY * 2 * kTable;
  static constexpr int kStage = KEY_BLOCKS * kOfBlock + VALUE_BLOCKS * kValues;

  const Args& p;
  const Place& place;
  int own;  // the block of both, of which one may have fewer
  char *keys, *values, *key_out, *value_out;
  Angles angles;
  float4 *by_values, *by_keys;  // the gradients of the sums, transposed and as they are
  float of_keys[8];

  MMVSSM_DEVICE KeysAndValues(const Args& p, const Place& place, char* memory)
      : p(p), place(place), own(place.key_block), angles(p, place) {
    by_values = reinterpret_cast<float4*>(memory);
    by_keys = by_values + VALUE_BLOCKS * kFragments;
    keys = place.of(p.k, p.key_channels, kSize<K_DTYPE>) + CopyKeys::byte();
    values = place.of(p.v, p.value_channels, kSize<V_DTYPE>) + CopyValues::byte();
    const int column = own * kBlock + lane_of() % 4 * 8;
    key_out =
        place.of(p.grad_k, p.key_channels, kSize<K_DTYPE>) + column * kSize<K_DTYPE>;
    value_out =
        place.of(p.grad_v, p.value_channels, kSize<V_DTYPE>) + column * kSize<V_DTYPE>;
  }

  MMVSSM_DEVICE void ask(char* to, int row, bool whole) const {
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
                       values + i * kBlock * kSize<V_DTYPE>, p.v.position, row, place.end,
                       in_block(p.value_channels, i), 0, whole);
  }

  MMVSSM_DEVICE void put(const Sums& grads) {
#pragma unroll
    for (int i = 0; i < VALUE_BLOCKS; ++i)
      put_right(by_values + i * kFragments, grads, own * kBlock, i * kBlock, true);
#pragma unroll
    for (int j = 0; j < KEY_BLOCKS; ++j)
      put_right(by_keys + j * kFragments, grads, j * kBlock, own * kBlock, false);
#pragma unroll
    for (int n = 0; n < 8; ++n)
      of_keys[n] = NORMALISE ? grads.key(own * kBlock + lane_of() % 4 * 8 + n) : 0.0f;
    sync_cta("gradients put");
  }

  // Writes a row of a gradient.
  template <int kDtype>
  MMVSSM_DEVICE void write_row(const Rows& to, char* out, int position, int channels,
                               const float (&grad)[8]) const {
    if (position < place.end)
      write<kDtype>(address(out, position, to.position), grad,
                    in_block(channels, own) - lane_of() % 4 * 8);
  }

  MMVSSM_DEVICE void run(char* memory, const Sums& grads) {
    char* ring = memory + (VALUE_BLOCKS + KEY_BLOCKS) * kFragments * 16;
    Walk<kStage> walk(place, ring, are_full(p), *this);
    put(grads);
    const int own_row = row_of(lane_of() / 4);
#pragma unroll 1
    for (; walk.goes_on(); walk.advance()) {
      const char* from = walk.rows();
      TurningRows<K_DTYPE> k[KEY_BLOCKS], of_block;
      Row<V_DTYPE> v[VALUE_BLOCKS][2];
#pragma unroll
      for (int j = 0; j < KEY_BLOCKS; ++j) k[j].read(from + j * kOfBlock, kKeys);
      of_block.read(from + (KEY_BLOCKS == 1 ? 0 : own) * kOfBlock, kKeys);
#pragma unroll
      for (int i = 0; i < VALUE_BLOCKS; ++i)
        read_rows(from + KEY_BLOCKS * kOfBlock + i * kValues, v[i]);
      walk.ask_again(*this);
      float by_turned[4][4] = {}, by_value[4][4] = {}, grad[8];
#pragma unroll
      for (int i = 0; i < VALUE_BLOCKS; ++i)
        multiply<V_DTYPE != 0>(by_turned, v[i], by_values + i * kFragments);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float features[8], turned[8], by_feature[8];
        of_block.take(i, features, turned);
        row_of_sum(by_turned, i, grad);
        turn_back(grad, of_block.cosine[i], of_block.sine[i], by_feature);
#pragma unroll
        for (int n = 0; n < 8; ++n)
          grad[n] = (by_feature[n] + of_keys[n]) * slope(features[n]);
        write_row<K_DTYPE>(p.grad_k, key_out, walk.first + 8 * i + own_row,
                           p.key_channels, grad);
      }
#pragma unroll
      for (int j = 0; j < KEY_BLOCKS; ++j) {
        float features[8], turned[2][8];
#pragma unroll
        for (int i = 0; i < 2; ++i) k[j].take(i, features, turned[i]);
        multiply<false>(by_value, turned, by_keys + j * kFragments);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        row_of_sum(by_value, i, grad);
        write_row<V_DTYPE>(p.grad_v, value_out, walk.first + 8 * i + own_row,
                           p.value_channels, grad);
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
    Queries(p, place, memory).run(memory, here, nullptr);
    sync_cta("sums");
    // Found again, it took no registers in between.
    const Place again(p, 1, 1, fresh_zero());
    KeysAndValues(p, again, memory).run(memory, Sums(p, here));
  } else if constexpr (kSums) {
    float* sums = place.sums(p, p.grad_sums, place.split);
    Queries(p, place, memory).run(memory, sums, nullptr);
  } else {
    const Sums grads(p, place.sums(p, p.grad_sums, 0));
    KeysAndValues(p, place, memory).run(memory, grads);
  }
}
