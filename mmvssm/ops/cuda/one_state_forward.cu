// The selective scan with one state a channel: outputs, the last state, and the states
// before the chunks.
#include "one_state_dt.h"
#include "one_state_exchange.h"

namespace mmvssm {

static_assert(Layout::kBytes == SHARED, "as Python has it");

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

  // B (0) or C (1) at own positions.
  static MMVSSM_DEVICE void read_weights(const char* smem, const Own& own, int buffer,
                                         int which, float (&x)[kOwn]) {
    const float4* from = reinterpret_cast<const float4*>(
        smem + Layout::kWeights +
        ((2 * buffer + which) * kPositions + own.team * kOwn) * 4);
#pragma unroll
    for (int i = 0; i < kOwn / 4; ++i) {
      const float4 four = from[i];
      x[4 * i] = four.x, x[4 * i + 1] = four.y;
      x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
  }

  // From zero; returns the step of all own positions.
  MMVSSM_DEVICE Step start(const char* smem, const StepSizes& sizes, const Own& own,
                           int buffer, int left) {
    float B[kOwn], rate[kWidth], shift[kWidth];
    read_weights(smem, own, buffer, 0, B);
    get_parameter<Layout>(smem, kRate, own, rate);
    get_parameter<Layout>(smem, kShift, own, shift);
    Step step;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float dt[kWidth], u[kWidth];
      sizes.read(buffer, i, shift, dt);
      sizes.finish(i, left, dt);
      read_u(smem, own, buffer, i, u);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        a[i][c] = exp2_fast(rate[c] * dt[c]);
        b[i][c] = dt[c] * u[c] * B[i];
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
  static constexpr int kFirst = 2;
  char* to;
  const char* add;
  char* sums;  // in shared memory
  float first[kFirst][kWidth];

  MMVSSM_DEVICE Outputs(const Args& p, const ScanPointers& scan, const Chain& chain,
                        const Own& own, char* smem) {
    to = scan.out + chain.batch * p.out_strides.batch +
         (chain.channel + own.channel) * next_channel<OUT_DTYPE>(p.out_strides);
    add = reinterpret_cast<const char*>(scan.add) + chain.batch * p.add_strides.batch +
          (chain.channel + own.channel) * next_channel<kFloat32>(p.add_strides);
    sums = smem + Layout::kDt + (own.team * kOwn * kDtPitch + own.channel) * 4;
  }

  // With VECTOR channels lie side by side.
  template <int kDtype>
  static MMVSSM_DEVICE int64_t next_channel(const Strides& strides) {
    return VECTOR ? kSize<kDtype> : strides.channel;
  }

  static MMVSSM_DEVICE void read_places(const char* smem, const Own& own, int buffer,
                                        int (&places)[kOwn]) {
    const int* from = reinterpret_cast<const int*>(smem + Layout::kPlaces) +
                      buffer * kPositions + own.team * kOwn;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) places[i] = from[i];
  }

  // Begins to bring in what is to be added: that of the first positions to registers,
  // because the team's step is where they would be, and the others where this thread
  // alone has had its step sizes.
  MMVSSM_DEVICE void begin(const Args& p, const char* smem, const Own& own,
                           int buffer) {
    if constexpr (ADD) {
      int places[kOwn];
      read_places(smem, own, buffer, places);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const bool there = places[i] >= 0 && own.count > 0;
        const char* row = at(add, places[i], p.add_strides.position);
        char* sum = sums + i * kDtPitch * 4;
        if constexpr (VECTOR)
          if (i >= kFirst) {
            copy_async_or_zero<kWidth * 4>(sum, row, there);
            continue;
          }
        float x[kWidth];
        own.fetch(row, p.add_strides.channel, there, x);
        if (i >= kFirst) store_channels<kFloat32>(sum, x);
#pragma unroll
        for (int c = 0; c < kWidth; ++c)
          if (i < kFirst) first[i][c] = x[c];
      }
      copy_commit();
    }
  }

  // From the state before own positions, which becomes that behind them.
  MMVSSM_DEVICE void finish(const Args& p, const char* smem, const Own& own,
                            const Recurrence& recurrence, int buffer,
                            float (&h)[kWidth]) const {
    float C[kOwn], skip[kWidth];
    int places[kOwn];
    read_places(smem, own, buffer, places);
    get_parameter<Layout>(smem, kSkip, own, skip);
    Recurrence::read_weights(smem, own, buffer, 1, C);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float u[kWidth], y[kWidth] = {};
      Recurrence::read_u(smem, own, buffer, i, u);
      if (ADD && i >= kFirst) load_channels<kFloat32>(sums + i * kDtPitch * 4, y);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        h[c] = recurrence.a[i][c] * h[c] + recurrence.b[i][c];
        if (ADD && i < kFirst) y[c] = first[i][c];
        const float own = multiply_add(skip[c], u[c], C[i] * h[c]);
        y[c] = ADD ? y[c] + own : own;
      }
      if constexpr (GATE) {
        float z[kWidth];
        load_channels<U_DTYPE>(smem + Layout::kZ + buffer * kRowsBytes<U_DTYPE> +
                                   (own.team * kOwn + i) * kPitch<U_DTYPE> +
                                   own.channel * kSize<U_DTYPE>,
                               z);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) y[c] *= silu(z[c]);
      }
      own.store<OUT_DTYPE>(
          const_cast<char*>(at(to, places[i], p.out_strides.position)),
          p.out_strides.channel, places[i] >= 0, y);
    }
  }
};

}  // namespace mmvssm

MMVSSM_KERNEL(one_state_forward, mmvssm::Args, THREADS, mmvssm::kCtas) {
  using namespace mmvssm;
  char* smem = shared_memory();
  const Chain chain(p);
  const Own own(chain);
  const ScanPointers& scan = p.scans[chain.scan];
  const StepSizes sizes(own, smem);
  const TeamSteps teams(smem, own);
  float* carry = reinterpret_cast<float*>(smem + Layout::kCarry) + own.channel;
  Outputs outputs(p, scan, chain, own, smem);
  Supply supply(p, chain);
  Held held;
  put_parameters<Layout>(scan, chain, smem);
  if constexpr (kProjects) {
    put_dt_weight<Layout>(scan, chain, smem);
    supply.pad_low_rank(smem);
  }
  supply.fetch(p, smem, chain.begin, 0, held);
  supply.put(smem, 0, held);
  if (own.team == 0) {
    const float zeros[kWidth] = {};
    store_channels<kFloat32>(reinterpret_cast<char*>(carry), zeros);
  }

  const int channels = p.groups * p.group_size;
  float* saved = scan.saved + chain.channel +
                 static_cast<int64_t>(chain.batch) * (p.chunks - 1) * channels;
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
    if (rarely(left < kOwn && scan.last_state != nullptr)) {
      sizes.hide(buffer, left);
    }
    Recurrence recurrence;
    Step step = recurrence.start(smem, sizes, own, buffer, left);
    teams.put(own.team, step);
    // First, because to wait for loads may be to wait for those behind them, too.
    if (more) supply.put(smem, buffer ^ 1, held);
    outputs.begin(p, smem, own, buffer);
    sync_cta("exchange");
    float h[kWidth];
    load_channels<kFloat32>(reinterpret_cast<char*>(carry + buffer * kChannels), h);
    if (rarely(p.published != nullptr)) {
      look_back(p, smem, own, chunk, teams, h);
    }
    if (scan.saved != nullptr && own.team == 0 && chunk > 0)
      own.store_states(saved + static_cast<int64_t>(chunk - 1) * channels, h);
    teams.walk(own.team, h);
    if constexpr (ADD) copy_wait<0>();
    outputs.finish(p, smem, own, recurrence, buffer, h);
    buffer ^= 1;
    if (own.team == kTeams - 1)
      store_channels<kFloat32>(reinterpret_cast<char*>(carry + buffer * kChannels), h);
  }
  if (own.team == kTeams - 1) {
    float h[kWidth];
    load_channels<kFloat32>(reinterpret_cast<char*>(carry + buffer * kChannels), h);
    if (p.published != nullptr && chain.end % kLookBack == 0)
      Published(p, own).put_state(chain.end - 1, h);
    if (scan.last_state != nullptr && chain.end == p.chunks)
      own.store_states(scan.last_state + chain.row(p, 0), h);
  }
}
