// The selective scan of several states: outputs, the last state, and the states before
// the chunks.
#include "many_states_splits.h"
#include "many_states_staging.h"

namespace mmvssm {

// Two lanes halve what each reads of B and C.
constexpr int kLanes = 2;
constexpr int kOwn = kStates / kLanes;
constexpr int kWarps = kThreads / kWarp;

struct Args {
  Inputs in;
  Rows out;
  Rows add;  // float32, added before the gate; with TOTAL that sum is put there
  float *last_state, *kept;
  float inverse;  // of the gate's factor
};

using URows = RowsOfWarp<U_DTYPE>;
using DeltaRows = RowsOfWarp<DELTA_DTYPE>;
using AddRows = RowsOfWarp<kFloat32>;
using OutRows = RowsOfWarp<OUT_DTYPE>;

// Results are put in place of what is read no more: u, or what is added, if it is as large.
constexpr bool kOutInU = kSize<OUT_DTYPE> == kSize<U_DTYPE>;
constexpr bool kOutInAdd = !kOutInU && ADD && !TOTAL && OUT_DTYPE == kFloat32;

struct Shared {
  static constexpr int kU = 0;
  static constexpr int kZ = kU + 2 * kWarps * URows::kBytes;
  static constexpr int kAdd = kZ + (GATE ? kWarps * URows::kBytes : 0);
  static constexpr int kOut = kAdd + (ADD ? kWarps * AddRows::kBytes : 0);
  static constexpr int kDelta =
      kOut + (kOutInU || kOutInAdd ? 0 : kWarps * OutRows::kBytes);
  static constexpr int kDt = kDelta + (kRank ? 0 : 2 * kWarps * DeltaRows::kBytes);
  static constexpr int kWeights = kDt + (kRank ? kDtBytes : 0);
  static constexpr int kLowRank = kWeights + 2 * kWeightsBytes;
  static constexpr int kFragment = kLowRank + 2 * kLowRankBytes;
  static constexpr int kPlaces = kFragment + kFragmentsBytes;
  static constexpr int kBytes = kPlaces + Places::kBytes;
};
static_assert(Shared::kBytes == SHARED, "as Python has it");

// One buffer of two, of those of all warps.
template <typename Array>
MMVSSM_DEVICE char* buffer(char* smem, int offset, int chunk, int warp) {
  return smem + offset + ((chunk & 1) * kWarps + warp) * Array::kBytes;
}

// A walk along a split. With kEnds it finds only what the split makes of a state, and the
// sum of dt.
template <bool kEnds>
MMVSSM_DEVICE float walk(const Args& p, const Work& work, char* smem,
                         const States<kLanes>& rates, States<kLanes>& h) {
  constexpr bool kGate = GATE && !kEnds, kAdd = ADD && !kEnds;
  const int warp = work.warp, lane = work.lane;
  const URows u(p.in.u, work, p.in.along), z(p.in.z, work, p.in.along);
  const DeltaRows delta(p.in.delta, work, p.in.along);
  const AddRows add(p.add, work, p.in.along);
  const OutRows out(p.out, work, p.in.along);
  StagedWeights<!kEnds> weights(p.in, work);
  StagedLowRank low_rank(p.in, work);
  const Places places{reinterpret_cast<int*>(smem + Shared::kPlaces), work.begin_chunk, 1};
  const Projection projection(p.in, work, smem + Shared::kFragment);
  char* z_tile = smem + Shared::kZ + warp * URows::kBytes;
  char* add_tile = smem + Shared::kAdd + warp * AddRows::kBytes;
  float* dt_column = reinterpret_cast<float*>(smem + Shared::kDt) + warp * kWarp;
  const KeptStates<kLanes> kept(p.in, work, p.kept);
  const float skip = work.parameter(p.in.D);
  const float shift = work.parameter(p.in.bias) * kLog2E;
  float sum = 0.0f;

  const auto low_rank_of = [&](int chunk) {
    return smem + Shared::kLowRank + (chunk & 1) * kLowRankBytes;
  };
  const auto copy = [&](int chunk) {
    const int* where = places.of(chunk);
    u.load(buffer<URows>(smem, Shared::kU, chunk, 0), where, {where, work});
    if (!kRank)
      delta.load(buffer<DeltaRows>(smem, Shared::kDelta, chunk, 0), where, {where, work});
    weights.fetch(p.in, where);
    if (kRank) low_rank.fetch(p.in, where, low_rank_of(chunk));
  };
  const auto put = [&](int chunk) {
    weights.put(reinterpret_cast<float*>(smem + Shared::kWeights +
                                         (chunk & 1) * kWeightsBytes));
    if (kRank) low_rank.put(low_rank_of(chunk));
  };

  const auto keep = [&](int t) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      store_global(kept.at(t, k), kept.valid[k] && t > 0 && t < p.in.length, h[k]);
  };

  places.find(p.in, work.begin_chunk);
  sync_cta("first places");
  copy(work.begin_chunk);
  copy_commit();
  put(work.begin_chunk);

#pragma unroll 1
  for (int chunk = work.begin_chunk; chunk < work.end_chunk; ++chunk) {
    copy_wait<0>();
    sync_cta("chunk");
    // What is used last has the shortest way ahead, and one buffer.
    const int* here = places.of(chunk);
    if (kGate) z.load(smem + Shared::kZ, here, {here, work});
    if (kAdd) add.load(smem + Shared::kAdd, here, {here, work});
    copy_commit();
    if (chunk + 1 < work.end_chunk) copy(chunk + 1);
    copy_commit();
    if (rarely(places.is_due(chunk))) {
      places.find(p.in, chunk + Places::kBatch);
    }

    char* delta_tile = buffer<DeltaRows>(smem, Shared::kDelta, chunk, warp);
    if (kRank) {
      projection.run(low_rank_of(chunk), lane, dt_column);
    }
    copy_wait<1>();
    sync_warp("dt");
    const int count = count_of(p.in, chunk);
    if (rarely(count < kPositions)) {
      // No time passes where there are no positions.
      for (int t = count; t < kPositions; ++t) {
        if (kRank)
          dt_column[t * kDtPitch + lane] = minus_infinity();
        else
          delta.put(delta_tile, t, minus_infinity());
      }
    }

    char* u_tile = buffer<URows>(smem, Shared::kU, chunk, warp);
    char* out_tile = kOutInU     ? u_tile
                     : kOutInAdd ? add_tile
                                 : smem + Shared::kOut + warp * OutRows::kBytes;
    const float* row = reinterpret_cast<const float*>(smem + Shared::kWeights +
                                                      (chunk & 1) * kWeightsBytes) +
                       lane % kLanes * kOwn;
#pragma unroll
    for (int t = 0; t < kPositions; ++t) {
      if (!kEnds && KEEP && t % kKept == 0) keep(chunk * kPositions + t);
      const float delta_value = kRank ? dt_column[t * kDtPitch + lane] : delta.get(delta_tile, t);
      const float x = delta_value * kLog2E + shift, input = u.get(u_tile, t);
      const float dt = SOFTPLUS      ? softplus_of_log2(x, exp2_fast(-fabsf(x)))
                       : t < count ? x
                                   : 0.0f;
      if (kEnds) sum += dt;
      float dts[kLanes], inputs[kLanes], y[kLanes] = {};
      if (kAdd) y[0] = add.get(add_tile, t);
      spread<kLanes>(dt, dts);
      spread<kLanes>(dt * input, inputs);
      float B[kOwn], C[kOwn];
      load_floats(row + t * kWeightsPitch, B);
      if (!kEnds) load_floats(row + t * kWeightsPitch + kStates, C);
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          h[k][i] = exp2_fast(rates[k][i] * dts[k]) * h[k][i] + inputs[k] * B[i];
          if (!kEnds) y[k] += C[i] * h[k][i];
        }
      if (kEnds) continue;
      float result = gather<kLanes>(y) + skip * input;
      if (TOTAL) add.put(add_tile, t, result);
      if (kGate) {
        const float gate = z.get(z_tile, t);
        result *= gate * sigmoid(gate, p.inverse);
      }
      out.put(out_tile, t, result);
    }
    if (!kEnds) {
      sync_warp("rows");
      out.store(kOutInU     ? buffer<URows>(smem, Shared::kU, chunk, 0)
                : kOutInAdd ? smem + Shared::kAdd
                            : smem + Shared::kOut,
                here, {here, work});
      if (TOTAL) add.store(smem + Shared::kAdd, here, {here, work});
    }
    if (chunk + 1 < work.end_chunk) put(chunk + 1);
  }
  return sum;
}

// Sixteen warps on a multiprocessor; float32 takes more registers to multiply.
constexpr int kResident = RANK && DELTA_DTYPE == kFloat32 ? 384 : 512;

MMVSSM_KERNEL(many_states_forward, Args, THREADS, kResident / THREADS) {
  const Work work(p.in, false);
  char* smem = shared_memory();
  States<kLanes> rates, h = {};
  load_rates<kLanes>(p.in, work, rates);
  if (SPLIT) {
    const Splits<kLanes> splits(p.in, work);
    States<kLanes> added = {};
    if (splits.number + 1 < p.in.splits) {
      const float sum = walk<true>(p, work, smem, rates, added);
      splits.publish_split(added, sum);
      splits.find_start(rates, {}, h);
      splits.publish_group(rates, h, added, sum);
    } else {
      splits.find_start(rates, {}, h);
    }
  }
  walk<false>(p, work, smem, rates, h);
  if (p.last_state != nullptr && work.split + 1 == p.in.splits)
    store_states<kLanes>(p.in, work, p.last_state, h);
}

}  // namespace mmvssm
