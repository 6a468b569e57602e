// linear_attention over splits of the positions of a head, forward and backward.
//
// The keys of a head give its sums, which all queries read. In the backward pass the
// queries give the gradients of the sums, which all keys and values read. An item of
// work is a split of the positions. The sums of the splits are added up in order. In a
// split one block of positions after the other is worked on: it is read, elu + 1 and
// the rotation are taken, and all its products are made while it is in the cache.
//
// The sums of a head are the mean feature of its keys (key channel), and the mean
// product of turned keys and values, a matrix (key channel, value channel) in panels.
#pragma once

#include "functions.h"
#include "panels.h"
#include "parallel.h"

namespace mmvssm {
namespace MMVSSM_ISA {

// How many numbers the sums of a head are, and those of all heads.
static int64_t sums_of(const AttentionArgs& p) {
  return in_panels(p.keys) * (1 + in_panels(p.values));
}
static int64_t all_sums(const AttentionArgs& p) {
  return p.batch * p.heads * sums_of(p);
}

// Positions of a split: so many that its sums are not more numbers than a quarter of
// what they are made of.
static int64_t split_length(const AttentionArgs& p) {
  const int64_t keys = in_panels(p.keys), values = in_panels(p.values);
  const int64_t blocks = 4 * keys * values / (keys + values) / kBlock;
  return (blocks > 4 ? blocks : 4) * kBlock;
}
static int64_t splits_of(const AttentionArgs& p) {
  return (p.length + split_length(p) - 1) / split_length(p);
}

// Cosines and sines for two vectors of channels; neighbouring channels are a pair.
struct Angles {
  vfloat turn_low(vfloat x) const {
    return x * zip_low(cosines, cosines) + swap_pairs(x) * zip_low(-sines, sines);
  }
  vfloat turn_high(vfloat x) const {
    return x * zip_high(cosines, cosines) + swap_pairs(x) * zip_high(-sines, sines);
  }
  const vfloat cosines, sines;
};

// A split of the positions of a head, and the block of it that is worked on.
class AttentionItem {
 public:
  static int64_t floats(const AttentionArgs& p) {
    const int64_t keys = in_panels(p.keys), values = in_panels(p.values);
    return (3 * keys + 2 * values + 3) * kBlock + keys * values;
  }

  AttentionItem(const AttentionArgs& p, int64_t item, Arena* arena)
      : p(p),
        keys(in_panels(p.keys)),
        values(in_panels(p.values)),
        features(arena->take(keys * kBlock)),
        turned(p.cosine == nullptr ? features : arena->take(keys * kBlock)),
        grad(arena->take(keys * kBlock)),
        read(arena->take(values * kBlock)),
        written(arena->take(values * kBlock)),
        ones(arena->take(kBlock)),
        inverse(arena->take(kBlock)),
        by_normaliser(arena->take(kBlock)),
        transposed(arena->take(keys * values)),
        head_(item % p.heads),
        split_(item / p.heads % splits_of(p)),
        batch_(item / p.heads / splits_of(p)),
        end_(smaller_of((split_ + 1) * split_length(p), p.length)) {
    // The rows that the last block lacks are multiplied, too.
    if (p.length % kBlock)
      __builtin_memset(features, 0, (char*)transposed - (char*)features);
    __builtin_memset(by_normaliser, 0, kBlock * 4);
    for (int64_t i = 0; i < kBlock; ++i) ones[i] = 1;
  }

  // Loops over the blocks.
  void start() { begin_ = split_ * split_length(p); }
  bool done() const { return begin_ >= end_; }
  void next() { begin_ += kBlock; }
  int64_t rows() const { return smaller_of(end_ - begin_, kBlock); }

  // The sums of this head, and of this split of it.
  int64_t first_sum() const { return (batch_ * p.heads + head_) * sums_of(p); }
  float* part() const { return p.parts + split_ * all_sums(p) + first_sum(); }

  // Reads queries or keys as features, and turns these.
  void read_features(const Array& x) const {
    const Array rows = head_of(x, batch_, head_, p.keys);
    x.dtype == kFloat32 ? read_features_as<float>(rows)
                        : read_features_as<bfloat16>(rows);
  }

  // Writes gradients of queries or keys, from `grad`, that of the turned features, and
  // from what each position adds to it: its factor times `mean`.
  void write_gradient(const float* mean, const float* by_position,
                      const Array& x) const {
    const Array rows = head_of(x, batch_, head_, p.keys);
    x.dtype == kFloat32 ? write_gradient_as<float>(mean, by_position, rows)
                        : write_gradient_as<bfloat16>(mean, by_position, rows);
  }

  // Reads and writes values, each position times its factor.
  void read_values(const Array& x, const float* by_position) const {
    const auto read_as =
        x.dtype == kFloat32 ? read_block<float> : read_block<bfloat16>;
    read_as(head_of(x, batch_, head_, p.values), begin_, rows(), p.values, by_position,
            read);
  }
  void write_values(const Array& x, const float* by_position) const {
    const auto write_as =
        x.dtype == kFloat32 ? write_block<float> : write_block<bfloat16>;
    write_as(written, begin_, rows(), p.values, by_position,
             head_of(x, batch_, head_, p.values));
  }

  // inverse = 1 / (features mean + eps), or 1.
  void invert_normalisers(const float* mean) const {
    if (p.normalise) inner_products<true>(features, mean, keys, inverse);
    for (int64_t i = 0; i < kBlock; i += kLanes)
      store(inverse + i, p.normalise ? 1.0f / (load(inverse + i) + p.eps)
                                     : broadcast(1.0f));
  }

  // mean += the sum of the features of all positions, times their factors.
  void add_features(const float* by_position, float* mean) const {
    for (int64_t c = 0; c < keys; c += kLanes) {
      const float* column = features + c / kPanel * kPanel * kBlock + c % kPanel;
      vfloat sum = {};
      for (int64_t i = 0; i < rows(); ++i)
        sum += by_position[i] * load(column + i * kPanel);
      store(mean + c, load(mean + c) + sum);
    }
  }

  const AttentionArgs& p;
  const int64_t keys, values;  // in panels
  float *const features, *const turned, *const grad;  // of queries or keys
  float *const read, *const written;                  // of values
  // A number for each position: 1, 1 / normaliser, and the normaliser's gradient.
  float *const ones, *const inverse, *const by_normaliser;
  float* const transposed;                            // (value channel, key channel)

 private:
  // Cosines and sines of a row of a panel, filled up in `few`.
  void find_tables(int64_t first, int64_t row, float (&few)[2][kPanel],
                   const float** cosine, const float** sine) const {
    const int64_t pairs = p.keys / 2, pair = first / 2;
    const int64_t at = ((begin_ + row) * p.heads + head_) * pairs + pair;
    *cosine = p.cosine + at, *sine = p.sine + at;
    if (pairs - pair >= kPanel / 2) return;
    __builtin_memcpy(few[0], *cosine, (pairs - pair) * 4);
    __builtin_memcpy(few[1], *sine, (pairs - pair) * 4);
    *cosine = few[0], *sine = few[1];
  }

  template <class T>
  void read_features_as(const Array& x) const {
    T few[kPanel];
    float tables[2][kPanel] = {};
    const float *cosine = nullptr, *sine = nullptr;
    for (int64_t first = 0; first < p.keys; first += kPanel) {
      for (int64_t i = 0; i < rows(); ++i) {
        // What fills up a row has the feature zero.
        const T* row = whole_row((const T*)x.data + (begin_ + i) * x.stride[0] + first,
                                 p.keys - first, -__builtin_inff(), few);
        const int64_t at = first * kBlock + i * kPanel;
        if (p.cosine != nullptr) find_tables(first, i, tables, &cosine, &sine);
        for (int64_t c = 0; c < kPanel; c += 2 * kLanes) {
          const vfloat low = elu_plus_one(load(row + c));
          const vfloat high = elu_plus_one(load(row + c + kLanes));
          store(features + at + c, low);
          store(features + at + c + kLanes, high);
          if (p.cosine == nullptr) continue;
          const Angles angles = {load(cosine + c / 2), load(sine + c / 2)};
          store(turned + at + c, angles.turn_low(low));
          store(turned + at + c + kLanes, angles.turn_high(high));
        }
      }
    }
  }

  template <class T>
  void write_gradient_as(const float* mean, const float* by_position,
                         const Array& x) const {
    T few[kPanel];
    float tables[2][kPanel] = {};
    const float *cosine = nullptr, *sine = nullptr;
    for (int64_t first = 0; first < p.keys; first += kPanel) {
      const int64_t left = p.keys - first;
      for (int64_t i = 0; i < rows(); ++i) {
        T* to = (T*)x.data + (begin_ + i) * x.stride[0] + first;
        T* row = left < kPanel ? few : to;
        const int64_t at = first * kBlock + i * kPanel;
        if (p.cosine != nullptr) find_tables(first, i, tables, &cosine, &sine);
        for (int64_t c = 0; c < kPanel; c += 2 * kLanes) {
          vfloat low = load(grad + at + c), high = load(grad + at + c + kLanes);
          if (p.cosine != nullptr) {
            const Angles angles = {load(cosine + c / 2), -load(sine + c / 2)};
            low = angles.turn_low(low), high = angles.turn_high(high);
          }
          low += by_position[i] * load(mean + first + c);
          high += by_position[i] * load(mean + first + c + kLanes);
          store(row + c, low * slope(features + at + c));
          store(row + c + kLanes, high * slope(features + at + c + kLanes));
        }
        if (left < kPanel) __builtin_memcpy(to, few, left * sizeof(T));
      }
    }
  }

  // The derivative of a feature: 1 above 0, and below it the feature.
  static vfloat slope(const float* features) {
    return smaller(broadcast(1.0f), load(features));
  }

  const int64_t head_, split_, batch_, end_;
  int64_t begin_ = 0;
};

// What is done with an item.
typedef void (*AttentionPass)(AttentionItem&);

// The sums of a split of the keys.
static void sum_keys(AttentionItem& item) {
  const AttentionArgs& p = item.p;
  float* sums = item.part();
  __builtin_memset(sums, 0, sums_of(p) * 4);
  for (item.start(); !item.done(); item.next()) {
    item.read_features(p.k);
    item.read_values(p.v, item.ones);
    item.add_features(item.ones, sums);
    add_products(item.turned, item.read, item.rows(), p.keys, p.values,
                 sums + item.keys);
  }
}

// The output of a split of the queries.
static void read_sums(AttentionItem& item) {
  const AttentionArgs& p = item.p;
  const float* sums = p.sums + item.first_sum();
  for (item.start(); !item.done(); item.next()) {
    item.read_features(p.q);
    multiply(item.turned, sums + item.keys, item.rows(), p.keys, item.keys, p.values,
             item.written);
    item.invert_normalisers(sums);
    item.write_values(p.out, item.inverse);
  }
}

// The gradients of a split of the queries, and what it adds to those of the sums. With
// t a turned query, S the mean products, n the normaliser and g the gradient of
// y = t S / n, the gradient of t is S g / n, and that of n is -<t, S g / n> / n.
static void differentiate_queries(AttentionItem& item) {
  const AttentionArgs& p = item.p;
  const float* sums = p.sums + item.first_sum();
  float* grad_sums = item.part();
  __builtin_memset(grad_sums, 0, sums_of(p) * 4);
  transpose_panels(sums + item.keys, item.keys, item.values, item.transposed);
  for (item.start(); !item.done(); item.next()) {
    item.read_features(p.q);
    item.invert_normalisers(sums);
    item.read_values(p.grad_out, item.inverse);
    add_products(item.turned, item.read, item.rows(), p.keys, p.values,
                 grad_sums + item.keys);
    multiply(item.read, item.transposed, item.rows(), p.values, item.values, p.keys,
             item.grad);
    if (p.normalise) {
      inner_products<false>(item.turned, item.grad, item.keys, item.by_normaliser);
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        float* at = item.by_normaliser + i;
        store(at, -load(at) * load(item.inverse + i));
      }
      item.add_features(item.by_normaliser, grad_sums);
    }
    item.write_gradient(sums, item.by_normaliser, p.grad_q);
  }
}

// The gradients of a split of keys and values.
static void differentiate_keys(AttentionItem& item) {
  const AttentionArgs& p = item.p;
  const float* grad_sums = p.grad_sums + item.first_sum();
  transpose_panels(grad_sums + item.keys, item.keys, item.values, item.transposed);
  for (item.start(); !item.done(); item.next()) {
    item.read_features(p.k);
    item.read_values(p.v, item.ones);
    multiply(item.turned, grad_sums + item.keys, item.rows(), p.keys, item.keys,
             p.values, item.written);
    item.write_values(p.grad_v, item.ones);
    multiply(item.read, item.transposed, item.rows(), p.values, item.values, p.keys,
             item.grad);
    item.write_gradient(grad_sums, item.ones, p.grad_k);
  }
}

// Sums as means over all positions, from those of the splits.
static void add_splits(const AttentionArgs& p, int64_t begin, int64_t end,
                       float* sums) {
  for (int64_t i = begin; i < end; i += kLanes) {
    vfloat sum = {};
    for (int64_t split = 0; split < splits_of(p); ++split)
      sum += load(p.parts + split * all_sums(p) + i);
    store(sums + i, sum / (float)p.length);
  }
}

// The items of a call: one pass, some of the sums, or all of a head without splits.

template <AttentionPass pass>
static bool run_pass(const AttentionArgs& p, int64_t index, Arena* arena) {
  AttentionItem item(p, index, arena);
  pass(item);
  return false;
}

constexpr int64_t kSumsOfItem = 4096;

template <float* AttentionArgs::*sums>
static bool run_sums(const AttentionArgs& p, int64_t index, Arena*) {
  const int64_t begin = index * kSumsOfItem;
  add_splits(p, begin, smaller_of(begin + kSumsOfItem, all_sums(p)), p.*sums);
  return false;
}

template <AttentionPass first, float* AttentionArgs::*sums, AttentionPass second>
static bool run_head(const AttentionArgs& p, int64_t index, Arena* arena) {
  AttentionItem item(p, index, arena);
  first(item);
  add_splits(p, item.first_sum(), item.first_sum() + sums_of(p), p.*sums);
  second(item);
  return false;
}

template <AttentionPass first, float* AttentionArgs::*sums, AttentionPass second>
static int32_t run_passes(AttentionArgs p, const Threads& threads) {
  const int64_t splits = splits_of(p), items = p.batch * p.heads * splits;
  const int64_t floats = AttentionItem::floats(p);
  Arena parts(splits * all_sums(p));
  if (parts.failed()) return kOutOfMemory;
  p.parts = parts.take(splits * all_sums(p));
  if (splits == 1)
    return run_items(p, items, floats, run_head<first, sums, second>, threads);
  const int64_t groups = (all_sums(p) + kSumsOfItem - 1) / kSumsOfItem;
  int32_t status = run_items(p, items, floats, run_pass<first>, threads);
  if (status == kDone) status = run_items(p, groups, 16, run_sums<sums>, threads);
  if (status == kDone)
    status = run_items(p, items, floats, run_pass<second>, threads);
  return status;
}

static int32_t attention_forward(const AttentionArgs& p, const Threads& threads) {
  return run_passes<sum_keys, &AttentionArgs::sums, read_sums>(p, threads);
}

static int32_t attention_backward(const AttentionArgs& p, const Threads& threads) {
  return run_passes<differentiate_queries, &AttentionArgs::grad_sums,
                    differentiate_keys>(p, threads);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
