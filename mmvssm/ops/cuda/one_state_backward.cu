// The selective scan with one state a channel: gradients of all inputs.
//
// A CTA goes through its chunks from the last to the first, or does one and looks back
// at what CTAs of later chunks found. Of a chunk it recomputes the decays and the states,
// from the state before it, and then goes back through them with the gradient.
#include "one_state_teams.h"

namespace mmvssm {

// Puts what belongs to channels into shared memory.
MMVSSM_DEVICE void put_channels(const BackwardArgs& p, const Chain& chain, char* smem) {
  if (threadIdx.x < kChannels / kWidth)
    quad(smem, threadIdx.x) = Quad(p, chain, threadIdx.x * kWidth);
  if (threadIdx.x == 0)
    *reinterpret_cast<ChainRows*>(smem + WarpLayout::kChain) = ChainRows(p, chain);
  if (threadIdx.x < kOwn)
    reinterpret_cast<int*>(smem + WarpLayout::kMissing)[threadIdx.x] = -1;
}

// 1 - 2^-dt, the derivative of the softplus, times log2(e).
MMVSSM_DEVICE float softplus_slope(float dt) {
  const float slope = kLog2E - kLog2E * exp2_fast(-dt);
  if constexpr (DELTA_DTYPE != kFloat32) return slope;
  // For float32 accurate in relative terms, by a polynomial (error 3e-8).
  float p = 1.6654660e-3f;
  p = p * dt - 1.3766981e-2f;
  p = p * dt + 8.0057147e-2f;
  p = p * dt - 0.34657265f;
  p = p * dt + 1.0f;
  return dt < 0.5f ? p * dt : slope;
}

MMVSSM_DEVICE float sigmoid(float x) {
  return rcp_fast(1.0f + exp2_fast(-x * kLog2E));
}

// The maps of a chunk in shared memory.
struct Maps {
  char* smem;
  int channels;  // of the CTA

  // Pointer to the first channel of own part of rows that are copied.
  template <int kDtype>
  MMVSSM_DEVICE const char* from(const char* Quad::* map) const {
    const int channel = RowParts<kDtype>::channel();
    return quad(smem, channel / kWidth).*map + channel % kWidth * kSize<kDtype>;
  }

  // Begins to bring in a chunk.
  MMVSSM_DEVICE void fetch(const BackwardArgs& p, int buffer) const {
    constexpr int kDelta = kProjects ? kFloat32 : DELTA_DTYPE;
    using U = RowParts<U_DTYPE>;
    using GradOut = RowParts<GRAD_DTYPE>;
    using Delta = RowParts<kDelta>;
    int of_u[U::kCopies], of_grad_out[GradOut::kCopies], of_delta[Delta::kCopies];
    U::look_up(smem, buffer, channels, of_u);
    GradOut::look_up(smem, buffer, channels, of_grad_out);
    if constexpr (!kProjects) Delta::look_up(smem, buffer, channels, of_delta);
    const char* u = from<U_DTYPE>(&Quad::u);
    const char* grad_out = from<GRAD_DTYPE>(&Quad::grad_out);
    U::fetch(smem + WarpLayout::kU, u, p.u_strides, of_u, channels);
    GradOut::fetch(smem + WarpLayout::kGradOut, grad_out, p.grad_out_strides, of_grad_out,
                   channels);
    if constexpr (!kProjects)
      Delta::fetch(smem + WarpLayout::kDelta, from<kDelta>(&Quad::delta), p.delta_strides,
                   of_delta, channels);
    if constexpr (GATE)
      U::fetch(smem + WarpLayout::kZ, from<U_DTYPE>(&Quad::z), p.z_strides, of_u, channels);
    copy_commit();
  }

  MMVSSM_DEVICE void read_u(int i, float (&x)[kWidth]) const {
    load_channels<U_DTYPE>(own_part<U_DTYPE>(smem + WarpLayout::kU, i), x);
  }
  MMVSSM_DEVICE void read_z(int i, float (&x)[kWidth]) const {
    load_channels<U_DTYPE>(own_part<U_DTYPE>(smem + WarpLayout::kZ, i), x);
  }
  MMVSSM_DEVICE void read_grad_out(int i, float (&x)[kWidth]) const {
    load_channels<GRAD_DTYPE>(own_part<GRAD_DTYPE>(smem + WarpLayout::kGradOut, i), x);
  }
  // The gradient before the gate.
  MMVSSM_DEVICE void read_gradient(int i, float (&x)[kWidth]) const {
    read_grad_out(i, x);
    if constexpr (GATE) {
      float z[kWidth];
      read_z(i, z);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) x[c] *= z[c] * sigmoid(z[c]);
    }
  }
  MMVSSM_DEVICE char* step(int i) const {
    return own_part<kFloat32>(smem + WarpLayout::kDt, i);
  }
  // B ln(2) and C at own positions 2 i and 2 i + 1.
  MMVSSM_DEVICE void read_weights(const Own& own, int i, float2 (&x)[2]) const {
    const float4 four =
        reinterpret_cast<const float4*>(positions(smem, own.team).weights)[i];
    x[0] = float2{four.x, four.y}, x[1] = float2{four.z, four.w};
  }

  // Step sizes before the softplus, log2(e) included.
  MMVSSM_DEVICE void raw_steps(const Own& own, float (&x)[kOwn][kWidth]) const {
    const Quad& own_quad = quad(smem, number_of_quad());
    if constexpr (kProjects) {
      float d[kPositions / 16][kWarpTiles][4];
      // Copying it would take more instructions.
#pragma unroll
      for (int m = 0; m < kPositions / 16; ++m)
#pragma unroll
        for (int j = 0; j < kWarpTiles; ++j) load_here(d[m][j], own_quad.shift[j]);
      project_tiles<WarpLayout, true>(smem, d, {});
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int c = 0; c < kWidth; ++c) x[i][c] = d[i / 2][c / 2][i % 2 * 2 + c % 2];
    } else {
      const float* bias = own_quad.shift[0];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        load_channels<DELTA_DTYPE>(own_part<DELTA_DTYPE>(smem + WarpLayout::kDelta, i),
                                   x[i]);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) x[i][c] = x[i][c] * kLog2E + bias[c / 2 * 4 + c % 2];
      }
    }
  }
};

// Own part of the recurrence, without the last position: the way back begins with that,
// and needs registers.
struct Recurrence {
  static constexpr int kHeld = kOwn - 1;
  float a[kHeld][kWidth];  // decays
  float b[kHeld][kWidth];  // what is added; then the states

  // From delta, the step sizes before softplus. Leaves the step sizes in shared memory.
  MMVSSM_DEVICE Sides start(const Maps& maps, const Own& own,
                            const float (&rate)[kWidth],
                            const float (&x)[kOwn][kWidth], float (&skip)[kWidth]) {
    Sides sides;
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      sides.decay[c] = 1.0f, sides.forward[c] = sides.backward[c] = 0.0f;
    float2 weights[2];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float dt[kWidth], u[kWidth], grad[kWidth];
      if (i % 2 == 0) maps.read_weights(own, i / 2, weights);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) dt[c] = SOFTPLUS ? softplus(x[i][c]) : x[i][c];
      store_channels<kFloat32>(maps.step(i), dt);
      maps.read_u(i, u);
      maps.read_gradient(i, grad);
      const float2 weight = weights[i % 2];
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const float decay = exp2_fast(rate[c] * dt[c]);
        const float added = dt[c] * (weight.x * u[c]);
        if (i < kHeld) a[i][c] = decay, b[i][c] = added;
        sides.forward[c] = decay * sides.forward[c] + added;
        sides.decay[c] *= decay;
        sides.backward[c] += sides.decay[c] * (weight.y * grad[c]);
        if constexpr (SKIP) skip[c] += u[c] * grad[c];
      }
    }
    float largest = sides.decay[0];
#pragma unroll
    for (int c = 1; c < kWidth; ++c) largest = fmaxf(largest, sides.decay[c]);
    if (rarely(!(largest <= kLargest))) {
      limit(maps, own, rate, sides);
    }
    return sides;
  }

  // Where the product of decays overflows: what that would turn zeros into is not a number.
  MMVSSM_DEVICE void limit(const Maps& maps, const Own& own, const float (&rate)[kWidth],
                           Sides& sides) const {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      sides.decay[c] = fminf(sides.decay[c], kLargest);
      sides.backward[c] = 0.0f;
    }
#pragma unroll
    for (int i = kOwn - 1; i >= 0; --i) {
      float grad[kWidth], dt[kWidth];
      float2 weights[2];
      maps.read_gradient(i, grad);
      maps.read_weights(own, i / 2, weights);
      const float C = weights[i % 2].y;
      load_channels<kFloat32>(maps.step(i), dt);
#pragma unroll
      for (int c = 0; c < kWidth; ++c)
        sides.backward[c] =
            exp2_fast(rate[c] * dt[c]) * (C * grad[c] + sides.backward[c]);
    }
  }

  // From the state before own positions.
  MMVSSM_DEVICE void find_states(const float (&before)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
#pragma unroll
      for (int c = 0; c < kWidth; ++c)
        b[i][c] += a[i][c] * (i > 0 ? b[i - 1][c] : before[c]);
  }
};

MMVSSM_DEVICE void load_four(const int* from, int* to) {
  const uint4 four = *reinterpret_cast<const uint4*>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

// Gradients of own channels' parameters, of own positions of all chunks.
struct ParameterGradients {
  float rate[kWidth], skip[kWidth], bias[kWidth];

  MMVSSM_DEVICE static char* kept(char* smem, int which) {
    return smem + WarpLayout::kSums + (which * kThreads + threadIdx.x) * kWidth * 4;
  }
  MMVSSM_DEVICE void keep(char* smem) const {
    if constexpr (!WarpLayout::kKeepsSums) return;
    store_channels<kFloat32>(kept(smem, 0), rate);
    store_channels<kFloat32>(kept(smem, 2), bias);
  }
  MMVSSM_DEVICE void restore(char* smem) {
    if constexpr (!WarpLayout::kKeepsSums) return;
    load_channels<kFloat32>(kept(smem, 0), rate);
    load_channels<kFloat32>(kept(smem, 2), bias);
  }
  // Adds what position i has; it is the first one of a chunk if it is its last.
  MMVSSM_DEVICE void add(int i, int c, float by_rate, float by_bias) {
    const bool is_first = WarpLayout::kKeepsSums && i == kOwn - 1;
    rate[c] = is_first ? by_rate : rate[c] + by_rate;
    bias[c] = is_first ? by_bias : bias[c] + by_bias;
  }
  MMVSSM_DEVICE void end(char* smem) const {
    if constexpr (!WarpLayout::kKeepsSums) return;
    ParameterGradients all;
    all.restore(smem);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) all.rate[c] += rate[c], all.bias[c] += bias[c];
    all.keep(smem);
  }
  MMVSSM_DEVICE void keep_skip(char* smem) const {
    if constexpr (!WarpLayout::kKeepsSums) return;
    if constexpr (SKIP) store_channels<kFloat32>(kept(smem, 1), skip);
  }
  MMVSSM_DEVICE void restore_skip(char* smem) {
    if constexpr (!WarpLayout::kKeepsSums) return;
    if constexpr (SKIP) load_channels<kFloat32>(kept(smem, 1), skip);
  }

  // Adds up what the teams have.
  static MMVSSM_DEVICE void store(const Own& own, float* to, float (&x)[kWidth],
                                  float factor) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) x[c] += shuffle_xor(x[c], mask);
      x[c] *= factor;
    }
    if (to == nullptr || own.team > 0) return;
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      if (c < own.count) to[own.channel + c] = x[c];
  }
};

// The way back through own positions of a chunk.
struct WayBack {
  int left;            // own positions before the end
  float rate[kWidth];  // times ln(2)
  float skip[kWidth];
  float before[kWidth];  // the state before own positions
  float g[kWidth];       // what later positions give
  char *by_u, *by_delta;
  float added[kOwn][kWidth];

  // Begins to load what is to be added at position i, of this index.
  MMVSSM_DEVICE void fetch(const BackwardArgs& p, const Own& own, int i, int index) {
    if constexpr (ADD)
      fetch_channels(own, element<kFloat32>(by_u, safe(index), p.out_strides.position),
                     p.out_strides.channel, added[i]);
  }
  // A place that is there, in place of a padded one.
  static MMVSSM_DEVICE int safe(int index) { return index < 0 ? 0 : index; }

  template <int kDtype>
  static MMVSSM_DEVICE void store(const Own& own, char* row, const Strides& strides,
                                  int index, const float (&x)[kWidth]) {
    char* to = const_cast<char*>(element<kDtype>(row, index, strides.position));
    if constexpr (VECTOR) {
      const auto packed = pack_channels<kDtype>(x);
      if (index >= 0) store_packed(to, packed);
    } else {
      own.store<kDtype>(to, strides.channel, index >= 0, x);
    }
  }

  // Position i. Where its dt was are now its parts of the gradients of B / ln(2) and C.
  MMVSSM_DEVICE void step(const BackwardArgs& p, const Own& own, const Maps& maps,
                          const Quad& rows, const Recurrence& recurrence, int i,
                          int index, const float2& weight,
                          const float (&last_dt)[kWidth], ParameterGradients& sums) {
    float dt[kWidth], u[kWidth], grad[kWidth], y[kWidth], of_u[kWidth], of_delta[kWidth];
    maps.read_u(i, u);
    maps.read_gradient(i, grad);
    const bool is_held = i < Recurrence::kHeld;
    float decay[kWidth];
    if (is_held) {
      load_channels<kFloat32>(maps.step(i), dt);
    } else {
      load_channels<kFloat32>(reinterpret_cast<const char*>(rows.rate), decay);
#pragma unroll
      for (int c = 0; c < kWidth; ++c)
        dt[c] = last_dt[c], decay[c] = exp2_fast(decay[c] * dt[c]);
    }
    float by_B = 0.0f, by_C = 0.0f;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const float last = i > 0 ? recurrence.b[i - 1][c] : before[c];
      const float fed = weight.x * u[c];
      const float a = is_held ? recurrence.a[i][c] : decay[c];
      const float h = is_held ? recurrence.b[i][c] : a * last + dt[c] * fed;
      const float own_g = weight.y * grad[c] + g[c];
      g[c] = a * own_g;
      const float by_decay = g[c] * last;
      const float by_added = own_g * dt[c];
      by_B += by_added * u[c];
      by_C += grad[c] * h;
      y[c] = SKIP ? weight.y * h + skip[c] * u[c] : weight.y * h;
      of_u[c] = ADD ? by_added * weight.x + added[i][c] : by_added * weight.x;
      if constexpr (SKIP) {
        of_u[c] += skip[c] * grad[c];
      }
      float slope = i < left ? kLog2E : 0.0f;
      if constexpr (SOFTPLUS) slope = softplus_slope(dt[c]);
      of_delta[c] = (rate[c] * by_decay + fed * own_g) * slope;
      sums.add(i, c, dt[c] * by_decay, of_delta[c]);
    }
    *reinterpret_cast<float2*>(maps.step(i)) = float2{by_B, by_C};
    store<OUT_DTYPE>(own, by_u, p.out_strides, index, of_u);
    store<GRAD_DELTA_DTYPE>(own, by_delta, p.grad_delta_strides, index, of_delta);
    if constexpr (GATE) {
      float z[kWidth];
      maps.read_grad_out(i, grad);
      maps.read_z(i, z);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const float opened = sigmoid(z[c]);
        y[c] *= grad[c] * opened * (1.0f + z[c] * (1.0f - opened));
      }
      store<GRAD_Z_DTYPE>(own, rows.by_z, p.grad_z_strides, index, y);
    }
  }
};

// Adds up the parts of the gradients of B and C that all channels of the CTA have. Each
// thread takes those of two warps at a position, and then neighbours theirs.
MMVSSM_DEVICE void sum_channels(char* smem, const int* places) {
  static_assert(kWarps == 2 * kHelpers, "each thread takes two");
  const int helper = threadIdx.x % kHelpers;
  const int team = threadIdx.x / kHelpers % kTeams, i = threadIdx.x / kHelpers / kTeams;
  const ChainRows& rows = *reinterpret_cast<const ChainRows*>(smem + WarpLayout::kChain);
  const char* from = own_part<kFloat32>(smem + WarpLayout::kDt, i) +
                     (helper * 64 + team * 4 - static_cast<int>(threadIdx.x)) * kWidth * 4;
  float by_B = 0.0f, by_C = 0.0f;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    // Threads of different teams read different banks.
    const char* lane = from + (k ^ team / 2) * kWidth * 4;
    const float2 one = *reinterpret_cast<const float2*>(lane);
    const float2 other = *reinterpret_cast<const float2*>(lane + 32 * kWidth * 4);
    by_B = k == 0 ? one.x + other.x : by_B + one.x + other.x;
    by_C = k == 0 ? one.y + other.y : by_C + one.y + other.y;
  }
#pragma unroll
  for (int mask = 1; mask < kHelpers; mask *= 2) {
    by_B += shuffle_xor(by_B, mask);
    by_C += shuffle_xor(by_C, mask);
  }
  const int place = places[team * kOwn + i];
  if (place >= 0 && helper == 0)
    global_pointer(rows.weights)[place] = float2{by_B * kLn2, by_C};
}

}  // namespace mmvssm

MMVSSM_KERNEL(one_state_backward, mmvssm::BackwardArgs, THREADS,
              (511 + THREADS) / THREADS) {
  using namespace mmvssm;
  char* smem = shared_memory();
  const Chain chain(p);
  const Own own = own_of_warp(chain);
  const ScanPointers& scan = p.scans[chain.scan];
  const GradientPointers& gradients = p.gradients[chain.scan];
  const Maps maps{smem, chain.count};
  PositionSupply supply;
  Quad& own_quad = quad(smem, number_of_quad());
  put_channels(p, chain, smem);
  if constexpr (kProjects) {
    put_dt_weight<WarpLayout>(scan, chain, smem);
    supply.pad(smem);
  }
  supply.look_up(p, scan, chain.begin, smem);
  const ChainRows& rows = *reinterpret_cast<const ChainRows*>(smem + WarpLayout::kChain);
  sync_cta("pointers");
  Held held;
  supply.fetch(p, rows, true, smem, held);
  supply.put(smem, held);
  supply.look_up(p, scan, chain.begin + 1, smem);
  fetch_states(p, own, p.chunks - 1 - chain.begin, own_quad);
  maps.fetch(p, chain.begin & 1);
  ParameterGradients sums = {};
  sums.keep(smem);
  sums.keep_skip(smem);

  const bool looks_back = p.published != nullptr;

#pragma unroll 1
  for (int step = chain.begin; step < chain.end; ++step) {
    const int chunk = p.chunks - 1 - step;
    const int left = p.length - chunk * kPositions - own.team * kOwn;
    const bool more = step + 1 < chain.end;
    copy_wait<0>();
    sync_cta("inputs");

    float x[kOwn][kWidth], rate[kWidth];
    maps.raw_steps(own, x);
    if (rarely(left < kOwn)) {
      // Positions behind the end leave states and gradients as they are.
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        for (int c = 0; c < kWidth; ++c)
          if (i >= left) x[i][c] = SOFTPLUS ? -1e30f : 0.0f;
    }
    load_channels<kFloat32>(reinterpret_cast<const char*>(own_quad.rate), rate);
    Recurrence recurrence;
    sums.restore_skip(smem);
    Sides sides = recurrence.start(maps, own, rate, x, sums.skip);
    sums.keep_skip(smem);
    if (rarely(looks_back)) {
      look_back(p, own, step, sides, own_quad);
    }
    WayBack back;
    back.by_u = own_quad.by_u;
    int indices[kOwn];
    const int* own_indices = positions(smem, own.team).indices[step & 1];
    if (own_quad.saved == nullptr)
      own_indices = reinterpret_cast<const int*>(smem + WarpLayout::kMissing);
    load_four(own_indices + 4, indices + 4);
    back.fetch(p, own, kOwn - 1, indices[kOwn - 1]);
    back.fetch(p, own, kOwn - 2, indices[kOwn - 2]);
    back.fetch(p, own, kOwn - 3, indices[kOwn - 3]);
    const TeamWalk walk(smem + WarpLayout::kDt);
    float dt[kOwn - TeamWalk::kFirst][kWidth];
#pragma unroll
    for (int i = TeamWalk::kFirst; i < kOwn; ++i)
      load_channels<kFloat32>(maps.step(i), dt[i - TeamWalk::kFirst]);
    sync_warp("steps");
    walk.put(sides);
    sync_warp("sides");
    TeamWalk::walk(smem, smem + WarpLayout::kDt);
    sync_warp("teams");
    walk.get(back.before, back.g);
    sync_warp("taken");
#pragma unroll
    for (int i = TeamWalk::kFirst; i < Recurrence::kHeld; ++i)
      store_channels<kFloat32>(maps.step(i), dt[i - TeamWalk::kFirst]);
    const auto& last_dt = dt[kOwn - 1 - TeamWalk::kFirst];
    recurrence.find_states(back.before);

    back.left = left;
    if constexpr (SKIP)
      load_channels<kFloat32>(reinterpret_cast<const char*>(own_quad.skip), back.skip);
    load_channels<kFloat32>(reinterpret_cast<const char*>(own_quad.slope), back.rate);
    float2 weights[2];
    back.by_delta = own_quad.by_delta;
#pragma unroll
    for (int i = kOwn - 1; i >= 0; --i) {
      if (i == kOwn - 2 && (ADD || !WarpLayout::kKeepsSums)) in_order();
      if (i % 2 == 1) maps.read_weights(own, i / 2, weights);
      if (i == kOwn - 2) load_four(own_indices, indices);
      back.step(p, own, maps, own_quad, recurrence, i, indices[i], weights[i % 2],
                last_dt, sums);
      if (i >= 3) back.fetch(p, own, i - 3, indices[i - 3]);
    }
    sums.end(smem);
    sync_warp("rows");
    if (more) {
      fetch_states(p, own, chunk - 1, own_quad);
      maps.fetch(p, step + 1 & 1);
    }
    if (own.team == 0)
      store_channels<kFloat32>(reinterpret_cast<char*>(own_quad.carry), back.g);
    sync_cta("sums");
    Held held;
    supply.fetch(p, rows, more, smem, held);
    sum_channels(smem, places_of(smem, step));
    supply.put(smem, held);
    supply.look_up(p, scan, step + 2, smem);
  }

  sums.restore(smem);
  sums.restore_skip(smem);
  const int64_t part = chain.row(p, chain.begin / p.chunks_of_cta);
  ParameterGradients::store(own, gradients.A + part, sums.rate, kLn2);
  ParameterGradients::store(own, gradients.D == nullptr ? nullptr : gradients.D + part,
                            sums.skip, 1.0f);
  ParameterGradients::store(own,
                            gradients.bias == nullptr ? nullptr : gradients.bias + part,
                            sums.bias, 1.0f);
}
