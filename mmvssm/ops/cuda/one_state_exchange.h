// How states get from team to team, from chunk to chunk, and from CTA to CTA.
//
// What positions do to a state h is decay h + added. The teams hand these two around
// through shared memory. CTAs that look back publish those of their chunk, and every
// kLookBack chunks the state itself; a CTA starts from the latest of these states before
// it and goes through the chunks behind that in order. Each number is its own flag, and
// the order of the sums is fixed: the same bits, whoever comes first.
#pragma once

#include "one_state_inputs.h"

namespace mmvssm {

// Of own channels.
struct Step {
  float decay[kWidth], added[kWidth];

  // This step, and then the other one.
  MMVSSM_DEVICE void append(const Step& next) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      decay[c] *= next.decay[c];
      added[c] = next.decay[c] * added[c] + next.added[c];
    }
  }
  MMVSSM_DEVICE void apply(float (&h)[kWidth]) const {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) h[c] = decay[c] * h[c] + added[c];
  }
  // An overflowing growth must not turn a zero state into NaN.
  MMVSSM_DEVICE void limit() {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) decay[c] = fminf(decay[c], kLargest);
  }

  // Two rows of float32 in shared memory.
  MMVSSM_DEVICE void put(char* to, int pitch) const {
    store_channels<kFloat32>(to, decay);
    store_channels<kFloat32>(to + pitch, added);
  }
  MMVSSM_DEVICE void get(const char* from, int pitch) {
    load_channels<kFloat32>(from, decay);
    load_channels<kFloat32>(from + pitch, added);
  }
};

// The steps of the teams, in the first two rows of Layout::kDt that each has.
struct TeamSteps {
  static constexpr int kRow = kDtPitch * 4, kTeam = Layout::kDtRows * kRow;
  char* base;  // of own channels

  MMVSSM_DEVICE TeamSteps(char* smem, const Own& own)
      : base(smem + Layout::kDt + own.channel * 4) {}
  MMVSSM_DEVICE void put(int team, Step& step) const {
    step.limit();
    step.put(base + team * kTeam, kRow);
  }
  MMVSSM_DEVICE void get(int team, Step& step) const {
    step.get(base + team * kTeam, kRow);
  }
  // The state before a team from that before the first one.
  MMVSSM_DEVICE void walk(int team, float (&h)[kWidth]) const {
#pragma unroll 1
    for (int i = 0; i < team; ++i) {  // on average some 4 trips
      Step step;
      get(i, step);
      step.apply(h);
    }
  }
};

constexpr int kLookBack = 2 * kTeams;  // chunks from one published state to the next

// What CTAs publish: steps (chain, chunk, channel), then states (chain, chunk /
// kLookBack, channel), with the channels of a CTA in its last axis.
struct Published {
  uint64_t *steps, *states;  // of own channels of the chain

  MMVSSM_DEVICE Published(const Args& p, const Own& own) {
    const int64_t chain = blockIdx.x % p.chains;
    steps = p.published + chain * p.chunks * kChannels + own.channel;
    states = p.published +
             (static_cast<int64_t>(p.chains) * p.chunks +
              chain * ((p.chunks + kLookBack - 1) / kLookBack)) *
                 kChannels +
             own.channel;
  }

  MMVSSM_DEVICE void put_step(int chunk, Step& step) const {
    step.limit();
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const uint64_t added = bits_of(step.added[c]);
      publish(steps + static_cast<int64_t>(chunk) * kChannels + c,
              bits_of(step.decay[c]) | added << 32);
    }
  }
  MMVSSM_DEVICE void put_state(int chunk, const float (&h)[kWidth]) const {
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      publish(states + static_cast<int64_t>(chunk / kLookBack) * kChannels + c,
              bits_of(h[c]));
  }
  MMVSSM_DEVICE void get_step(int chunk, Step& step) const {
    uint64_t words[kWidth];
    wait_for(steps + static_cast<int64_t>(chunk) * kChannels, words);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      step.decay[c] = float_of(static_cast<uint32_t>(words[c]));
      step.added[c] = float_of(static_cast<uint32_t>(words[c] >> 32));
    }
  }
  MMVSSM_DEVICE void get_state(int chunk, float (&h)[kWidth]) const {
    uint64_t words[kWidth];
    wait_for(states + static_cast<int64_t>(chunk / kLookBack) * kChannels, words);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) h[c] = float_of(static_cast<uint32_t>(words[c]));
  }

  // The memory is filled with ones, which no published number is: the upper half of a
  // state is zero, and a decay is no NaN. All are asked for before one is waited for.
  static MMVSSM_DEVICE void wait_for(const uint64_t* from, uint64_t (&words)[kWidth]) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) words[c] = read_published(from + c);
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      while (words[c] == ~static_cast<uint64_t>(0)) {
        spin_pause();
        words[c] = read_published(from + c);
      }
  }
};

// The state before chunk `chunk`, of which the steps of all teams are there. Each team
// waits for two of the chunks since the latest published state, the last one for that.
MMVSSM_DEVICE void look_back(const Args& p, char* smem, const Own& own, int chunk,
                             const TeamSteps& teams, float (&h)[kWidth]) {
  const Published published(p, own);
  Step step, next;
  if (own.team == 0 && chunk + 1 < p.chunks) {
    teams.get(0, step);
#pragma unroll 1
    for (int i = 1; i < kTeams; ++i) {
      teams.get(i, next);
      step.append(next);
    }
    published.put_step(chunk, step);
  }
  // The second buffer of u is free: such a CTA has one chunk.
  char* shared = smem + Layout::kU + kRowsBytes<U_DTYPE> + own.channel * 4;
  constexpr int kRow = kChannels * 4;
  static_assert((kTeams + 1) * 2 * kRow <= kRowsBytes<U_DTYPE>, "it has room");
  const int base = chunk / kLookBack * kLookBack;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) step.decay[c] = 1.0f, step.added[c] = 0.0f;
#pragma unroll 1
  for (int i = base + own.team * 2; i < base + own.team * 2 + 2 && i < chunk; ++i) {
    published.get_step(i, next);
    step.append(next);
  }
  step.limit();
  step.put(shared + own.team * 2 * kRow, kRow);
  if (own.team == kTeams - 1) {
    if (base > 0)
      published.get_state(base - 1, step.added);
    else
      for (int c = 0; c < kWidth; ++c) step.added[c] = 0.0f;
    store_channels<kFloat32>(shared + kTeams * 2 * kRow, step.added);
  }
  sync_cta("look back");
  load_channels<kFloat32>(shared + kTeams * 2 * kRow, h);
#pragma unroll 1
  for (int i = 0; i < kTeams; ++i) {
    step.get(shared + i * 2 * kRow, kRow);
    step.apply(h);
  }
}

}  // namespace mmvssm
