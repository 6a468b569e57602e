// The selective scan of several states: the gradients of all inputs.
//
// A chunk begins with the states that the forward pass has kept. A first walk finds those
// before its sub-chunks. Then, from the last sub-chunk to the first, its states and
// decays are found once more and kept in registers, and the gradient g of the state is
// walked backwards: g_t = C_t dy_t + a_t+1 g_t+1.
//
// What does not depend on the state is worked out by four channels at once: four lanes
// share four channels and, of a sub-chunk, each has one of four positions.
//
// B and C of 16 bits times a number of each channel, for all states, are found by tensor
// cores. Their tf32 holds B and C as they are, but only half of a float32, so it is the
// sum of two: one that the hardware makes by cutting off, and `low`, the rest. That makes
// two of the four products that are added up at once, and they come twice, halved.
#include "many_states_gradients.h"

namespace mmvssm {

// A walk along a split from its end. With kEnds it finds only what the split makes of
// the gradient of a state, and the sum of dt.
template <bool kEnds>
struct Walk {
  const Args& p;
  const Work& work;
  const States<kLanes>& rates;
  char* smem;
  URows u, z, grad_z;
  DeltaRows delta;
  GradOutRows grad_out;
  TotalRows total;
  GradURows grad_u;
  GradDeltaRows grad_delta;
  Places places;
  Projection projection;
  KeptStates<kLanes> kept;
  // Without dt u there is room for dy of all positions.
  static constexpr int kDy = kEnds ? Shared::kInput : Shared::kDy;
  // In the exchange of the warp: what the lane puts for B and C; the sums that it finds
  // and on to those of the next group; parts that it puts, and those it adds up.
  char *for_B, *for_C, *group, *other_group, *part, *parts;
  int to_sums;            // from the lane's dt of a sub-chunk to its sums
  char *grad_B, *grad_C;  // of the CTA

  MMVSSM_DEVICE Walk(const Args& args, const Work& w, const States<kLanes>& r,
                     char* memory)
      : p(args), work(w), rates(r), smem(memory),
        u(p.in.u, w, p.in.along), z(p.in.z, w, p.in.along),
        grad_z(p.grad_z, w, p.in.along), delta(p.in.delta, w, p.in.along),
        grad_out(p.grad_out, w, p.in.along), total(p.total, w, p.in.along),
        grad_u(p.grad_u, w, p.in.along), grad_delta(p.grad_delta, w, p.in.along),
        places{reinterpret_cast<int*>(memory + Shared::kPlaces), w.end_chunk - 1, -1},
        projection(p.in, w, memory + Shared::kFragment),
        kept(p.in, w, const_cast<float*>(p.kept)) {
    float* skip = reinterpret_cast<float*>(smem + Shared::kSkip) + threadIdx.x;
    skip[0] = work.parameter(p.in.D);
    skip[kThreads] = work.parameter(p.in.bias) * kLog2E;
    const int row = (work.block * p.in.batch + work.batch) * p.in.groups + work.group;
    const int64_t before = static_cast<int64_t>(row) * p.in.places * (kStates * 4);
    grad_B = hidden(reinterpret_cast<char*>(p.grad_B) + before);
    grad_C = hidden(reinterpret_cast<char*>(p.grad_C) + before);
    constexpr int kFours = 2 * kStates / 4;
    const int lane = work.lane, i = lane % kLanes, four = lane % kFours;
    const int exchange = Shared::kExchange + work.warp * kExchangeBytes;
    // Swapped in every other group: no conflicts of banks.
    const int swap = lane / kLanes % 2 * (kStates * 4);
    const int to = exchange + (lane / kLanes * 2 * kStates + i * kOwn) * 4;
    for_B = smem + hidden(to + swap);
    for_C = smem + hidden(to + kStates * 4 - swap);
    const int from =
        exchange + (lane / kFours * (kWarp / kLanes) * 2 * kStates + four * 4) * 4;
    group = smem + hidden(from);
    const int other = from + (four < kFours / 2 ? kStates : -kStates) * 4;
    // Splits leave no register for it.
    other_group = smem + (SPLIT ? other : hidden(other));
    // They begin with the first channel of the warp.
    const int first = lane / kLanes * kLanes;
    to_sums = hidden((lane / kFours * kDtPitch + four * 4 - first) * 4);
    part = smem + hidden(exchange + lane * (kLanes * 4));
    parts = smem + hidden(exchange + (i * kPartsPitch + first * kLanes) * 4);
  }

  MMVSSM_DEVICE float* slot(int number, int k) const {
    return reinterpret_cast<float*>(smem + Shared::kSlot + number * kSlotBytes) +
           (k * kThreads + static_cast<int>(threadIdx.x)) * kOwn;
  }
  MMVSSM_DEVICE void load_slot(int number, States<kLanes>& h) const {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) load_floats(slot(number, k), h[k]);
  }

  MMVSSM_DEVICE int delta_offset(int chunk) const {
    return Shared::kDelta + (chunk & 1) * (kWarps * DeltaRows::kBytes);
  }
  // D, or with some bytes more the shift of delta, of the lane's channels.
  MMVSSM_DEVICE void load_parameters(int bytes, float (&x)[kLanes]) const {
    load_floats(reinterpret_cast<const float*>(smem + Shared::kSkip + bytes) +
                    static_cast<int>(threadIdx.x) / kLanes * kLanes,
                x);
  }

  MMVSSM_DEVICE char* low_rank_of(int chunk) const {
    return smem + Shared::kLowRank + (chunk & 1) * kLowRankBytes;
  }

  // Begins to bring in the rows of a chunk that are not needed at once.
  MMVSSM_DEVICE void copy_rows(int chunk) const {
    const int* where = places.of(chunk);
    const URows::Own own(where, work);
    if (kGate) z.load(smem + Shared::kZ, where, own);
    grad_out.load(smem + Shared::kGradOut, where, {where, work});
    if (kEnds) return;
    u.load(smem + Shared::kU, where, own);
    if (kReadsTotal) total.load(smem + Shared::kTotal, where, {where, work});
    if (ADD) grad_u.load(smem + Shared::kGradUTile, where, {where, work});
  }

  // Begins to bring in the states that are kept before sub-chunks, from where those of
  // the chunk are.
  MMVSSM_DEVICE void copy_states(int chunk, const float* from) const {
#pragma unroll
    for (int i = 0; i < kPositions; i += kKept) {
      const int t = chunk * kPositions + i;
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        copy_async_or_zero<4 * kOwn>(
            slot(i / kSub, k), from + i / kKept * kept.stride + k * kStates,
            kept.valid[k] && t > 0 && (i == 0 || t < p.in.length));
    }
  }
  MMVSSM_DEVICE static constexpr bool is_kept(int sub) {
    return sub * kSub % kKept == 0;
  }

  // dt of all positions, its slope where it is a function of delta, and dt u.
  MMVSSM_DEVICE void find_steps(int chunk, const Cursor& at) const {
    if (kRank)
      projection.run(low_rank_of(chunk), work.lane,
                     reinterpret_cast<float*>(smem + Shared::kDt) + work.warp * kWarp);
    copy_wait<1>();
    sync_warp("dt");
    float shift[kLanes];
    load_parameters(kThreads * 4, shift);
    const char* from = at.tile<DeltaRows>(delta_offset(chunk));
#pragma unroll
    for (int t = 0; t < kPositions; t += kSub) {
      float delta_values[kLanes], us[kLanes], dt[kLanes], slope[kLanes];
      if (kRank)
        load_floats(at.own_row(Shared::kDt, t), delta_values);
      else
        delta.get_four(from, t, delta_values);
      if (!kEnds) u.get_four(at.tile<URows>(Shared::kU), t, us);
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        const float x = delta_values[k] * kLog2E + shift[k];
        dt[k] = SOFTPLUS ? softplus_of_log2(x, exp2_fast(-fabsf(x))) : x;
        if (kEnds) continue;
        slope[k] = SOFTPLUS ? sigmoid_of_log2(x, 1.0f) : 1.0f;
        us[k] *= dt[k] * kLn2;
      }
      store_floats(at.own_row(Shared::kDt, t), dt);
      if (kEnds) continue;
      store_floats(reinterpret_cast<float*>(at.slope + t * (kThreads * 4)), slope);
      put_factor(at.own_row(Shared::kInput, t), us);
    }
    const int count = count_of(p.in, chunk);
    if (rarely(count < kPositions)) {
      // No time passes where there are no positions.
      const float zeros[kLanes] = {};
#pragma unroll
      for (int t = 0; t < kPositions; t += kSub) {
        if (t + work.lane % kLanes < count) continue;
        store_floats(at.own_row(Shared::kDt, t), zeros);
        if (kEnds) continue;
        store_floats(reinterpret_cast<float*>(at.slope + t * (kThreads * 4)), zeros);
        put_factor(at.own_row(Shared::kInput, t), zeros);
      }
    }
  }

  // Four numbers that are multiplied by B or C, and their low parts.
  MMVSSM_DEVICE static void put_factor(float* to, const float (&x)[kLanes]) {
    store_floats(to, x);
    if constexpr (kOnTensorCores) {
      float low[kLanes];
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        low[k] = x[k] - float_of(bits_of(x[k]) & 0xffffe000u);
      store_floats(to + Shared::kInputBytes / 4, low);
    }
  }

  // B, or C, of a position, times kOfWeights.
  MMVSSM_DEVICE void load_weights(const Cursor& at, int i, int offset,
                                  float (&x)[kOwn]) const {
    load_floats(reinterpret_cast<const float*>(at.weights + Shared::kWeights +
                                               i * (kWeightsPitch * 4) + offset * 4),
                x);
    if constexpr (kSwapped) {
      const float one = x[1];
      x[1] = x[2], x[2] = one;
    }
  }

  // Adds to the states B, or C, times numbers of the channels.
  MMVSSM_DEVICE void add_products(const Cursor& at, int i, int offset,
                                  int factors, States<kLanes>& x) const {
    float factor[kLanes];
    load_floats(reinterpret_cast<const float*>((kOnTensorCores ? at.factor : at.steps) +
                                               factors + i * (kDtPitch * 4)),
                factor);
    if constexpr (kOnTensorCores) {
      float b[kPairs];
      load_floats(reinterpret_cast<const float*>(at.fragment + Shared::kWeights +
                                                 i * (kWeightsPitch * 4) + offset * 4),
                  b);
#pragma unroll
      for (int k = 0; k < kLanes; k += 2)
#pragma unroll
        for (int n = 0; n < kOwn; n += 2) {
          float d[4] = {x[k][n], x[k][n + 1], x[k + 1][n], x[k + 1][n + 1]};
          mma_1684(d, factor[k], factor[k + 1], b[n / 2]);
          x[k][n] = d[0], x[k][n + 1] = d[1];
          x[k + 1][n] = d[2], x[k + 1][n + 1] = d[3];
        }
    } else {
      float weights[kOwn];
      load_weights(at, i, offset, weights);
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
#pragma unroll
        for (int n = 0; n < kOwn; ++n) x[k][n] += factor[k] * weights[n];
    }
  }
  // The lane's dy of a sub-chunk, and the gradient of the gate, or what it is without the
  // output if that is not yet known.
  MMVSSM_DEVICE void open_gate(const Cursor& cursor) const {
    float dy[kLanes], gate[kLanes], before[kLanes];
    grad_out.get_four(cursor.tile<GradOutRows>(Shared::kGradOut), 0, dy);
    if (kGate) {
      char* at = cursor.tile<URows>(Shared::kZ);
      z.get_four(at, 0, gate);
      if (kReadsTotal && !kEnds)
        total.get_four(cursor.tile<TotalRows>(Shared::kTotal), 0, before);
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        const float open = sigmoid(gate[k], p.inverse), factor = gate[k] * open;
        // d(z s(z)) = s + z s (1 - s)
        const float slope = open + factor * (1.0f - open * p.inverse);
        if (kGradZ && !kEnds)
          gate[k] = kReadsTotal ? dy[k] * before[k] * slope : dy[k] * slope;
        dy[k] *= factor;
      }
      if (kReadsTotal && !kEnds) grad_z.put_four(at, 0, gate);
      if (kFindsTotal && !kEnds) store_floats(of_output(), gate);
    }
    put_factor(cursor.own_row(kDy), dy);
  }
  MMVSSM_DEVICE float* of_output() const {
    return reinterpret_cast<float*>(smem + Shared::kOfOutput) +
           static_cast<int>(threadIdx.x) * kLanes;
  }

  // What the lane has for a sum over the states of a position, and such a sum.
  MMVSSM_DEVICE void put_part(int number, int t, const float (&x)[kLanes]) const {
    store_floats(reinterpret_cast<float*>(part) + number * kParts + t * kPartsPitch, x);
  }
  MMVSSM_DEVICE void add_parts(int number, float (&sum)[kLanes]) const {
    const float* from = reinterpret_cast<const float*>(parts) + number * kParts;
    load_floats(from, sum);
#pragma unroll
    for (int i = 1; i < kLanes; ++i) {
      float x[kLanes];
      load_floats(from + i * kLanes, x);
#pragma unroll
      for (int k = 0; k < kLanes; ++k) sum[k] += x[k];
    }
  }

  // One step forwards: the decays, and the states.
  MMVSSM_DEVICE void advance(const Cursor& at, int t, const States<kLanes>& before,
                             States<kLanes>& a, States<kLanes>& h) const {
    float dt[kLanes];
    load_floats(at.row(Shared::kDt, t), dt);
    States<kLanes> added = {};
    add_products(at, t, 0, Shared::kInput, added);
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        a[k][i] = exp2_fast(rates[k][i] * dt[k]);
        h[k][i] = a[k][i] * before[k][i] + added[k][i];
      }
  }

  // The states before the sub-chunks that were not kept. Those before the last one are
  // left in h.
  MMVSSM_DEVICE void find_states(const Cursor& at, States<kLanes>& h) const {
#pragma unroll
    for (int t = 0; t < kPositions - kSub; ++t) {
      const int sub = t / kSub;
      if (t % kSub == 0 && is_kept(sub)) load_slot(sub, h);
      if (is_kept(sub + 1)) continue;
      if (t % kSub == 0 && !is_kept(sub)) {
#pragma unroll
        for (int k = 0; k < kLanes; ++k) store_floats(slot(sub, k), h[k]);
      }
      States<kLanes> a;
      advance(at, t, h, a, h);
    }
    if (is_kept(kSubs - 1)) load_slot(kSubs - 1, h);
  }

  // One step backwards, `i` of a sub-chunk. g is the gradient of the state after the
  // position times the decay to there, then that before it.
  MMVSSM_DEVICE void retreat(const Cursor& at, int i, const States<kLanes>& a,
                             const States<kLanes>& h, const States<kLanes>& before,
                             States<kLanes>& g, Sums& sums, float (&q)[kLanes],
                             float (&r)[kLanes]) const {
    float dt[kLanes], input[kLanes], dy[kLanes], B[kOwn];
    load_floats(at.row(Shared::kDt, i), dt);
    load_floats(at.row(Shared::kInput, i), input);
    load_floats(at.row(kDy, i), dy);
    load_weights(at, i, 0, B);
    add_products(at, i, kStates, kDy, g);
    float by_B[kOwn] = {}, by_C[kOwn] = {};
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      q[k] = r[k] = 0.0f;
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        const float now = g[k][n];
        q[k] += now * B[n];
        by_B[n] += now * input[k];
        by_C[n] += h[k][n] * dy[k];
        g[k][n] = now * a[k][n];
        const float w = g[k][n] * before[k][n];
        r[k] += rates[k][n] * w;
        sums.A[k][n] += dt[k] * w;
      }
    }
    constexpr int kPosition = kWarp / kLanes * 2 * kStates;
    store_floats(reinterpret_cast<float*>(for_B) + i * kPosition, by_B);
    store_floats(reinterpret_cast<float*>(for_C) + i * kPosition, by_C);
  }

  // A sub-chunk forwards and backwards; `start` holds the states before it.
  MMVSSM_DEVICE void sub_chunk(const Cursor& at,
                               const States<kLanes>& start, States<kLanes>& g,
                               Sums& sums) const {
    States<kLanes> a[kSub], h[kSub];
    const auto before = [&](int i) -> const States<kLanes>& {
      return i == 0 ? start : static_cast<const States<kLanes>&>(h[i == 0 ? 0 : i - 1]);
    };
    open_gate(at);
    sync_warp("exchange read");
#pragma unroll
    for (int i = 0; i < kSub; ++i) {
      advance(at, i, before(i), a[i], h[i]);
      if (!kFindsTotal) continue;
      float C[kOwn], y[kLanes] = {};
      load_weights(at, i, kStates, C);
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
#pragma unroll
        for (int n = 0; n < kOwn; ++n) y[k] += C[n] * h[i][k][n];
      put_part(kOutput, i, y);
    }
    float q[kSub][kLanes], r[kSub][kLanes];
#pragma unroll
    for (int i = kSub - 1; i >= 0; --i)
      retreat(at, i, a[i], h[i], before(i), g, sums, q[i], r[i]);
    float dt[kLanes];
    load_floats(at.own_row(Shared::kDt), dt);
    sync_warp("products");
    add_up(at);
    sync_warp("products read");
#pragma unroll
    for (int i = 0; i < kSub; ++i) put_part(0, i, q[i]), put_part(1, i, r[i]);
    sync_warp("parts");
    finish(at, dt, sums);
  }

  // The lane's gradients of u and delta of a sub-chunk.
  MMVSSM_DEVICE void finish(const Cursor& cursor, const float (&dt)[kLanes],
                            Sums& sums) const {
    float by_input[kLanes], by_decay[kLanes], slope[kLanes], dy[kLanes];
    float us[kLanes], skip[kLanes], by_u[kLanes], by_delta[kLanes];
    load_parameters(0, skip);
    add_parts(0, by_input);
    add_parts(1, by_decay);
    load_floats(reinterpret_cast<const float*>(cursor.slope), slope);
    load_floats(cursor.own_row(kDy), dy);
    u.get_four(cursor.tile<URows>(Shared::kU), 0, us);
    char* at = cursor.tile<GradURows>(Shared::kGradUTile);
    if (ADD) grad_u.get_four(at, 0, by_u);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      const float one = skip[k] * dy[k] + dt[k] * (kLn2 / kOfWeights) * by_input[k];
      by_u[k] = ADD ? by_u[k] + one : one;
      by_delta[k] =
          (us[k] * by_input[k] * (1.0f / kOfWeights) + by_decay[k]) * slope[k];
      sums.D[k] += dy[k] * us[k];
      sums.bias[k] += by_delta[k];
    }
    if (kFindsTotal) {
      float output[kLanes], factor[kLanes];
      add_parts(kOutput, output);
      load_floats(of_output(), factor);
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        factor[k] *= output[k] * (1.0f / kOfWeights) + skip[k] * us[k];
      grad_z.put_four(cursor.tile<URows>(Shared::kZ), 0, factor);
    }
    grad_u.put_four(at, 0, by_u);
    grad_delta.put_four(cursor.tile<GradDeltaRows>(Shared::kGradDeltaTile), 0,
                        by_delta);
  }

  // The sums over the warp of what its threads have for B and C.
  MMVSSM_DEVICE void add_up(const Cursor& at) const {
    constexpr int kGroups = kWarp / kLanes, kFours = 2 * kStates / 4;
    if (kSub * kFours < kWarp && work.lane >= kSub * kFours) return;
    float sum[4];
    load_floats(reinterpret_cast<const float*>(group), sum);
#pragma unroll
    for (int i = 1; i < kGroups; ++i) {
      float x[4];
      load_floats(reinterpret_cast<const float*>(i % 2 ? other_group : group) +
                      i * 2 * kStates,
                  x);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] += x[k];
    }
    store_floats(reinterpret_cast<float*>(at.steps + Shared::kDt + to_sums), sum);
  }
  // Of the first warp.
  MMVSSM_DEVICE float* sums_of(int t) const {
    return reinterpret_cast<float*>(smem + Shared::kDt) + t * kDtPitch;
  }

  // The sums over the CTA, to global memory.
  MMVSSM_DEVICE void store_sums(int chunk) const {
    constexpr int kFours = 2 * kStates / 4, kAll = kPositions * kFours;
#pragma unroll
    for (int first = 0; first < kAll; first += kThreads) {
      const uint32_t i = first + threadIdx.x;
      if (first + kThreads > kAll && i >= kAll) break;
      const int t = i / kFours, four = i % kFours, place = places.of(chunk)[t];
      const float* from = sums_of(t) + four * 4;
      float sum[4];
      load_floats(from, sum);
#pragma unroll
      for (int w = 1; w < kWarps; ++w) {
        float x[4];
        load_floats(from + w * kWarp, x);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[k] += x[k];
      }
      char* to = address(four < kFours / 2 ? grad_B : grad_C, place, kStates * 4) +
                 four % (kFours / 2) * 16;
      store_global(reinterpret_cast<float*>(to), place >= 0, sum);
    }
  }

  MMVSSM_DEVICE float run(States<kLanes>& g, Sums& sums) const {
    StagedWeights<true> weights(p.in, work);
    StagedLowRank low_rank(p.in, work);
    float sum[kLanes] = {};
    const auto fetch = [&](int chunk) {
      if (!kRank)
        delta.load(smem + delta_offset(chunk),
                   places.of(chunk), {places.of(chunk), work});
      weights.fetch(p.in, places.of(chunk));
      if (kRank) low_rank.fetch(p.in, places.of(chunk), low_rank_of(chunk));
    };
    const auto put = [&](int chunk) {
      weights.put_times(reinterpret_cast<float*>(smem + Shared::kWeights), kOfWeights,
                        kSwapped);
      if (kRank) low_rank.put(low_rank_of(chunk));
    };
    Cursor at(smem, work);
    const int last = work.end_chunk - 1;
    places.find(p.in, last);
    sync_cta("first places");
    fetch(last);
    copy_commit();
    const float* states = hidden(kept.at(last * kPositions, 0));
    if (!kEnds) copy_states(last, states);
    copy_commit();
    put(last);

#pragma unroll 1
    for (int chunk = last; chunk >= work.begin_chunk; --chunk) {
      // All but the states.
      copy_wait<1>();
      sync_cta("chunk");
      copy_rows(chunk);
      copy_commit();
      if (chunk > work.begin_chunk) fetch(chunk - 1);
      copy_commit();
      if (rarely(places.is_due(chunk))) {
        places.find(p.in, chunk - Places::kBatch);
      }
      find_steps(chunk, at);
      if (kEnds) {
#pragma unroll
        for (int t = 0; t < kPositions; t += kSub) {
          open_gate(at);
          float dt[kLanes];
          load_floats(at.own_row(Shared::kDt), dt);
#pragma unroll
          for (int k = 0; k < kLanes; ++k) sum[k] += dt[k];
          at.move(kSub);
        }
        at.move(-kPositions);
        sync_warp("steps");
#pragma unroll
        for (int t = kPositions - 1; t >= 0; --t) retreat_end(at, t, g);
        sync_cta("weights read");
        copy_commit();
      } else {
        sync_warp("steps");
        States<kLanes> h;
        find_states(at, h);
        at.move(kPositions - kSub);
#pragma unroll 1
        for (int sub = kSubs - 1; sub >= 0; --sub) {  // 4 trips
          sub_chunk(at, h, g, sums);
          if (sub > 0) load_slot(sub - 1, h);
          at.move(-kSub);
        }
        at.move(kSub);
        states -= kPositions / kKept * kept.stride;
        if (chunk > work.begin_chunk) copy_states(chunk - 1, states);
        copy_commit();
        sync_cta("sums");
        store_sums(chunk);
        const int* where = places.of(chunk);
        grad_u.store(smem + Shared::kGradUTile, where, {where, work});
        grad_delta.store(smem + Shared::kGradDeltaTile, where, {where, work});
        if (kGradZ) grad_z.store(smem + Shared::kZ, where, {where, work});
      }
      if (chunk > work.begin_chunk) put(chunk - 1);
    }
    return kEnds ? gather<kLanes>(sum) : 0.0f;
  }

  // A step backwards of the gradient of the state alone.
  MMVSSM_DEVICE void retreat_end(const Cursor& at, int t,
                                 States<kLanes>& g) const {
    float dt[kLanes];
    load_floats(at.row(Shared::kDt, t), dt);
    add_products(at, t, kStates, kDy, g);
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
#pragma unroll
      for (int i = 0; i < kOwn; ++i) g[k][i] *= exp2_fast(rates[k][i] * dt[k]);
  }
};

// Eight warps on a multiprocessor.
MMVSSM_KERNEL(many_states_backward, Args, THREADS, 256 / THREADS) {
  const Work work(p.in, true);
  char* smem = hidden_shared(shared_memory());
  States<kLanes> rates, g = {};
  load_rates<kLanes>(p.in, work, rates);
  if (p.grad_last_state != nullptr)
    load_states<kLanes>(p.in, work, p.grad_last_state, g);
  Sums sums;
  if (SPLIT) {
    const Splits<kLanes> splits(p.in, work);
    States<kLanes> added = {}, before;
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
#pragma unroll
      for (int i = 0; i < kOwn; ++i) before[k][i] = g[k][i];
    if (splits.number + 1 < p.in.splits) {
      const float sum = Walk<true>(p, work, rates, smem).run(added, sums);
      splits.publish_split(added, sum);
      splits.find_start(rates, before, g);
      splits.publish_group(rates, g, added, sum);
    } else {
      splits.find_start(rates, before, g);
    }
  }
  Walk<false>(p, work, rates, smem).run(g, sums);

  const int64_t rows = static_cast<int64_t>(p.in.batch) * p.in.groups * p.in.group_size;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sums.A[k][i] *= kLn2;
    store_global(p.grad_A + work.split * rows * kStates +
                     offset_of_states<kLanes>(p.in, work, k, kStates),
                 work.is_valid<kLanes>(k), sums.A[k]);
  }
  const int64_t row = work.split * rows +
                      static_cast<int64_t>(work.batch) * p.in.groups * p.in.group_size +
                      work.own;
  const float by_D = gather<kLanes>(sums.D), by_bias = gather<kLanes>(sums.bias);
  if (work.valid && p.grad_D != nullptr) p.grad_D[row] = by_D;
  if (work.valid && p.grad_bias != nullptr) p.grad_bias[row] = by_bias;
}

}  // namespace mmvssm
