// ss2d_scan over (batch, channel block): from dt_low_rank to dt, the scans in all
// orders and their sum, forward and backward.
//
// Maps are not copied or reordered. If an order goes row by row, a chunk is read in
// place. If not, its places are far apart: they are gathered into a buffer, and the
// results are added to the map.
#pragma once

#include "selective_scan.h"

namespace mmvssm {
namespace MMVSSM_ISA {

// The order that is scanned as number i: those with even numbers come first. Each order
// visits all places, so the first scan writes the map and the others add to it.
static inline int64_t order_number(int64_t i, int64_t orders) {
  const int64_t even = (orders + 1) / 2;
  return i < even ? 2 * i : 2 * (i - even) + 1;
}

// dt = softplus(bias + weight x) for each row x of dt_low_rank; `weight` is (rank,
// width).
template <int V>
static void project_dt(const float* const* dt_low_rank, int64_t rows, int64_t rank,
                       const float* weight, const float* bias, int64_t width,
                       float* dt) {
  for (int64_t t = 0; t < rows; t += 2) {
    const float* first = dt_low_rank[t];
    const float* second = dt_low_rank[t + 1 < rows ? t + 1 : t];
    vfloat a[V], b[V];
    load_vectors<V>(bias, a);
    load_vectors<V>(bias, b);
    for (int64_t r = 0; r < rank; ++r) {
      const vfloat x = broadcast(first[r]), y = broadcast(second[r]);
      for (int v = 0; v < V; ++v) {
        const vfloat w = load(weight + r * width + v * kLanes);
        a[v] += x * w;
        b[v] += y * w;
      }
    }
    for (int v = 0; v < V; ++v) {
      if (t + 1 < rows) store(dt + (t + 1) * width + v * kLanes, softplus(b[v]));
      store(dt + t * width + v * kLanes, softplus(a[v]));
    }
  }
}

// One channel block of one batch element: what both passes do with it.
class Ss2dBlock {
 public:
  static int64_t items(const Ss2dArgs& p) {
    return p.batch * channel_blocks_of(p.channels);
  }

  static int64_t floats(const Ss2dArgs& p, bool backward) {
    const int64_t width = kMaxVectors * kLanes;
    const int64_t padded = padded_states(p.states);
    return ChannelBlockRecurrence::floats(p.states, backward) + 2 * kChunk * padded +
           (3 * kChunk + p.rank + 1) * width + p.rank + 2 * p.states +
           (backward ? 2 * kChunk * padded + (2 * kChunk + padded + 4) * width +
                           (p.rank + kLanes) * (3 * width + kChunk) +
                           ChannelBlockRecurrence::recomputed_floats(p.states)
                     : 0) +
           64 * 16;
  }

  Ss2dBlock(const Ss2dArgs& p, int64_t item, Arena* arena, bool backward)
      : p(p),
        index(item % channel_blocks_of(p.channels)),
        batch(item / channel_blocks_of(p.channels)),
        block(channel_block_of(p.channels, index)),
        width(block.width()),
        places(p.height * p.width),
        scan(arena, p.states, block, backward),
        dt(arena->take(kChunk * width)),
        x(arena->take(kChunk * width)),
        y(arena->take(kChunk * width)),
        weight(arena->take(p.rank * width)),
        bias(arena->take(width)),
        B(arena->take(kChunk * scan.padded())),
        C(arena->take(kChunk * scan.padded())),
        zeros(arena->take(p.rank + 2 * p.states)) {
    __builtin_memset(zeros, 0, (p.rank + 2 * p.states) * 4);
  }

  void set_order(int64_t k) {
    order = k;
    route = p.routes[k];
    table = route < 0 ? p.table + k * p.positions : nullptr;
    length = route < 0 ? p.positions : places;
    const int64_t first = k * p.channels;
    scan.set_parameters(p.A + first * p.states, p.D + first);
    read_channels(p.dt_bias + first, block, bias);
    load_rows(p.dt_weight + (first + block.first) * p.rank, p.rank, 1, block.count,
              p.rank, weight, width);
  }

  // Goes to the chunk that starts at position `start` of the order: finds its places
  // and their dt, B and C. Meanwhile it prefetches its rows of two maps, since the
  // hardware does not predict jumps down a column.
  void go_to(int64_t start, int64_t count, const float* one, const float* other) {
    rows = count;
    const int64_t padded = scan.padded();
    find_places(start);
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t c = 0; c < width; c += 16) {
        __builtin_prefetch(row_of(one, t) + c);
        __builtin_prefetch(row_of(other, t) + c);
      }
      dt_low_rank[t] = p.projected + (batch * places + at[t]) * p.projected_stride +
                       order * (p.rank + 2 * p.states);
      const float* weights = dt_low_rank[t] + p.rank;
      for (int64_t n = 0; n < padded; ++n) {
        B[t * padded + n] = n < p.states ? weights[n] : 0.0f;
        C[t * padded + n] = n < p.states ? weights[p.states + n] : 0.0f;
      }
    }
    if (missing != 0) clear_padding();
    switch (block.vectors) {
      case 1:
        project_dt<1>(dt_low_rank, rows, p.rank, weight, bias, width, dt);
        break;
      case 2:
        project_dt<2>(dt_low_rank, rows, p.rank, weight, bias, width, dt);
        break;
      case 3:
        project_dt<3>(dt_low_rank, rows, p.rank, weight, bias, width, dt);
        break;
      default:
        project_dt<4>(dt_low_rank, rows, p.rank, weight, bias, width, dt);
    }
  }

  // Whether the kernels may read and write the chunk's rows of a map in place.
  bool in_place() const { return block.full() && (route == 0 || route == 2); }

  // The chunk's rows of a map, copied to `buffer` if they must be.
  Rows read(const float* map, float* buffer) const {
    if (in_place()) return {row_of(map, 0), route == 0 ? p.channels : -p.channels};
    for (int64_t t = 0; t < rows; ++t) {
      const float* from = row_of(map, t);
      float* to = buffer + t * width;
      int64_t c = 0;
      for (; c + kLanes <= block.count; c += kLanes) store(to + c, load(from + c));
      for (; c < width; ++c) to[c] = c < block.count ? from[c] : 0.0f;
    }
    if (missing != 0) {
      for (int64_t t = 0; t < rows; ++t)
        if (is_padding(t)) __builtin_memset(buffer + t * width, 0, width * 4);
    }
    return {buffer, width};
  }

  // Writes the chunk's rows to a map or adds them to it. Returns lanes that found NaN.
  vint write(float* map, const float* buffer, bool add) const {
    vint nan = {};
    for (int64_t t = 0; t < rows; ++t) {
      if (is_padding(t)) continue;
      float* to = const_cast<float*>(row_of(map, t));
      int64_t c = 0;
      for (; c + kLanes <= block.count; c += kLanes) {
        vfloat sum = load(buffer + t * width + c);
        if (add) sum += load(to + c);
        nan |= sum != sum;
        store(to + c, sum);
      }
      for (; c < block.count; ++c) {
        to[c] = add ? to[c] + buffer[t * width + c] : buffer[t * width + c];
        nan[0] |= to[c] != to[c];
      }
    }
    return nan;
  }

  Chunk chunk(const Rows& u) const {
    return {rows, dt, u, {B, scan.padded()}, {C, scan.padded()}};
  }

  // The saved state before a chunk; null for the first.
  float* saved(int64_t chunk) const {
    if (chunk <= 0) return nullptr;
    const int64_t chunks = (p.positions + kChunk - 1) / kChunk;
    return p.saved + ((order * (chunks - 1) + chunk - 1) * p.batch + batch) * p.states *
                         p.channels;
  }

  const Ss2dArgs& p;
  const int64_t index, batch;
  const ChannelBlock block;
  const int64_t width, places;
  // The current order: its number, its route, its row of the table, its positions.
  int64_t order = 0, route = 0;
  const int32_t* table = nullptr;
  int64_t length = 0;
  ChannelBlockRecurrence scan;
  // The current chunk: its number of rows, dt, buffers for rows of maps, B and C,
  // dt_low_rank, the places, and a mask of the rows that are padding. A padded row has
  // place 0, so that code that reads all rows stays inside the map.
  int64_t rows = 0;
  float *dt, *x, *y;
  float *weight, *bias;  // from dt_low_rank to delta: (rank, width), (width)
  float *B, *C;
  float* zeros;  // dt_low_rank of a padded place
  const float* dt_low_rank[kChunk];
  int64_t at[kChunk];
  uint64_t missing = 0;
  static_assert(kChunk <= 64, "a chunk has more rows than the mask has bits");

  bool is_padding(int64_t t) const { return (missing >> t & 1) != 0; }

 private:
  void find_places(int64_t start) {
    missing = 0;
    if (table != nullptr) {
      for (int64_t t = 0; t < rows; ++t) {
        const int64_t place = table[start + t];
        missing |= (uint64_t)(place < 0) << t;
        at[t] = place < 0 ? 0 : place;
      }
      return;
    }
    const int64_t step = route < 2 ? 1 : -1;
    const int64_t first = route < 2 ? start : length - 1 - start;
    if (route % 2 == 0) {
      for (int64_t t = 0; t < rows; ++t) at[t] = first + t * step;
      return;
    }
    int64_t i = first % p.height, j = first / p.height;
    for (int64_t t = 0; t < rows; ++t) {
      at[t] = i * p.width + j;
      i += step;
      if (i == p.height || i < 0) {
        i = i < 0 ? p.height - 1 : 0;
        j += step;
      }
    }
  }
  // Sets dt_low_rank, B and C of padded places to zero.
  void clear_padding() {
    const int64_t padded = scan.padded();
    for (int64_t t = 0; t < rows; ++t) {
      if (!is_padding(t)) continue;
      dt_low_rank[t] = zeros;
      __builtin_memset(B + t * padded, 0, padded * 4);
      __builtin_memset(C + t * padded, 0, padded * 4);
    }
  }
  const float* row_of(const float* map, int64_t t) const {
    return map + (batch * places + at[t]) * p.channels + block.first;
  }
};

static bool forward_ss2d(const Ss2dArgs& p, int64_t item, Arena* arena) {
  Ss2dBlock s(p, item, arena, false);
  vint nan = {};
  for (int64_t i = 0; i < p.orders; ++i) {
    s.set_order(order_number(i, p.orders));
    s.scan.set_state_to_zero();
    for (int64_t start = 0; start < s.length; start += kChunk) {
      const int64_t rows = s.length - start < kChunk ? s.length - start : kChunk;
      if (start > 0 && p.saved != nullptr)
        s.scan.get_state(s.saved(start / kChunk), p.channels);
      s.go_to(start, rows, p.x, p.out);
      const Chunk chunk = s.chunk(s.read(p.x, s.x));
      if (s.in_place()) {
        const Rows out = s.read(p.out, nullptr);
        nan |= s.scan.forward(chunk, i == 0 ? Write::kStore : Write::kAdd,
                              const_cast<float*>(out.data), out.stride);
      } else {
        s.scan.forward(chunk, Write::kStore, s.y, s.width);
        nan |= s.write(p.out, s.y, i > 0);
      }
    }
  }
  return any(nan);
}

// The gradient of dt_low_rank from that of delta: weight^T grad_delta for each row.
// `by_channel` is the weight as (width, padded rank).
static void project_back(const float* grad_delta, int64_t rows, int64_t width,
                         const float* by_channel, int64_t padded_rank,
                         float* grad_low_rank) {
  constexpr int64_t kRows = 4;
  for (int64_t t = 0; t < rows; t += kRows) {
    for (int64_t r = 0; r < padded_rank; r += kLanes) {
      vfloat sum[kRows] = {};
      for (int64_t c = 0; c < width; ++c) {
        const vfloat w = load(by_channel + c * padded_rank + r);
        for (int64_t i = 0; i < kRows; ++i)
          sum[i] += w * broadcast(grad_delta[(t + i) * width + c]);
      }
      for (int64_t i = 0; i < kRows; ++i)
        store(grad_low_rank + (t + i) * padded_rank + r, sum[i]);
    }
  }
}

// Adds a chunk to the gradient of the projection's weight (rank, width). The sum over
// chunks is compensated.
template <int V>
static void add_weight_gradient(const float* const* dt_low_rank,
                                const float* grad_delta, int64_t rows, int64_t rank,
                                int64_t width, float* sum, float* rest) {
  constexpr int64_t kRanks = 2;
  for (int64_t r = 0; r < rank; r += kRanks) {
    const int64_t next = r + 1 < rank ? r + 1 : r;
    vfloat a[V] = {}, b[V] = {};
    for (int64_t t = 0; t < rows; ++t) {
      const vfloat x = broadcast(dt_low_rank[t][r]),
                   y = broadcast(dt_low_rank[t][next]);
      for (int v = 0; v < V; ++v) {
        const vfloat grad = load(grad_delta + t * width + v * kLanes);
        a[v] += x * grad;
        b[v] += y * grad;
      }
    }
    for (int v = 0; v < V; ++v) {
      const int64_t c = v * kLanes;
      add_compensated(sum + r * width + c, rest + r * width + c, a[v]);
      if (next > r)
        add_compensated(sum + next * width + c, rest + next * width + c, b[v]);
    }
  }
}

// Buffers and sums of the backward pass over one channel block.
struct Ss2dGradients {
  Ss2dGradients(const Ss2dBlock& s, Arena* arena)
      : padded_rank((s.p.rank + kLanes - 1) / kLanes * kLanes),
        recomputed(ChannelBlockRecurrence::take_recomputed(arena, s.p.states)),
        before(arena->take(s.scan.padded() * s.width)),
        dt(arena->take(kChunk * s.width)),
        dtu(arena->take(kChunk * s.width)),
        B(arena->take(kChunk * s.scan.padded())),
        C(arena->take(kChunk * s.scan.padded())),
        dt_low_rank(arena->take(kChunk * padded_rank)),
        by_channel(arena->take(s.width * padded_rank)),
        weight(arena->take(s.p.rank * s.width)),
        weight_rest(arena->take(s.p.rank * s.width)),
        D(arena, s.width),
        bias(arena, s.width) {}

  void start_order(const Ss2dBlock& s) {
    const int64_t first = s.order * s.p.channels + s.block.first;
    load_rows(s.p.dt_weight + first * s.p.rank, 1, s.p.rank, s.p.rank, s.block.count,
              by_channel, padded_rank);
    __builtin_memset(by_channel + s.block.count * padded_rank, 0,
                     (s.width - s.block.count) * padded_rank * 4);
    __builtin_memset(weight, 0, s.p.rank * s.width * 4);
    __builtin_memset(weight_rest, 0, s.p.rank * s.width * 4);
    D.set_to_zero(s.width);
    bias.set_to_zero(s.width);
  }

  void finish_order(const Ss2dBlock& s) const {
    const Ss2dArgs& p = s.p;
    const int64_t at = s.batch * p.orders + s.order;
    s.scan.get_grad_A(p.grad_A + at * p.states * p.channels, p.channels);
    write_channels(D.sum, s.block, p.grad_D + at * p.channels);
    write_channels(bias.sum, s.block, p.grad_dt_bias + at * p.channels);
    for (int64_t r = 0; r < p.rank; ++r)
      write_channels(weight + r * s.width, s.block,
                     p.grad_dt_weight + (at * p.rank + r) * p.channels);
  }

  const int64_t padded_rank;
  const Recomputed recomputed;
  float *before, *dt, *dtu, *B, *C, *dt_low_rank, *by_channel, *weight, *weight_rest;
  ChannelSum D, bias;
};

// Writes the gradients of `projected` at the places of a chunk, and adds the chunk to
// that of the projection's weight.
static void finish_projections(const Ss2dBlock& s, const Ss2dGradients& g) {
  const Ss2dArgs& p = s.p;
  const int64_t rows = s.rows;
  // project_back takes rows by fours.
  for (int64_t i = rows * s.width; i < (rows + 3) / 4 * 4 * s.width; ++i) g.dt[i] = 0;
  project_back(g.dt, rows, s.width, g.by_channel, g.padded_rank, g.dt_low_rank);
  const auto add = s.block.vectors == 1   ? add_weight_gradient<1>
                   : s.block.vectors == 2 ? add_weight_gradient<2>
                   : s.block.vectors == 3 ? add_weight_gradient<3>
                                          : add_weight_gradient<4>;
  add(s.dt_low_rank, g.dt, rows, p.rank, s.width, g.weight, g.weight_rest);
  const int64_t columns = p.rank + 2 * p.states;
  const int64_t padded = s.scan.padded();
  for (int64_t t = 0; t < rows; ++t) {
    if (s.is_padding(t)) continue;
    const int64_t at = (s.index * p.batch + s.batch) * s.places + s.at[t];
    float* to = p.grad_projected + (at * p.orders + s.order) * columns;
    for (int64_t r = 0; r < p.rank; ++r) to[r] = g.dt_low_rank[t * g.padded_rank + r];
    to += p.rank;
    for (int64_t n = 0; n < p.states; ++n) {
      to[n] = g.B[t * padded + n];
      to[p.states + n] = g.C[t * padded + n];
    }
  }
}

// Returns false: only the forward pass looks for NaN.
static bool backward_ss2d(const Ss2dArgs& p, int64_t item, Arena* arena) {
  Ss2dBlock s(p, item, arena, true);
  Ss2dGradients g(s, arena);
  const int64_t padded = s.scan.padded();
  for (int64_t i = 0; i < p.orders; ++i) {
    s.set_order(order_number(i, p.orders));
    const int64_t chunks = (s.length + kChunk - 1) / kChunk;
    s.scan.set_state_to_zero();
    s.scan.set_gradients_to_zero();
    g.start_order(s);
    for (int64_t index = chunks - 1; index >= 0; --index) {
      const int64_t start = index * kChunk;
      const int64_t rows = s.length - start < kChunk ? s.length - start : kChunk;
      s.go_to(start, rows, p.x, p.grad_out);
      const Chunk chunk = s.chunk(s.read(p.x, s.x));
      s.scan.read_state(s.saved(index), s.saved(index - 1), p.channels, g.before);
      __builtin_memset(g.dt, 0, rows * s.width * 4);
      __builtin_memset(g.dtu, 0, rows * s.width * 4);
      __builtin_memset(g.B, 0, rows * padded * 4);
      __builtin_memset(g.C, 0, rows * padded * 4);
      const Rows by_y = s.read(p.grad_out, s.y);
      s.scan.backward(chunk, g.before,
                      {by_y.data, by_y.stride, g.dt, g.dtu, g.B, g.C, padded},
                      g.recomputed, nullptr);
      finish_chunk(chunk, s.width, s.scan.D(), by_y, true, g.dtu, g.dt,
                   {g.dtu, s.width, false}, {g.dt, s.width, false}, g.D, g.bias);
      finish_projections(s, g);
      s.write(p.grad_x, g.dtu, i > 0);
    }
    g.finish_order(s);
  }
  return false;
}

static int32_t ss2d_forward(const Ss2dArgs& p, const Threads& threads) {
  return run_items(p, Ss2dBlock::items(p), Ss2dBlock::floats(p, false), forward_ss2d,
                   threads);
}

static int32_t ss2d_backward(const Ss2dArgs& p, const Threads& threads) {
  return run_items(p, Ss2dBlock::items(p), Ss2dBlock::floats(p, true), backward_ss2d,
                   threads);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
