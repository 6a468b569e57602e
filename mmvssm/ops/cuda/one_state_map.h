// How warps share a map in the forward pass that merges the scans of a map on chip, and
// what they have in shared memory.
//
// A warp owns 16 channels of a chunk: its lane 4 g + c has positions 8 g to 8 g + 7 of
// channels 4 c to 4 c + 3. So the matrix product that makes step sizes leaves each lane
// its own, and the states go from team to team (the lanes with the same g) by shuffles.
// Warps side by side in the channels are sets, side by side in the positions parts: the
// chunks of all scans, one scan after the other, are dealt out to the parts. Small maps
// are several in a CTA, of as many batch elements. Inputs come straight into registers, a
// pass before they are needed.
#pragma once

#include "one_state_terms.h"

namespace mmvssm {

constexpr int kChunk = 64, kWarpChannels = 16;
constexpr int kSets = kChannels / kWarpChannels, kElements = ELEMENTS;
constexpr int kParts = kPositions / kChunk / kElements;
constexpr int kMapThreads = kThreads / kElements;  // of a batch element
static_assert(kWidth == 4 && kSets * kParts * 32 == kMapThreads, "as a warp multiplies");
static_assert(kElements == 1 || kParts == 1, "what waits in a pass is one map");
static_assert(kParts == 1 || kParts % 2 == 0, "halves of a warp go through the parts");

// Of each scan `delta` is its low-rank form, with B and C right behind it in memory. The
// batch consists of groups of kElements.
struct MapArgs : Args {
  int32_t count;      // of scans
  int32_t elements;   // of the batch
  int32_t sum_bytes;  // of a batch element
  int32_t fold;       // see cell_of
};
static_assert(sizeof(MapArgs) == MAP_ARGS, "as Python has it");

struct MapLayout {
  static constexpr int kParameters = 0;  // of each scan, see MapParameter
  // Of each batch element, see MapSource.
  static constexpr int kPointersBytes = kScans * kWidth * 32 + kChannels * 8;
  static constexpr int kPointers = kParameters + kScans * 2 * kChannels * 4;
  static constexpr int kFragments = kPointers + kElements * kPointersBytes;
  static constexpr int kScanFragments =
      kWeightTerms * kRankTiles * kChannelTiles * 32 * 8;
  // What each part does to a state, two buffers, and the states before the parts.
  static constexpr int kSteps = kFragments + kScans * kScanFragments;
  static constexpr int kCarry = kSteps + 2 * kElements * kParts * kChannels * 8;
  // Of each warp, two buffers: the places of the next chunk, and cells of this one.
  static constexpr int kPlaces = kCarry + 2 * kElements * kChannels * 4;
  static constexpr int kWarpPlaces = 2 * 2 * kChunk * 4;
  // The low-rank form of a chunk of each part, where sets share it.
  static constexpr int kLow = kPlaces + kThreads / 32 * kWarpPlaces;
  static constexpr int kLowBytes =
      kSets > 1 ? kParts * kElements * kRankTiles * (kOwn / 2) * 32 * 8 *
                      kSize<DELTA_DTYPE>
                : 0;
  static constexpr int kSum = kLow + kLowBytes;  // float32

  // A row behind the rank, where the last 16 have room for one.
  static constexpr int kBiasRow =
      RANK % 16 == 0 || RANK % 16 == 15 ? -1 : RANK / 16 * 16 + (RANK % 16 > 8 ? 14 : 8);
  // Column 2 c + e of tile 2 s + j is channel 16 s + 4 c + 2 j + e.
  static MMVSSM_DEVICE int channel_of(int tile, int column) {
    return tile / 2 * kWarpChannels + column / 2 * kWidth + tile % 2 * 2 + column % 2;
  }
};
static_assert(MapLayout::kSum == MAP_SHARED && MapLayout::kSum % 128 == 0,
              "as Python has it");

enum MapParameter { kMapRate, kMapShift };

// A, and the bias in the log2 domain, of every scan.
MMVSSM_DEVICE void put_map_parameters(const MapArgs& p, const Chain& chain, char* smem) {
  float* to = reinterpret_cast<float*>(smem + MapLayout::kParameters);
#pragma unroll 1
  for (int i = threadIdx.x; i < p.count * kChannels; i += kThreads) {
    const ScanPointers& scan = p.scans[i / kChannels];
    const int c = i % kChannels, channel = chain.channel + c;
    const bool there = c < chain.count;
    to[i + i / kChannels * kChannels + kMapRate * kChannels] =
        there ? scan.A[channel] : 0.0f;
    to[i + i / kChannels * kChannels + kMapShift * kChannels] =
        there && scan.bias != nullptr ? scan.bias[channel] * kLog2E : 0.0f;
  }
}
MMVSSM_DEVICE void get_map_parameter(const char* smem, int scan, MapParameter which,
                                     int channel, float (&x)[kWidth]) {
  load_channels<kFloat32>(
      smem + MapLayout::kParameters + ((scan * 2 + which) * kChannels + channel) * 4, x);
}

// Where a place has its channels in the sum, in bytes; which of them is another part, to
// be combined by `xor`. Teams that are next to each other are 8 rows of the sum, or
// along columns 8 rows of the map, apart. That these are in different banks, is what
// the exchange of neighbouring cells is for, by bit 3 and bit `fold` of the place.
MMVSSM_DEVICE int cell_of(const MapArgs& p, int place) {
  constexpr int kHalf = kWarpChannels * 4;
  place = place * (kChannels * 4) ^ ((place >> 3 ^ place >> p.fold) & 1) * kHalf;
  return place + static_cast<int>(threadIdx.x / kMapThreads) * p.sum_bytes;
}
// The rows of the sum, with those that only the exchange needs.
MMVSSM_DEVICE char* sum_at(char* smem, int cell, int channel) {
  return smem + MapLayout::kSum + (cell ^ channel * 4);
}

// What a warp does next: a chunk of a scan. Behind the last scan there is nothing.
struct Turn {
  int scan, chunk;

  MMVSSM_DEVICE Turn next(const MapArgs& p) const {
    const int found = chunk + kParts;
    return found < p.chunks ? Turn{scan, found} : Turn{scan + 1, found - p.chunks};
  }
  // The places of two positions of each lane.
  MMVSSM_DEVICE void find_places(const MapArgs& p, int (&places)[2]) const {
    const int t = chunk * kChunk + threadIdx.x % 32 * 2;
    places[0] = places[1] = -1;
    if (scan >= p.count) return;
    const ScanPointers& own = p.scans[scan];
    if (own.order != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (t + i < p.length) places[i] = own.order[t + i];
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (t + i < p.length) places[i] = place_on_route(p, own, t + i);
    }
  }
};

// Where the inputs of the next pass are (the first place instead of none), and where
// this pass adds to the sum.
enum WhichPlaces { kNext, kCells };

// Arrays of a warp in shared memory, a number for each of the positions of a chunk.
struct WarpPlaces {
  int* base;

  MMVSSM_DEVICE explicit WarpPlaces(char* smem)
      : base(reinterpret_cast<int*>(smem + MapLayout::kPlaces +
                                    threadIdx.x / 32 * MapLayout::kWarpPlaces)) {}
  // Of the two positions that this lane looks after.
  MMVSSM_DEVICE void put(int which, int buffer, int first, int second) const {
    int* to = base + (which * 2 + buffer) * kChunk + threadIdx.x % 32 * 2;
    *reinterpret_cast<uint2*>(to) =
        uint2{static_cast<uint32_t>(first), static_cast<uint32_t>(second)};
  }
  MMVSSM_DEVICE void put_next(int buffer, const int (&places)[2]) const {
    put(kNext, buffer, places[0] < 0 ? 0 : places[0], places[1] < 0 ? 0 : places[1]);
  }
  MMVSSM_DEVICE int get_one(int which, int buffer, int i) const {
    return base[(which * 2 + buffer) * kChunk + threadIdx.x % 32 / 4 * kOwn + i];
  }
  // Of four of the own positions.
  MMVSSM_DEVICE void get(int which, int buffer, int first, int (&x)[4]) const {
    const uint4 four = *reinterpret_cast<const uint4*>(
        base + (which * 2 + buffer) * kChunk + threadIdx.x % 32 / 4 * kOwn + first);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  }
};

// Two numbers of the dtype of the low-rank form, side by side.
constexpr int kPair = kSize<DELTA_DTYPE> / 2;  // words
MMVSSM_DEVICE void load_pair(const char* from, uint32_t (&x)[kPair]) {
  if constexpr (kPair == 2 && PAIRS) {
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    x[0] = two.x, x[1] = two.y;
  } else if constexpr (kPair == 2) {
    x[0] = load_bits<DELTA_DTYPE>(from), x[1] = load_bits<DELTA_DTYPE>(from + 4);
  } else if constexpr (PAIRS) {
    x[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    x[0] = load_bits<DELTA_DTYPE>(from) | load_bits<DELTA_DTYPE>(from + 2) << 16;
  }
}

// B and C at own positions.
struct MapWeights {
  uint32_t pairs[kOwn][kPair];

  MMVSSM_DEVICE float B(int i) const {
    return to_float<DELTA_DTYPE>(kPair == 2                  ? pairs[i][0]
                                 : DELTA_DTYPE == kBfloat16 ? pairs[i][0]
                                                            : pairs[i][0] & 0xffff);
  }
  MMVSSM_DEVICE float C(int i) const {
    const uint32_t word = pairs[i][kPair - 1];
    if constexpr (kPair == 2) return float_of(word);
    return DELTA_DTYPE == kBfloat16 ? float_of(word & 0xffff0000u)
                                    : from_half(word >> 16);
  }
};

// The low-rank form of two of each lane's positions, 16 numbers of each: what
// mma_16816 takes as a. The sets of a part need the same. Each brings in that of kMine
// of the positions, and they are shared in shared memory.
constexpr int kMine = kOwn / kSets;
MMVSSM_DEVICE int first_mine() { return threadIdx.x / 32 % kSets * kMine; }

struct alignas(16) MapFragment {
  uint32_t words[4][kPair];

  // Of the warp's part: of a piece of the rank and the m-th two positions.
  static MMVSSM_DEVICE MapFragment& at(char* smem, int piece, int m) {
    const int part = threadIdx.x / 32 / kSets;
    return reinterpret_cast<MapFragment*>(
        smem + MapLayout::kLow)[((part * kRankTiles + piece) * (kOwn / 2) + m) * 32 +
                                threadIdx.x % 32];
  }
};

// Inputs of own positions as they are in memory.
struct MapInputs {
  static constexpr int kWords = kSize<U_DTYPE> * kWidth / 4;
  // Pieces of the rank, of 8 numbers: a pair for each lane of a team.
  static constexpr int kPieces = (RANK + 7) / 8;

  uint32_t u[kOwn][kWords];
  uint32_t low[kMine][kPieces][kPair];
  // B and C of the two positions whose places a lane looks up.
  uint32_t weights[2][kPair];

  MMVSSM_DEVICE void get_u(int i, float (&x)[kWidth]) const {
    if constexpr (kWords == 4) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) x[c] = float_of(u[i][c]);
    } else {
      unpack<U_DTYPE>(u[i][0], x[0], x[1]);
      unpack<U_DTYPE>(u[i][1], x[2], x[3]);
    }
  }
  MMVSSM_DEVICE void get_weights(MapWeights& x) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int k = 0; k < kPair; ++k)
        x.pairs[i][k] = bits_of(shuffle(float_of(weights[i % 2][k]), i / 2, kWidth));
  }

  // Positions without a place: all is zero. Each lane has the places of two.
  MMVSSM_DEVICE void hide(const int (&places)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int k = 0; k < kPair; ++k)
        if (places[i] < 0) weights[i][k] = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int k = 0; k < kWords; ++k)
        if (is_hidden(places, i)) u[i][k] = 0;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (!is_hidden(places, first_mine() + i)) continue;
#pragma unroll
      for (int j = 0; j < kPieces; ++j)
#pragma unroll
        for (int k = 0; k < kPair; ++k) low[i][j][k] = 0;
    }
  }
  static MMVSSM_DEVICE bool is_hidden(const int (&places)[2], int i) {
    const int own = i % 2 == 0 ? places[0] : places[1];
    const float place = shuffle(float_of(static_cast<uint32_t>(own)), i / 2, kWidth);
    return static_cast<int>(bits_of(place)) < 0;
  }

  // Hands the low-rank form to the other sets.
  MMVSSM_DEVICE void put_low(char* smem) const {
    if constexpr (kSets > 1)
#pragma unroll
      for (int t = 0; t < kRankTiles; ++t)
#pragma unroll
        for (int m = 0; m < kMine / 2; ++m) {
          MapFragment fragment;
          get_low(t, m, fragment);
          MapFragment::at(smem, t, first_mine() / 2 + m) = fragment;
        }
  }
  MMVSSM_DEVICE void get_low(int t, int m, MapFragment& fragment) const {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int word = 0; word < kPair; ++word)
        fragment.words[k][word] = 2 * t + k / 2 < kPieces
                                      ? low[2 * m + k % 2][2 * t + k / 2][word]
                                      : 0;
  }
};
// Own positions whose next inputs are asked for before this pass has ended, as far as
// there are registers for them.
constexpr int kEarly =
    kOwn * MapInputs::kWords + kMine * MapInputs::kPieces * kPair <= 24 ? kOwn : 0;

// Where the lanes of a team read their inputs. The pointers are in shared memory: in
// registers there is no room for them, and the compiler would work them out again.
struct MapSource {
  // A lane's part of the low-rank form of a scan, its pair of the first piece; B and C.
  // Where the rank ends before a pair of a lane, that reads another one, which its
  // weights, zeros, make vanish.
  struct alignas(16) Rows {
    const char *first, *weights;
    // Of the CTA's channels, null where there is nothing to be stored.
    char* saved;  // the states before chunk 1
    char* out;
  };
  const char* u;  // own channels
  Rows low;       // of the scan that is read next

  static MMVSSM_DEVICE char* pointers_of(char* smem) {
    return smem + MapLayout::kPointers +
           threadIdx.x / kMapThreads * MapLayout::kPointersBytes;
  }
  // Of the batch element of this thread: of each scan and lane of a team.
  static MMVSSM_DEVICE Rows* rows_of(char* smem) {
    return reinterpret_cast<Rows*>(pointers_of(smem));
  }
  // Of each channel of a lane's first.
  static MMVSSM_DEVICE const char** u_of(char* smem) {
    return reinterpret_cast<const char**>(pointers_of(smem) + kScans * kWidth * 32);
  }

  static MMVSSM_DEVICE void put_pointers(const MapArgs& p, const Chain& chain,
                                         char* smem) {
    const int thread = threadIdx.x % kMapThreads;
    int64_t element = chain.batch * kElements + threadIdx.x / kMapThreads;
    const bool there = element < p.elements;
    if (!there) element = p.elements - 1;
    if (thread < kScans * kWidth) {
      const int scan = thread / kWidth, column = thread % kWidth * 2;
      const int first = column < RANK ? column : 0;
      const ScanPointers& own = p.scans[scan < p.count ? scan : 0];
      const char* row = own.delta + element * p.delta_strides.batch;
      const int64_t state = element * (p.chunks - 1) * p.group_size + chain.channel;
      char* saved = reinterpret_cast<char*>(own.saved + state);
      char* out = own.out + element * p.out_strides.batch +
                  chain.channel * p.out_strides.channel;
      rows_of(smem)[thread] = {row + first * kSize<DELTA_DTYPE>,
                               row + RANK * kSize<DELTA_DTYPE>,
                               there && own.saved != nullptr ? saved : nullptr,
                               there ? out : nullptr};
    }
    if (thread < kChannels / kWidth) {
      // Channels that are not there read those of others, and are never stored.
      int channel = thread * kWidth;
      channel = chain.channel + (channel < chain.count ? channel : 0);
      u_of(smem)[thread] =
          p.u + element * p.u_strides.batch + channel * p.u_strides.channel;
    }
  }
  MMVSSM_DEVICE MapSource(const MapArgs& p, char* smem, int scan, int channel) {
    scan = scan < p.count ? scan : p.count - 1;
    const Rows& rows = rows_of(smem)[scan * kWidth + threadIdx.x % kWidth];
    low.first = rows.first, low.weights = rows.weights;
    u = u_of(smem)[channel / kWidth];
  }

  MMVSSM_DEVICE void fetch_u(const Args& p, int i, int place, MapInputs& inputs) const {
    const char* row = at(u, place, p.u_strides.position);
    if constexpr (MapInputs::kWords == 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(row);
      inputs.u[i][0] = four.x, inputs.u[i][1] = four.y;
      inputs.u[i][2] = four.z, inputs.u[i][3] = four.w;
    } else {
      const uint2 two = *reinterpret_cast<const uint2*>(row);
      inputs.u[i][0] = two.x, inputs.u[i][1] = two.y;
    }
  }
  MMVSSM_DEVICE void fetch_low(const Args& p, int i, int place, MapInputs& inputs) const {
    constexpr int kPiece = 8 * kSize<DELTA_DTYPE>, kLast = MapInputs::kPieces - 1;
    const char* row = at(low.first, place, static_cast<int>(p.delta_strides.position));
#pragma unroll
    for (int j = 0; j < kLast; ++j) load_pair(row + j * kPiece, inputs.low[i][j]);
    const bool there = threadIdx.x % kWidth * 2 + kLast * 8 < RANK;
    load_pair(row + (there ? kLast * kPiece : 0), inputs.low[i][kLast]);
  }
  MMVSSM_DEVICE void fetch_weights(const Args& p, const int (&places)[2],
                                   MapInputs& inputs) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      load_pair(at(low.weights, places[i] < 0 ? 0 : places[i],
                   static_cast<int>(p.delta_strides.position)),
                inputs.weights[i]);
  }
  // Of a number of own positions, beginning with the first one.
  template <int kFirst, int kCount>
  MMVSSM_DEVICE void fetch_some(const Args& p, const WarpPlaces& warp, int buffer,
                                MapInputs& inputs) const {
    int places[4];
#pragma unroll
    for (int i = kFirst; i < kFirst + kCount; ++i) {
      if (i % 4 == 0) warp.get(kNext, buffer, i, places);
      fetch_u(p, i, places[i % 4], inputs);
      if constexpr (kSets == 1) fetch_low(p, i, places[i % 4], inputs);
    }
    if constexpr (kSets > 1 && kFirst == 0 && kCount > 0)
#pragma unroll
      for (int i = 0; i < kMine; ++i)
        fetch_low(p, i, warp.get_one(kNext, buffer, first_mine() + i), inputs);
  }
};

}  // namespace mmvssm
