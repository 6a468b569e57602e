// The scans of a map with one state a channel, merged: a CTA walks all of them over a
// whole map and keeps their sum in shared memory.
#include "one_state_map.h"

namespace mmvssm {

// What positions do to the states of own channels: decay h + added.
struct MapStep {
  float decay[kWidth], added[kWidth];

  // From those of the teams, those of all teams up to each.
  MMVSSM_DEVICE void append_teams(int team) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      // An overflowing growth must not turn a zero state into NaN.
      decay[c] = fminf(decay[c], kLargest);
#pragma unroll
      for (int by = 1; by < 8; by *= 2) {
        const float before = shuffle_up(decay[c], 4 * by);
        const float state = shuffle_up(added[c], 4 * by);
        if (team >= by) {
          added[c] = decay[c] * state + added[c];
          decay[c] = fminf(decay[c] * before, kLargest);
        }
      }
    }
  }
  // And those of all teams before each.
  MMVSSM_DEVICE MapStep of_earlier(int team) const {
    MapStep found;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      found.decay[c] = shuffle_up(decay[c], 4);
      found.added[c] = shuffle_up(added[c], 4);
      if (team == 0) found.decay[c] = 1.0f, found.added[c] = 0.0f;
    }
    return found;
  }
};

// Own positions whose step sizes are made at once, as far as there are registers.
constexpr int kAtOnce = MapInputs::kPieces * kPair > 4 ? kOwn / 2 : kOwn;

// Step sizes before the softplus of positions from `first` on, log2(e) included: tiles of
// 8 channels, see MapLayout.
template <int kRankTile = 0>
MMVSSM_DEVICE void project_map(char* smem, const char* fragments,
                               const MapInputs& inputs, int first,
                               const float (&bias)[2][4], float (&d)[kAtOnce / 2][2][4]) {
  if constexpr (kRankTile < kRankTiles) {
    const int lane = threadIdx.x % 32, set = threadIdx.x / 32 % kSets;
    uint2 b[2][kWeightTerms];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < kWeightTerms; ++i)
        b[j][i] = reinterpret_cast<const uint2*>(fragments)
            [((i * kRankTiles + kRankTile) * kChannelTiles + set * 2 + j) * 32 + lane];
    constexpr int kFirst = 2 * kRankTile;
    constexpr bool kHasSecond = kFirst + 1 < MapInputs::kPieces;
    constexpr bool kHasBias =
        MapLayout::kBiasRow >= 0 && MapLayout::kBiasRow / 16 == kRankTile;
    const float one = lane % 4 == MapLayout::kBiasRow % 8 / 2 ? 1.0f : 0.0f;
#pragma unroll
    for (int m = 0; m < kAtOnce / 2; ++m) {
      uint32_t a[kTerms][4];
      MapFragment fragment;
      if constexpr (kSets > 1)
        fragment = MapFragment::at(smem, kRankTile, first / 2 + m);
      else
        inputs.get_low(kRankTile, first / 2 + m, fragment);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t terms[kTerms];
        if (k >= 2 && kHasBias && (!kHasSecond || one != 0.0f)) {
          split(one, one, terms);
        } else if (k < 2 || kHasSecond) {
          const auto& pair = fragment.words[k];
          if constexpr (DELTA_DTYPE == kFloat32)
            split(float_of(pair[0]), float_of(pair[1]), terms);
          else
            terms[0] = pair[0];
        }
#pragma unroll
        for (int i = 0; i < kTerms; ++i) a[i][k] = terms[i];
      }
#pragma unroll
      for (int j = 0; j < 2; ++j)
        multiply_terms<kRankTile == 0>(d[m][j], a, b[j], bias[j]);
    }
    project_map<kRankTile + 1>(smem, fragments, inputs, first, bias, d);
  }
}

// Own part of the recurrence, h = a h + b at each position.
struct MapRecurrence {
  float a[kOwn][kWidth], b[kOwn][kWidth];
  MapWeights weights;

  // From zero; returns the step of all own positions.
  MMVSSM_DEVICE MapStep start(char* smem, int scan, int channel,
                              const MapInputs& inputs) {
    float d[kAtOnce / 2][2][4], bias[2][4], rate[kWidth], shift[kWidth];
    get_map_parameter(smem, scan, kMapShift, channel, shift);
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      bias[c / 2][c % 2] = bias[c / 2][c % 2 + 2] =
          MapLayout::kBiasRow < 0 ? shift[c] : 0.0f;
    get_map_parameter(smem, scan, kMapRate, channel, rate);
    inputs.get_weights(weights);
    MapStep step;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (i % kAtOnce == 0)
        project_map(smem,
                    smem + MapLayout::kFragments + scan * MapLayout::kScanFragments,
                    inputs, i, bias, d);
      float u[kWidth];
      inputs.get_u(i, u);
      const float B = weights.B(i) * kLn2;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        float dt = d[i % kAtOnce / 2][c / 2][i % 2 * 2 + c % 2];
        if constexpr (SOFTPLUS) dt = softplus(dt);
        a[i][c] = exp2_fast(rate[c] * dt);
        b[i][c] = dt * u[c] * B;
        step.added[c] = i == 0 ? b[i][c] : a[i][c] * step.added[c] + b[i][c];
        step.decay[c] = i == 0 ? a[i][c] : a[i][c] * step.decay[c];
      }
    }
    return step;
  }

  // From the state before own positions to those at them, in place of b.
  MMVSSM_DEVICE void finish(float (&h)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        h[c] = a[i][c] * h[c] + b[i][c];
        b[i][c] = h[c];
      }
  }
  // Adds what four positions give to the sum.
  template <int kFirst>
  MMVSSM_DEVICE void add(char* smem, int channel, const WarpPlaces& warp,
                         int buffer) const {
    int cells[4];
    float y[4][kWidth];
    warp.get(kCells, buffer, kFirst, cells);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (cells[i] >= 0) load_channels<kFloat32>(sum_at(smem, cells[i], channel), y[i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c)
        y[i][c] = weights.C(kFirst + i) * b[kFirst + i][c] + y[i][c];
      if (cells[i] >= 0) store_channels<kFloat32>(sum_at(smem, cells[i], channel), y[i]);
    }
  }
};

// How states get from part to part, and from pass to pass.
struct Parts {
  char* smem;
  float2* steps;  // two buffers
  float* carry;   // two buffers
  int part, set, element;

  MMVSSM_DEVICE explicit Parts(char* smem)
      : smem(smem),
        steps(reinterpret_cast<float2*>(smem + MapLayout::kSteps)),
        carry(reinterpret_cast<float*>(smem + MapLayout::kCarry)),
        part(threadIdx.x % kMapThreads / 32 / kSets),
        set(threadIdx.x / 32 % kSets),
        element(threadIdx.x / kMapThreads) {}

  // Of the step of a part, in either buffer.
  MMVSSM_DEVICE int index(int buffer, int of_part, int channel) const {
    return ((buffer * kElements + element) * kParts + of_part) * kChannels + channel;
  }

  // The last team has the step of all.
  MMVSSM_DEVICE void put(int buffer, int channel, const MapStep& step) const {
    if (threadIdx.x % 32 / 4 < 7) return;
    float4* to = reinterpret_cast<float4*>(steps + index(buffer, part, channel));
    to[0] = float4{step.decay[0], step.added[0], step.decay[1], step.added[1]};
    to[1] = float4{step.decay[2], step.added[2], step.decay[3], step.added[3]};
  }

  // The state before the chunk of this warp, in the upper half of the lanes each has
  // one of its channels. The halves go through the parts of the earlier chunks.
  MMVSSM_DEVICE float before(int buffer, int chunk) const {
    const int lane = threadIdx.x % 32, half = lane / 16;
    const int channel = set * kWarpChannels + lane % 16;
    float h = 0.0f;
    if (chunk > part && (half == 0 || kParts == 1)) 
      h = carry[(buffer * kElements + element) * kChannels + channel];
    if constexpr (kParts > 1) {
      const int first = chunk < part ? part - chunk : 0;
      const uint32_t there =
          ((1u << part) - (1u << first)) >> half * (kParts / 2);
      // In one register: not worked out for every step again.
      const int from = index(buffer, half * (kParts / 2), channel) * 8 + fresh_zero();
      float decay = 1.0f;
#pragma unroll
      for (int j = 0; j < kParts / 2; ++j) {
        const float2 step = *reinterpret_cast<const float2*>(
            smem + from + MapLayout::kSteps + j * kChannels * 8);
        if (there & 1u << j) {
          h = step.x * h + step.y;
          decay = fminf(decay * step.x, kLargest);
        }
      }
      const float lower = shuffle(h, lane % 16, 32);
      if (half == 1) h = decay * lower + h;
    }
    return h;
  }
  // Keeps the state behind the last part for the next pass.
  MMVSSM_DEVICE void pass_on(int buffer, float h) const {
    const int lane = threadIdx.x % 32;
    if (part != kParts - 1 || lane < 16) return;
    const int channel = set * kWarpChannels + lane % 16;
    const float2 step = steps[index(buffer, part, channel)];
    carry[((buffer ^ 1) * kElements + element) * kChannels + channel] =
        step.x * h + step.y;
  }
};

// The sum begins with what D adds, of all scans.
MMVSSM_DEVICE void begin_sum(const MapArgs& p, const Chain& chain, char* smem) {
  constexpr int kLanesOfPlace = kChannels / kWidth;
  const int channel = threadIdx.x % kLanesOfPlace * kWidth;
  const bool there = channel < chain.count;
  float skip[kWidth] = {};
  for (int k = 0; k < p.count; ++k)
    if (there && p.scans[k].D != nullptr)
#pragma unroll
      for (int c = 0; c < kWidth; ++c)
        skip[c] += p.scans[k].D[chain.channel + channel + c];
  const char* u = MapSource::u_of(smem)[channel / kWidth];
#pragma unroll 4
  for (int place = threadIdx.x % kMapThreads / kLanesOfPlace;
       place < p.width * p.height; place += kMapThreads / kLanesOfPlace) {
    float x[kWidth] = {};
    if (there) load_channels<U_DTYPE>(at(u, place, p.u_strides.position), x);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) x[c] *= skip[c];
    store_channels<kFloat32>(sum_at(smem, cell_of(p, place), channel), x);
  }
}

MMVSSM_DEVICE void store_sum(const MapArgs& p, int channels, char* smem) {
  constexpr int kLanesOfPlace = kChannels / kWidth;
  const int channel = threadIdx.x % kLanesOfPlace * kWidth;
  const char* out = MapSource::rows_of(smem)->out;
  if (channel >= channels || out == nullptr) return;
  out += channel * kSize<OUT_DTYPE>;
#pragma unroll 4
  for (int place = threadIdx.x % kMapThreads / kLanesOfPlace;
       place < p.width * p.height; place += kMapThreads / kLanesOfPlace) {
    float x[kWidth];
    load_channels<kFloat32>(sum_at(smem, cell_of(p, place), channel), x);
    store_channels<OUT_DTYPE>(const_cast<char*>(at(out, place, p.out_strides.position)),
                              x);
  }
}

}  // namespace mmvssm

MMVSSM_KERNEL(one_state_map, mmvssm::MapArgs, THREADS, 512 / THREADS) {
  using namespace mmvssm;
  char* smem = shared_memory();
  const Chain chain(p);
  const Parts parts(smem);
  const int team = threadIdx.x % 32 / 4;
  Own own(chain);
  own.channel = parts.set * kWarpChannels + threadIdx.x % 4 * kWidth;
  own.count = chain.count - own.channel;
  put_map_parameters(p, chain, smem);
  MapSource::put_pointers(p, chain, smem);
#pragma unroll 1
  for (int k = 0; k < p.count; ++k)
    put_dt_weight<MapLayout>(p.scans[k], chain, smem + k * MapLayout::kScanFragments);
  sync_cta("pointers");
  begin_sum(p, chain, smem);

  const WarpPlaces warp(smem);
  MapInputs inputs;
  Turn turn{0, parts.part};
  int places[2], coming_places[2];
  turn.find_places(p, places);
  warp.put_next(1, places);
  turn.next(p).find_places(p, coming_places);
  sync_cta("parameters");
  const MapSource first(p, smem, 0, own.channel);
  first.fetch_weights(p, places, inputs);
  first.fetch_some<0, kOwn>(p, warp, 1, inputs);

  const int passes = (p.count * p.chunks + kParts - 1) / kParts;
  const int channel = parts.set * kWarpChannels + threadIdx.x % kWarpChannels;
  const bool saves = threadIdx.x % 32 >= kWarpChannels && channel < chain.count;
  int buffer = 0;
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    const int scan = turn.scan < p.count ? turn.scan : p.count - 1;
    if (rarely(any_lane(places[0] < 0 || places[1] < 0))) {
      inputs.hide(places);
    }
    inputs.put_low(smem);
    if constexpr (kSets > 1) sync_cta("low rank");
    MapRecurrence recurrence;
    MapStep step = recurrence.start(smem, scan, own.channel, inputs);
    step.append_teams(team);
    const MapStep earlier = step.of_earlier(team);
    parts.put(buffer, own.channel, step);
    warp.put_next(buffer, coming_places);
    warp.put(kCells, buffer, places[0] < 0 ? -1 : cell_of(p, places[0]),
             places[1] < 0 ? -1 : cell_of(p, places[1]));
    sync_cta("exchange");

    const float state = parts.before(buffer, turn.chunk);
    parts.pass_on(buffer, state);
    char* saved = MapSource::rows_of(smem)[scan * kWidth].saved;
    if (saves && turn.chunk > 0 && turn.scan < p.count && saved != nullptr)
      *reinterpret_cast<float*>(const_cast<char*>(
          at(saved + channel * 4, turn.chunk - 1, p.group_size * 4))) = state;
    float h[kWidth];
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      h[c] = earlier.decay[c] * shuffle(state, 16 + threadIdx.x % 4 * kWidth + c, 32) +
             earlier.added[c];
    recurrence.finish(h);

    // Inputs of the next pass.
    const MapSource source(p, smem, turn.next(p).scan, own.channel);
    source.fetch_weights(p, coming_places, inputs);
    source.fetch_some<0, kEarly>(p, warp, buffer, inputs);

    // In a pass with the end of a scan and the begin of the next, those wait.
    const bool later = turn.chunk < parts.part;
    const bool mixed = later || turn.chunk - parts.part + kParts > p.chunks;
    if (kParts > 1 && later) sync_cta("scans");
    recurrence.add<0>(smem, own.channel, warp, buffer);
    if constexpr (kEarly < kOwn) source.fetch_some<0, kOwn / 2>(p, warp, buffer, inputs);
    recurrence.add<kOwn / 2>(smem, own.channel, warp, buffer);
    if constexpr (kEarly < kOwn)
      source.fetch_some<kOwn / 2, kOwn / 2>(p, warp, buffer, inputs);
    if (kParts > 1 && mixed && !later) sync_cta("scans");

    turn = turn.next(p);
    places[0] = coming_places[0], places[1] = coming_places[1];
    turn.next(p).find_places(p, coming_places);
    buffer ^= 1;
  }
  sync_cta("sum");
  store_sum(p, chain.count, smem);
}
