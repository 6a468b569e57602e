// The selective scan with one state a channel: outputs, the last state, and the states
// before the chunks.
#include "one_state_dt.h"
#include "one_state_exchange.h"

namespace mmvssm {

struct Parameters {
  float rate[kWidth], skip[kWidth];

  MMVSSM_DEVICE Parameters(const ScanPointers& scan, const Chain& chain, const Own& own) {
    own.load(scan.A + chain.channel, rate);
    own.load(scan.D == nullptr ? nullptr : scan.D + chain.channel, skip);
  }
};

// Own part of the recurrence, h = a h + b at each position.
struct Recurrence {
  float a[kOwn][kWidth], b[kOwn][kWidth];

  // What u is at own positions: in shared memory.
  static MMVSSM_DEVICE void read_u(const char* smem, const Own& own, int buffer, int i,
                                   float (&u)[kWidth]) {
    load_channels<U_DTYPE>(smem + Layout::kU + buffer * kRowsBytes<U_DTYPE> +
                               (own.team * kOwn + i) * kPitch<U_DTYPE> +
                               own.channel * kSize<U_DTYPE>,
                           u);
  }

  // From zero; returns the step of all own positions.
  MMVSSM_DEVICE Step start(const char* smem, const StepSizes& sizes, const Own& own,
                           const Parameters& parameters, int buffer, int left) {
    const float2* weights = reinterpret_cast<const float2*>(smem + Layout::kWeights) +
                            buffer * kPositions + own.team * kOwn;
    Step step;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float dt[kWidth], u[kWidth];
      sizes.read(buffer, i, dt);
      sizes.finish(i, left, dt);
      read_u(smem, own, buffer, i, u);
      const float B = weights[i].x;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        a[i][c] = exp2_fast(parameters.rate[c] * dt[c]);
        b[i][c] = dt[c] * u[c] * B;
        step.added[c] = i == 0 ? b[i][c] : a[i][c] * step.added[c] + b[i][c];
        step.decay[c] = i == 0 ? a[i][c] : a[i][c] * step.decay[c];
      }
    }
    return step;
  }
};

MMVSSM_DEVICE float silu(float z) {
  return z * rcp_fast(1.0f + exp2_fast(-z * kLog2E));
}

// Own part of the outputs.
struct Outputs {
  char* to;
  const char* add;
  int places[kOwn];
  float sums[kOwn][kWidth];

  MMVSSM_DEVICE Outputs(const Args& p, const ScanPointers& scan, const Chain& chain,
                        const Own& own) {
    to = scan.out + chain.batch * p.out_strides.batch +
         (chain.channel + own.channel) * p.out_strides.channel;
    add = reinterpret_cast<const char*>(scan.add) + chain.batch * p.add_strides.batch +
          (chain.channel + own.channel) * p.add_strides.channel;
  }

  // Looks up the places, and begins to load what is to be added there.
  MMVSSM_DEVICE void begin(const Args& p, const ScanPointers& scan, const char* smem,
                           const Own& own, int buffer) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      places[i] = reinterpret_cast<const int*>(
          smem + Layout::kPlaces)[buffer * kPositions + own.team * kOwn + i];
    if constexpr (ADD) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int c = 0; c < kWidth; ++c) sums[i][c] = 0.0f;
        if (scan.add != nullptr && places[i] >= 0)
          own.fetch<kFloat32>(address(const_cast<char*>(add), places[i],
                                      static_cast<int>(p.add_strides.position)),
                              p.add_strides.channel, sums[i]);
      }
    }
  }

  // From the state before own positions, which becomes that behind them.
  MMVSSM_DEVICE void finish(const Args& p, const char* smem, const Own& own,
                            const Parameters& parameters, const Recurrence& recurrence,
                            int buffer, float (&h)[kWidth]) {
    const float2* weights = reinterpret_cast<const float2*>(smem + Layout::kWeights) +
                            buffer * kPositions + own.team * kOwn;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float u[kWidth], y[kWidth];
      Recurrence::read_u(smem, own, buffer, i, u);
      const float C = weights[i].y;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        h[c] = recurrence.a[i][c] * h[c] + recurrence.b[i][c];
        y[c] = ADD ? C * h[c] + sums[i][c] : C * h[c];
        y[c] = parameters.skip[c] * u[c] + y[c];
      }
      if constexpr (GATE) {
        float z[kWidth];
        load_channels<Z_DTYPE>(smem + Layout::kZ + buffer * kRowsBytes<Z_DTYPE> +
                                   (own.team * kOwn + i) * kPitch<Z_DTYPE> +
                                   own.channel * kSize<Z_DTYPE>,
                               z);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) y[c] *= silu(z[c]);
      }
      if (places[i] >= 0)
        own.store<OUT_DTYPE>(
            address(to, places[i], static_cast<int>(p.out_strides.position)),
            p.out_strides.channel, y);
    }
  }
};

}  // namespace mmvssm

MMVSSM_KERNEL(one_state_forward, mmvssm::Args, THREADS, (511 + THREADS) / THREADS) {
  using namespace mmvssm;
  char* smem = shared_memory();
  const Chain chain(p);
  const Own own(chain);
  const ScanPointers& scan = p.scans[chain.scan];
  const Parameters parameters(scan, chain, own);
  const StepSizes sizes(scan, chain, own, smem);
  const TeamSteps teams(smem, own);
  float* carry = reinterpret_cast<float*>(smem + Layout::kCarry) + own.channel;
  Outputs outputs(p, scan, chain, own);
  Supply supply(p, chain);
  Held held;
  if constexpr (kProjects) {
    prepare_weights(scan, chain, smem);
    supply.pad_low_rank(smem);
  }
  supply.fetch(p, smem, chain.begin, 0, held);
  supply.put(smem, 0, held);
  if (own.team == 0) {
    const float zeros[kWidth] = {};
    store_channels<kFloat32>(reinterpret_cast<char*>(carry), zeros);
  }

  int buffer = 0;
#pragma unroll 1
  for (int chunk = chain.begin; chunk < chain.end; ++chunk) {
    const int left = p.length - chunk * kPositions - own.team * kOwn;
    const bool more = chunk + 1 < chain.end;
    copy_wait<0>();
    sync_cta("inputs");
    if (more) supply.fetch(p, smem, chunk + 1, buffer ^ 1, held);
    if constexpr (kProjects) {
      project(smem);
      sync_cta("dt");
    }
    if (scan.last_state != nullptr && left < kOwn) sizes.hide(buffer, left);
    Recurrence recurrence;
    Step step = recurrence.start(smem, sizes, own, parameters, buffer, left);
    teams.put(own.team, step);
    outputs.begin(p, scan, smem, own, buffer);
    sync_cta("exchange");
    if (more) supply.put(smem, buffer ^ 1, held);
    float h[kWidth];
    if (p.published != nullptr)
      look_back(p, smem, own, chunk, teams, h);
    else
      load_channels<kFloat32>(reinterpret_cast<char*>(carry + buffer * kChannels), h);
    if (scan.saved != nullptr && own.team == 0 && chunk > 0)
      own.store_states(scan.saved + chain.row(p, chunk - 1), h);
    teams.walk(own.team, h);
    outputs.finish(p, smem, own, parameters, recurrence, buffer, h);
    buffer ^= 1;
    if (own.team == kTeams - 1) {
      store_channels<kFloat32>(reinterpret_cast<char*>(carry + buffer * kChannels), h);
      if (p.published != nullptr && chunk % kLookBack == kLookBack - 1)
        Published(p, own).put_state(chunk, h);
      if (scan.last_state != nullptr && chunk + 1 == p.chunks)
        own.store_states(scan.last_state + chain.row(p, 0), h);
    }
  }
}
