// How states and gradients get from team to team, from chunk to chunk and from CTA to
// CTA in the backward pass. A state goes forward through the teams of a warp, what the
// gradients of the later positions add goes backward; both decay alike.
#pragma once

#include "one_state_warps.h"

namespace mmvssm {

// What own positions do: to a state that comes, and to a gradient that comes from behind.
struct Sides {
  float decay[kWidth], forward[kWidth], backward[kWidth];
};

// From the state before the chunk and the gradient from behind it, those of own
// positions: h and g are both.
MMVSSM_DEVICE void pass_on(int team, Sides& own, float (&h)[kWidth], float (&g)[kWidth]) {
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    float decay = own.decay[c];
    float forward = own.forward[c], backward = own.backward[c];
    if (team == 0) forward += decay * h[c];
    if (team == kTeams - 1) backward += decay * g[c];
#pragma unroll
    for (int by = 1; by < kTeams; by *= 2) {
      // `decay` is of the `by` positions up to own ones, `back` of those from them on.
      const float back = by == 1 ? decay : shuffle_down(decay, 4 * (by - 1));
      const float before = shuffle_up(forward, 4 * by);
      const float behind = shuffle_down(backward, 4 * by);
      if (team >= by) forward += decay * before;
      if (team < kTeams - by) backward += back * behind;
      // An overflowing growth must not turn a zero into NaN.
      if (2 * by < kTeams) decay = fminf(decay * shuffle_up(decay, 4 * by), kLargest);
    }
    const float before = shuffle_up(forward, 4), behind = shuffle_down(backward, 4);
    if (team > 0) h[c] = before;
    if (team < kTeams - 1) g[c] = behind;
  }
}

// The steps of all teams one after the other, for the first team; those of the later
// teams come first if `kBackward`.
template <bool kBackward>
MMVSSM_DEVICE void append_teams(Step& step) {
#pragma unroll
  for (int by = 1; by < kTeams; by *= 2) {
    Step other;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      other.decay[c] = shuffle_down(step.decay[c], 4 * by);
      other.added[c] = shuffle_down(step.added[c], 4 * by);
    }
    if (kBackward) {
      other.append(step);
      step = other;
    } else {
      step.append(other);
    }
    step.limit();
  }
}

// The gradient from behind a chunk, which is number `index` from the last one on. What
// is before the first one is `g` already.
MMVSSM_DEVICE void look_back(const Args& p, const Own& own, int index, const Sides& sides,
                             float (&g)[kWidth]) {
  const Published published(p, own);
  Step step;
#pragma unroll
  for (int c = 0; c < kWidth; ++c)
    step.decay[c] = sides.decay[c], step.added[c] = sides.backward[c];
  step.limit();
  append_teams<true>(step);
  if (own.team == 0 && index + 1 < p.chunks) published.put_step(index, step);
  const Step chunk = step;
  // Each team waits for two of the chunks since the latest published gradient.
  const int base = index / kLookBack * kLookBack;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) step.decay[c] = 1.0f, step.added[c] = 0.0f;
#pragma unroll 1
  for (int i = base + own.team * 2; i < base + own.team * 2 + 2 && i < index; ++i) {
    Step next;
    published.get_step(i, next);
    step.append(next);
  }
  step.limit();
  append_teams<false>(step);
  if (base > 0) published.get_state(base - 1, g);
#pragma unroll
  for (int c = 0; c < kWidth; ++c)
    g[c] = shuffle(step.decay[c] * g[c] + step.added[c], threadIdx.x % 4, 32);
  if (own.team == 0 && index % kLookBack == kLookBack - 1) {
    float behind[kWidth];
#pragma unroll
    for (int c = 0; c < kWidth; ++c) behind[c] = g[c];
    chunk.apply(behind);
    published.put_state(index, behind);
  }
}

}  // namespace mmvssm
