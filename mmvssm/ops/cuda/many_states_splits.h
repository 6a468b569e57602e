// Splits of a sequence that are walked side by side: what each one starts from.
//
// A split finds out what it makes of a zero state, and publishes that and the sum of its
// dt. Each reads what those before it, of its group, have published, and for the groups
// before that one state, which the last split of a group publishes once it knows it.
// CTAs wait for those of lower number only, and always combine in the same order.
#pragma once

#include "many_states.h"

namespace mmvssm {

constexpr int kSplitsOfGroup = 8;
constexpr int kPublishedWords = kStates / 2 + 1;  // of a thread and split
constexpr uint64_t kNotYet = ~uint64_t{0};

MMVSSM_DEVICE uint64_t pack_floats(float low, float high) {
  const uint64_t both = bits_of(low) | static_cast<uint64_t>(bits_of(high)) << 32;
  // NaN of this kind would never be seen to be there; any other one does as well.
  return both == kNotYet ? kNotYet >> 1 : both;
}

template <int kLanes>
struct Splits {
  static constexpr int kOwn = kStates / kLanes;
  const Inputs& p;
  int number, chain;  // the number in the order in which the splits are walked

  MMVSSM_DEVICE Splits(const Inputs& inputs, const Work& work)
      : p(inputs), number(blockIdx.x / inputs.chains), chain(work.chain) {}

  MMVSSM_DEVICE void publish_split(const States<kLanes>& h, float sum) const {
    put(number, h, sum);
  }

  // The state before this split, from the one before the first.
  MMVSSM_DEVICE void find_start(const States<kLanes>& rates,
                                const States<kLanes>& before,
                                States<kLanes>& h) const {
    const int group = number / kSplitsOfGroup;
    States<kLanes> since = {}, base;
    float sum = 0.0f;
#pragma unroll 1
    for (int i = group * kSplitsOfGroup; i < number; ++i) {
      States<kLanes> added;
      const float own = get(i, added);
      combine(rates, own, since, added, since);
      sum += own;
    }
    if (group > 0) {
      get(p.splits + group - 1, base);
      combine(rates, sum, base, since, h);
    } else {
      combine(rates, sum, before, since, h);
    }
  }

  // Tells the groups that follow, if there are any and this is the last split of one.
  MMVSSM_DEVICE void publish_group(const States<kLanes>& rates, const States<kLanes>& h,
                                   const States<kLanes>& added, float sum) const {
    if ((number + 1) % kSplitsOfGroup != 0 || number + 1 == p.splits) return;
    States<kLanes> after;
    combine(rates, sum, h, added, after);
    put(p.splits + number / kSplitsOfGroup, after, 0.0f);
  }

 private:
  MMVSSM_DEVICE uint64_t* words(int entry) const {
    const int64_t row = static_cast<int64_t>(entry) * p.chains + chain;
    return p.published + row * kPublishedWords * kThreads + threadIdx.x;
  }

  MMVSSM_DEVICE void put(int entry, const States<kLanes>& h, float sum) const {
    uint64_t* to = words(entry);
#pragma unroll
    for (int i = 0; i < kStates / 2; ++i)
      publish(to + i * kThreads, pack_floats(h[2 * i / kOwn][2 * i % kOwn],
                                             h[(2 * i + 1) / kOwn][(2 * i + 1) % kOwn]));
    publish(to + kStates / 2 * kThreads, pack_floats(sum, 0.0f));
  }

  MMVSSM_DEVICE float get(int entry, States<kLanes>& h) const {
    const uint64_t* from = words(entry);
    uint64_t found[kPublishedWords];
    for (;;) {
      bool there = true;
#pragma unroll
      for (int i = 0; i < kPublishedWords; ++i) {
        found[i] = read_published(from + i * kThreads);
        there = there && found[i] != kNotYet;
      }
      // The whole warp waits: what is the same for all its lanes stays known to be so.
      if (!any_lane(!there)) break;
      spin_pause();
    }
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      h[i / kOwn][i % kOwn] =
          float_of(static_cast<uint32_t>(found[i / 2] >> (i % 2 * 32)));
    return float_of(static_cast<uint32_t>(found[kStates / 2]));
  }

  // What is made of h in a split: its decay, by the sum of dt, and what it adds.
  MMVSSM_DEVICE static void combine(const States<kLanes>& rates, float sum,
                                    const States<kLanes>& h, const States<kLanes>& added,
                                    States<kLanes>& result) {
    float sums[kLanes];
    spread<kLanes>(sum, sums);
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        // A growth that overflows must not turn a zero state into NaN.
        const float decay = fminf(exp2_fast(rates[k][i] * sums[k]), kLargest);
        result[k][i] = decay * h[k][i] + added[k][i];
      }
  }
};

}  // namespace mmvssm
