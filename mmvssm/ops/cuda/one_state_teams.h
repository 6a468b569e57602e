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

// Shows all lanes of the warp what own positions do, in shared memory where step sizes of
// the last own positions belong: decays and what is added side by side, those of
// gradients in the order in which gradients go.
struct TeamWalk {
  static constexpr int kRow = kThreads * kWidth * 4;
  static constexpr int kFirst = kOwn - 4;  // own position whose place is the first
  char *forward, *backward;

  MMVSSM_DEVICE explicit TeamWalk(char* map) {
    forward = map + (kFirst * kThreads + threadIdx.x) * kWidth * 4;
    // The team is last as often as the other one is first.
    backward = map + ((kFirst + 2) * kThreads + (threadIdx.x ^ 4 * (kTeams - 1))) * kWidth * 4;
  }

  MMVSSM_DEVICE void put(const Sides& own) const {
    put_pairs(forward, own.decay, own.forward);
    put_pairs(backward, own.decay, own.backward);
  }
  static MMVSSM_DEVICE void put_pairs(char* to, const float (&decay)[kWidth],
                                      const float (&added)[kWidth]) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
      *reinterpret_cast<float4*>(to + k * kRow) =
          float4{decay[2 * k], added[2 * k], decay[2 * k + 1], added[2 * k + 1]};
  }

  // One lane for each channel and direction: from what comes to the chunk what comes to
  // each team.
  static MMVSSM_DEVICE void walk(char* smem, char* map) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int side = lane / 16, c = lane / 4 % kWidth;
    const Quad& quad = mmvssm::quad(smem, number_of_quad());
    float x = side ? quad.carry[c] : quad.states[c];
    char* at = map + (kFirst + side * 2 + c / 2) * kRow +
               (warp * 32 + lane % 4) * kWidth * 4 + c % 2 * 8;
#pragma unroll
    for (int team = 0; team < kTeams; ++team) {
      float2* own = reinterpret_cast<float2*>(at + team * 4 * kWidth * 4);
      const float2 step = *own;
      own->x = x;
      x = step.x * x + step.y;
    }
  }

  // What comes to own positions.
  MMVSSM_DEVICE void get(float (&h)[kWidth], float (&g)[kWidth]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float4 state = *reinterpret_cast<const float4*>(forward + k * kRow);
      const float4 gradient = *reinterpret_cast<const float4*>(backward + k * kRow);
      h[2 * k] = state.x, h[2 * k + 1] = state.z;
      g[2 * k] = gradient.x, g[2 * k + 1] = gradient.z;
    }
  }
};

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
// is before the first one is in its place already.
MMVSSM_DEVICE void look_back(const Args& p, const Own& own, int index, const Sides& sides,
                             Quad& quad) {
  float g[kWidth];
  load_channels<kFloat32>(reinterpret_cast<const char*>(quad.carry), g);
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
  if (own.team > 0) return;
  step.apply(g);
  store_channels<kFloat32>(reinterpret_cast<char*>(quad.carry), g);
  if (index % kLookBack == kLookBack - 1) {
    chunk.apply(g);
    published.put_state(index, g);
  }
}

}  // namespace mmvssm
