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

static inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

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

// Turns pairs of neighbouring channels of one row of a panel by angles with these
// cosines and sines, or back. `turned` may be x.
template <bool back>
static inline void turn_row(const float* x, const float* cosine, const float* sine,
                            float* turned) {
  for (int64_t c = 0; c < kPanel; c += 2 * kLanes) {
    const vfloat cosines = load(cosine + c / 2);
    const vfloat sines = back ? -load(sine + c / 2) : load(sine + c / 2);
    const vfloat low = load(x + c), high = load(x + c + kLanes);
    store(turned + c, low * zip_low(cosines, cosines) +
                          swap_pairs(low) * zip_low(-sines, sines));
    store(turned + c + kLanes, high * zip_high(cosines, cosines) +
                                   swap_pairs(high) * zip_high(-sines, sines));
  }
}

// A split of the positions of a head, and the block of it that is worked on.
class AttentionItem {
 public:
  static int64_t floats(const AttentionArgs& p) {
    const int64_t keys = in_panels(p.keys), values = in_panels(p.values);
    return (3 * keys + 2 * values + 2) * kBlock + keys * values;
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
        factors(arena->take(kBlock)),
        others(arena->take(kBlock)),
        transposed(arena->take(keys * values)),
        head_(item % p.heads),
        split_(item / p.heads % splits_of(p)),
        batch_(item / p.heads / splits_of(p)),
        end_(smaller_of((split_ + 1) * split_length(p), p.length)) {
    // The rows that a block lacks are multiplied, too.
    __builtin_memset(features, 0, (char*)transposed - (char*)features);
  }

  // Loops over the blocks.
  void start() { begin_ = split_ * split_length(p); }
  bool done() const { return begin_ >= end_; }
  void next() { begin_ += kBlock; }
  int64_t rows() const { return smaller_of(end_ - begin_, kBlock); }

  // The sums of this head, and of this split of it.
  int64_t first_sum() const { return (batch_ * p.heads + head_) * sums_of(p); }
  float* part() const {
    return p.parts + split_ * all_sums(p) + first_sum();
  }

  // Reads queries or keys as features, and turns these.
  void read_features(const Array& x) const {
    // The feature of what a panel has too much is zero.
    const float filling = -__builtin_inff();
    read_block(head_of(x, batch_, head_, p.keys), begin_, rows(), p.keys, filling,
               features);
    for (int64_t first = 0; first < keys; first += kPanel) {
      float* panel = features + first * kBlock;
      for (int64_t i = 0; i < rows() * kPanel; i += kLanes)
        store(panel + i, elu_plus_one(load(panel + i)));
    }
    turn<false>(features, turned);
  }

  void read_values(const Array& x) const {
    read_block(head_of(x, batch_, head_, p.values), begin_, rows(), p.values, 0, read);
  }
  void write_values(const Array& x) const {
    write_block(written, begin_, rows(), p.values, head_of(x, batch_, head_, p.values));
  }

  // factors = 1 / (features mean + eps).
  void invert_normalisers(const float* mean) const {
    inner_products<true>(features, mean, keys, factors);
    for (int64_t i = 0; i < kBlock; i += kLanes)
      store(factors + i, 1.0f / (load(factors + i) + p.eps));
  }

  // Gradients of queries or keys, from `grad`, that of the turned features, and from
  // what each position adds to it: its factor times `mean`.
  void write_gradient(const float* mean, const float* by_position,
                      const Array& x) const {
    turn<true>(grad, grad);
    for (int64_t first = 0; first < keys; first += kPanel) {
      for (int64_t i = 0; i < rows(); ++i) {
        for (int64_t c = 0; c < kPanel; c += kLanes) {
          const int64_t at = first * kBlock + i * kPanel + c;
          const vfloat sum = load(grad + at) + by_position[i] * load(mean + first + c);
          // The derivative of a feature is 1 above 0, and below it the feature.
          store(grad + at, sum * smaller(broadcast(1.0f), load(features + at)));
        }
      }
    }
    write_block(grad, begin_, rows(), p.keys, head_of(x, batch_, head_, p.keys));
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
  float *const factors, *const others;                // one for each position
  float* const transposed;                            // (value channel, key channel)

 private:
  template <bool back>
  void turn(const float* x, float* to) const {
    if (p.cosine == nullptr) return;
    const int64_t pairs = p.keys / 2, width = p.heads * pairs;
    float few[2][kPanel / 2] = {};
    for (int64_t first = 0; first < pairs; first += kPanel / 2) {
      const int64_t left = pairs - first;
      for (int64_t i = 0; i < rows(); ++i) {
        const int64_t at = (begin_ + i) * width + head_ * pairs + first;
        const float *cosine = p.cosine + at, *sine = p.sine + at;
        if (left < kPanel / 2) {
          __builtin_memcpy(few[0], cosine, left * 4);
          __builtin_memcpy(few[1], sine, left * 4);
          cosine = few[0], sine = few[1];
        }
        const int64_t row = 2 * first * kBlock + i * kPanel;
        turn_row<back>(x + row, cosine, sine, to + row);
      }
    }
  }

  const int64_t head_, split_, batch_, end_;
  int64_t begin_ = 0;
};

// Of a block, one for each position.
alignas(64) static const float kOnes[kBlock] = {
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// What is done with an item.
typedef void (*AttentionPass)(AttentionItem&);

// The sums of a split of the keys.
static void sum_keys(AttentionItem& item) {
  const AttentionArgs& p = item.p;
  float* sums = item.part();
  __builtin_memset(sums, 0, sums_of(p) * 4);
  for (item.start(); !item.done(); item.next()) {
    item.read_features(p.k);
    item.read_values(p.v);
    item.add_features(kOnes, sums);
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
    if (p.normalise) {
      item.invert_normalisers(sums);
      scale_rows(item.written, item.rows(), p.values, item.factors);
    }
    item.write_values(p.out);
  }
}

// The gradients of a split of the queries, and what it adds to those of the sums. With t
// a turned query, S the mean products, n the normaliser and g the gradient of y = t S / n:
// the gradient of t is S g / n, and that of n is -<t, S g / n> / n.
static void differentiate_queries(AttentionItem& item) {
  const AttentionArgs& p = item.p;
  const float* sums = p.sums + item.first_sum();
  float* grad_sums = item.part();
  __builtin_memset(grad_sums, 0, sums_of(p) * 4);
  transpose_panels(sums + item.keys, item.keys, item.values, item.transposed);
  for (item.start(); !item.done(); item.next()) {
    item.read_features(p.q);
    item.read_values(p.grad_out);
    if (p.normalise) {
      item.invert_normalisers(sums);
      scale_rows(item.read, item.rows(), p.values, item.factors);
    }
    add_products(item.turned, item.read, item.rows(), p.keys, p.values,
                 grad_sums + item.keys);
    multiply(item.read, item.transposed, item.rows(), p.values, item.values, p.keys,
             item.grad);
    if (p.normalise) {
      inner_products<false>(item.turned, item.grad, item.keys, item.others);
      for (int64_t i = 0; i < kBlock; i += kLanes)
        store(item.others + i, -load(item.others + i) * load(item.factors + i));
      item.add_features(item.others, grad_sums);
    }
    item.write_gradient(sums, item.others, p.grad_q);
  }
}

// The gradients of a split of keys and values.
static void differentiate_keys(AttentionItem& item) {
  const AttentionArgs& p = item.p;
  const float* grad_sums = p.grad_sums + item.first_sum();
  transpose_panels(grad_sums + item.keys, item.keys, item.values, item.transposed);
  for (item.start(); !item.done(); item.next()) {
    item.read_features(p.k);
    item.read_values(p.v);
    multiply(item.turned, grad_sums + item.keys, item.rows(), p.keys, item.keys,
             p.values, item.written);
    item.write_values(p.grad_v);
    multiply(item.read, item.transposed, item.rows(), p.values, item.values, p.keys,
             item.grad);
    item.write_gradient(grad_sums, kOnes, p.grad_k);
  }
}

// Sums as means over all positions, from those of the splits.
static void add_splits(const AttentionArgs& p, int64_t begin, int64_t end, float* sums) {
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
static int32_t run_passes(AttentionArgs p, ParallelFor parallel_for) {
  const int64_t splits = splits_of(p), items = p.batch * p.heads * splits;
  const int64_t floats = AttentionItem::floats(p);
  Arena parts(splits * all_sums(p));
  if (parts.failed()) return kOutOfMemory;
  p.parts = parts.take(splits * all_sums(p));
  if (splits == 1)
    return run_items(p, items, floats, run_head<first, sums, second>, parallel_for);
  const int64_t groups = (all_sums(p) + kSumsOfItem - 1) / kSumsOfItem;
  int32_t status = run_items(p, items, floats, run_pass<first>, parallel_for);
  if (status == kDone) status = run_items(p, groups, 16, run_sums<sums>, parallel_for);
  if (status == kDone)
    status = run_items(p, items, floats, run_pass<second>, parallel_for);
  return status;
}

static int64_t attention_sums(int64_t keys, int64_t values) {
  return in_panels(keys) * (1 + in_panels(values));
}

static int32_t attention_forward(const AttentionArgs& p, ParallelFor parallel_for) {
  return run_passes<sum_keys, &AttentionArgs::sums, read_sums>(p, parallel_for);
}

static int32_t attention_backward(const AttentionArgs& p, ParallelFor parallel_for) {
  return run_passes<differentiate_queries, &AttentionArgs::grad_sums,
                    differentiate_keys>(p, parallel_for);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
