// ss2d_scan over (batch, strip of channels): projection of the step sizes,
// scans along the orders and merge, forward and backward.
//
// The maps stay as they are. A tile of an order row by row is read in place; one of
// any other order, whose places are far apart, is gathered while the next step
// sizes are computed, and what comes of it is added to the map.
#pragma once

#include "selective_scan.h"

namespace mmvssm {
namespace MMVSSM_ISA {

// The order that is scanned as number i: those with even numbers come first. Every
// order has every place, so the first one writes the map and the others add to it.
static inline int64_t order_number(int64_t i, int64_t orders) {
  const int64_t even = (orders + 1) / 2;
  return i < even ? 2 * i : 2 * (i - even) + 1;
}

// dt = softplus(bias + weight f) for rows of features f; `weight` is (rank, width).
template <int V>
static void project_steps(const float* const* features, int64_t rows, int64_t rank,
                          const float* weight, const float* bias, int64_t width,
                          float* dt) {
  for (int64_t t = 0; t < rows; t += 2) {
    const float* first = features[t];
    const float* second = features[t + 1 < rows ? t + 1 : t];
    vfloat a[V], b[V];
    load_vectors<V>(bias, a);
    load_vectors<V>(bias, b);
    for (int64_t r = 0; r < rank; ++r) {
      const vfloat f = broadcast(first[r]), g = broadcast(second[r]);
      for (int v = 0; v < V; ++v) {
        const vfloat w = load(weight + r * width + v * kLanes);
        a[v] += f * w;
        b[v] += g * w;
      }
    }
    for (int v = 0; v < V; ++v) {
      if (t + 1 < rows) store(dt + (t + 1) * width + v * kLanes, softplus(b[v]));
      store(dt + t * width + v * kLanes, softplus(a[v]));
    }
  }
}

// The work on one strip of one batch element, the same forward and backward.
class Ss2dStrip {
 public:
  static int64_t items(const Ss2dProblem& p) { return p.batch * strips_of(p.channels); }

  static int64_t floats(const Ss2dProblem& p, bool backward) {
    const int64_t width = kMaxVectors * kLanes;
    const int64_t padded = padded_states(p.states);
    return StripRecurrence::floats(p.states, backward) + 2 * kTile * padded +
           (3 * kTile + p.rank + 1) * width + p.rank + 2 * p.states +
           (backward ? 2 * kTile * padded + (2 * kTile + padded + 4) * width +
                           (p.rank + kLanes) * (3 * width + kTile)
                     : 0) +
           64 * 16;
  }

  Ss2dStrip(const Ss2dProblem& p, int64_t item, Arena* arena, bool backward)
      : p(p),
        index(item % strips_of(p.channels)),
        batch(item / strips_of(p.channels)),
        strip(strip_of(p.channels, index)),
        width(strip.width()),
        places(p.height * p.width),
        scan(arena, p.states, strip, backward),
        dt(arena->take(kTile * width)),
        x(arena->take(kTile * width)),
        y(arena->take(kTile * width)),
        weight(arena->take(p.rank * width)),
        bias(arena->take(width)),
        B(arena->take(kTile * scan.padded())),
        C(arena->take(kTile * scan.padded())),
        nothing(arena->take(p.rank + 2 * p.states)) {
    __builtin_memset(nothing, 0, (p.rank + 2 * p.states) * 4);
  }

  void set_order(int64_t k) {
    order = k;
    route = p.routes[k];
    table = route < 0 ? p.table + k * p.positions : nullptr;
    length = route < 0 ? p.positions : places;
    const int64_t first = k * p.channels;
    scan.set_parameters(p.A + first * p.states, p.D + first);
    read_channels(p.dt_bias + first, strip, bias);
    load_rows(p.dt_weight + (first + strip.first) * p.rank, p.rank, 1, strip.count,
              p.rank, weight, width);
  }

  // Goes to the tile from position `start` of the order on: finds its places and
  // makes dt, B and C of their projections. Meanwhile it asks for the rows of two
  // maps, since the hardware does not foresee a walk down a column.
  void go_to(int64_t start, int64_t count, const float* one, const float* other) {
    rows = count;
    const int64_t padded = scan.padded();
    find_places(start);
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t c = 0; c < width; c += 16) {
        __builtin_prefetch(row_of(one, t) + c);
        __builtin_prefetch(row_of(other, t) + c);
      }
      features[t] = p.projected + (batch * places + at[t]) * p.projected_stride +
                    order * (p.rank + 2 * p.states);
      const float* weights = features[t] + p.rank;
      for (int64_t n = 0; n < padded; ++n) {
        B[t * padded + n] = n < p.states ? weights[n] : 0.0f;
        C[t * padded + n] = n < p.states ? weights[p.states + n] : 0.0f;
      }
    }
    if (missing != 0) clear_padding();
    switch (strip.vectors) {
      case 1:
        project_steps<1>(features, rows, p.rank, weight, bias, width, dt);
        break;
      case 2:
        project_steps<2>(features, rows, p.rank, weight, bias, width, dt);
        break;
      case 3:
        project_steps<3>(features, rows, p.rank, weight, bias, width, dt);
        break;
      default:
        project_steps<4>(features, rows, p.rank, weight, bias, width, dt);
    }
  }

  // Whether the tile's rows of a map may be worked on where they are.
  bool in_place() const { return strip.full() && (route == 0 || route == 2); }

  // The tile's rows of a map (batch, height, width, channel).
  Rows read(const float* map, float* buffer) const {
    if (in_place()) return {row_of(map, 0), route == 0 ? p.channels : -p.channels};
    for (int64_t t = 0; t < rows; ++t) {
      const float* from = row_of(map, t);
      float* to = buffer + t * width;
      int64_t c = 0;
      for (; c + kLanes <= strip.count; c += kLanes) store(to + c, load(from + c));
      for (; c < width; ++c) to[c] = c < strip.count ? from[c] : 0.0f;
    }
    if (missing != 0) {
      for (int64_t t = 0; t < rows; ++t)
        if (is_padding(t)) __builtin_memset(buffer + t * width, 0, width * 4);
    }
    return {buffer, width};
  }

  // Writes the tile's rows to a map, or adds them to it; finds NaN there.
  vint write(float* map, const float* buffer, bool add) const {
    vint nan = {};
    for (int64_t t = 0; t < rows; ++t) {
      if (is_padding(t)) continue;
      float* to = const_cast<float*>(row_of(map, t));
      int64_t c = 0;
      for (; c + kLanes <= strip.count; c += kLanes) {
        vfloat sum = load(buffer + t * width + c);
        if (add) sum += load(to + c);
        nan |= sum != sum;
        store(to + c, sum);
      }
      for (; c < strip.count; ++c) {
        to[c] = add ? to[c] + buffer[t * width + c] : buffer[t * width + c];
        nan[0] |= to[c] != to[c];
      }
    }
    return nan;
  }

  Tile tile(const Rows& u) const {
    return {rows, dt, u, {B, scan.padded()}, {C, scan.padded()}};
  }

  // The saved state before a tile, null before the first.
  float* saved(int64_t tile) const {
    if (tile <= 0) return nullptr;
    const int64_t tiles = (p.positions + kTile - 1) / kTile;
    return p.saved +
           ((order * (tiles - 1) + tile - 1) * p.batch + batch) * p.states * p.channels;
  }

  const Ss2dProblem& p;
  const int64_t index, batch;
  const Strip strip;
  const int64_t width, places;
  // The order at hand: its number, route, row of the table, and positions.
  int64_t order = 0, route = 0;
  const int32_t* table = nullptr;
  int64_t length = 0;
  StripRecurrence scan;
  // Of the tile at hand: how many rows, the step sizes, buffers for rows of maps,
  // B and C, the features the step sizes are projected from, the places, and a bit
  // for each row that is padding. Those are at place 0, for what reads all rows.
  int64_t rows = 0;
  float *dt, *x, *y;
  float *weight, *bias;  // of the projection, (rank, width) and (width)
  float *B, *C;
  float* nothing;  // features of a padded place, zeros
  const float* features[kTile];
  int64_t at[kTile];
  uint64_t missing = 0;
  static_assert(kTile <= 64, "a tile has more rows than the mask has bits");

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
  // Makes the features of padded places zero, and with them B and C.
  void clear_padding() {
    const int64_t padded = scan.padded();
    for (int64_t t = 0; t < rows; ++t) {
      if (!is_padding(t)) continue;
      features[t] = nothing;
      __builtin_memset(B + t * padded, 0, padded * 4);
      __builtin_memset(C + t * padded, 0, padded * 4);
    }
  }
  const float* row_of(const float* map, int64_t t) const {
    return map + (batch * places + at[t]) * p.channels + strip.first;
  }
};

static bool forward_ss2d(const Ss2dProblem& p, int64_t item, Arena* arena) {
  Ss2dStrip s(p, item, arena, false);
  vint nan = {};
  for (int64_t i = 0; i < p.orders; ++i) {
    s.set_order(order_number(i, p.orders));
    s.scan.set_state_to_zero();
    for (int64_t start = 0; start < s.length; start += kTile) {
      const int64_t rows = s.length - start < kTile ? s.length - start : kTile;
      if (start > 0 && p.saved != nullptr)
        s.scan.get_state(s.saved(start / kTile), p.channels);
      s.go_to(start, rows, p.x, p.out);
      const Tile tile = s.tile(s.read(p.x, s.x));
      if (s.in_place()) {
        const Rows out = s.read(p.out, nullptr);
        nan |= s.scan.forward(tile, i == 0 ? Write::kStore : Write::kAdd,
                              const_cast<float*>(out.data), out.stride);
      } else {
        s.scan.forward(tile, Write::kStore, s.y, s.width);
        nan |= s.write(p.out, s.y, i > 0);
      }
    }
  }
  return any(nan);
}

// grad_f = weight^T grad_dt for each row; `by_channel` is (width, padded rank).
static void project_back(const float* grad_dt, int64_t rows, int64_t width,
                         const float* by_channel, int64_t padded_rank, float* grad_f) {
  constexpr int64_t kRows = 4;
  for (int64_t t = 0; t < rows; t += kRows) {
    for (int64_t r = 0; r < padded_rank; r += kLanes) {
      vfloat sum[kRows] = {};
      for (int64_t c = 0; c < width; ++c) {
        const vfloat w = load(by_channel + c * padded_rank + r);
        for (int64_t i = 0; i < kRows; ++i)
          sum[i] += w * broadcast(grad_dt[(t + i) * width + c]);
      }
      for (int64_t i = 0; i < kRows; ++i)
        store(grad_f + (t + i) * padded_rank + r, sum[i]);
    }
  }
}

// Gradient of the (rank, width) projection: the sum over a tile, compensated
// from tile to tile.
template <int V>
static void add_weight_gradient(const float* const* features, const float* grad_dt,
                                int64_t rows, int64_t rank, int64_t width, float* sum,
                                float* rest) {
  constexpr int64_t kRanks = 2;
  for (int64_t r = 0; r < rank; r += kRanks) {
    const int64_t next = r + 1 < rank ? r + 1 : r;
    vfloat a[V] = {}, b[V] = {};
    for (int64_t t = 0; t < rows; ++t) {
      const vfloat f = broadcast(features[t][r]), g = broadcast(features[t][next]);
      for (int v = 0; v < V; ++v) {
        const vfloat grad = load(grad_dt + t * width + v * kLanes);
        a[v] += f * grad;
        b[v] += g * grad;
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

// Buffers and sums of the backward pass over one strip.
struct Ss2dGradients {
  Ss2dGradients(const Ss2dStrip& s, Arena* arena)
      : padded_rank((s.p.rank + kLanes - 1) / kLanes * kLanes),
        before(arena->take(s.scan.padded() * s.width)),
        dt(arena->take(kTile * s.width)),
        dtu(arena->take(kTile * s.width)),
        B(arena->take(kTile * s.scan.padded())),
        C(arena->take(kTile * s.scan.padded())),
        features(arena->take(kTile * padded_rank)),
        by_channel(arena->take(s.width * padded_rank)),
        weight(arena->take(s.p.rank * s.width)),
        weight_rest(arena->take(s.p.rank * s.width)),
        D(arena, s.width),
        bias(arena, s.width) {}

  void start_order(const Ss2dStrip& s) {
    const int64_t first = s.order * s.p.channels + s.strip.first;
    load_rows(s.p.dt_weight + first * s.p.rank, 1, s.p.rank, s.p.rank, s.strip.count,
              by_channel, padded_rank);
    __builtin_memset(by_channel + s.strip.count * padded_rank, 0,
                     (s.width - s.strip.count) * padded_rank * 4);
    __builtin_memset(weight, 0, s.p.rank * s.width * 4);
    __builtin_memset(weight_rest, 0, s.p.rank * s.width * 4);
    D.set_to_zero(s.width);
    bias.set_to_zero(s.width);
  }

  void finish_order(const Ss2dStrip& s) const {
    const Ss2dProblem& p = s.p;
    const int64_t at = s.batch * p.orders + s.order;
    s.scan.get_grad_A(p.grad_A + at * p.states * p.channels, p.channels);
    write_channels(D.sum, s.strip, p.grad_D + at * p.channels);
    write_channels(bias.sum, s.strip, p.grad_dt_bias + at * p.channels);
    for (int64_t r = 0; r < p.rank; ++r)
      write_channels(weight + r * s.width, s.strip,
                     p.grad_dt_weight + (at * p.rank + r) * p.channels);
  }

  const int64_t padded_rank;
  float *before, *dt, *dtu, *B, *C, *features, *by_channel, *weight, *weight_rest;
  ChannelSum D, bias;
};

// Gradients of the projections of a tile from those of dt, B and C.
static void finish_projections(const Ss2dStrip& s, const Ss2dGradients& g) {
  const Ss2dProblem& p = s.p;
  const int64_t rows = s.rows;
  // project_back works on whole groups of rows.
  for (int64_t i = rows * s.width; i < (rows + 3) / 4 * 4 * s.width; ++i) g.dt[i] = 0;
  project_back(g.dt, rows, s.width, g.by_channel, g.padded_rank, g.features);
  const auto add = s.strip.vectors == 1   ? add_weight_gradient<1>
                   : s.strip.vectors == 2 ? add_weight_gradient<2>
                   : s.strip.vectors == 3 ? add_weight_gradient<3>
                                          : add_weight_gradient<4>;
  add(s.features, g.dt, rows, p.rank, s.width, g.weight, g.weight_rest);
  const int64_t columns = p.rank + 2 * p.states;
  const int64_t padded = s.scan.padded();
  for (int64_t t = 0; t < rows; ++t) {
    if (s.is_padding(t)) continue;
    const int64_t at = (s.index * p.batch + s.batch) * s.places + s.at[t];
    float* to = p.grad_projected + (at * p.orders + s.order) * columns;
    for (int64_t r = 0; r < p.rank; ++r) to[r] = g.features[t * g.padded_rank + r];
    to += p.rank;
    for (int64_t n = 0; n < p.states; ++n) {
      to[n] = g.B[t * padded + n];
      to[p.states + n] = g.C[t * padded + n];
    }
  }
}

// False: NaN is looked for in the forward pass.
static bool backward_ss2d(const Ss2dProblem& p, int64_t item, Arena* arena) {
  Ss2dStrip s(p, item, arena, true);
  Ss2dGradients g(s, arena);
  const int64_t padded = s.scan.padded();
  for (int64_t i = 0; i < p.orders; ++i) {
    s.set_order(order_number(i, p.orders));
    const int64_t tiles = (s.length + kTile - 1) / kTile;
    s.scan.set_state_to_zero();
    s.scan.set_gradients_to_zero();
    g.start_order(s);
    for (int64_t index = tiles - 1; index >= 0; --index) {
      const int64_t start = index * kTile;
      const int64_t rows = s.length - start < kTile ? s.length - start : kTile;
      s.go_to(start, rows, p.x, p.grad_out);
      const Tile tile = s.tile(s.read(p.x, s.x));
      s.scan.read_state(s.saved(index), s.saved(index - 1), p.channels, g.before);
      __builtin_memset(g.dt, 0, rows * s.width * 4);
      __builtin_memset(g.dtu, 0, rows * s.width * 4);
      __builtin_memset(g.B, 0, rows * padded * 4);
      __builtin_memset(g.C, 0, rows * padded * 4);
      const Rows by_y = s.read(p.grad_out, s.y);
      s.scan.backward(tile, g.before,
                      {by_y.data, by_y.stride, g.dt, g.dtu, g.B, g.C, padded}, nullptr);
      finish_tile(tile, s.width, s.scan.D(), by_y, true, g.dtu, g.dt,
                  {g.dtu, s.width, false}, {g.dt, s.width, false}, g.D, g.bias);
      finish_projections(s, g);
      s.write(p.grad_x, g.dtu, i > 0);
    }
    g.finish_order(s);
  }
  return false;
}

static int32_t ss2d_forward(const Ss2dProblem& p, ParallelFor parallel_for) {
  return run_items(p, Ss2dStrip::items(p), Ss2dStrip::floats(p, false), forward_ss2d,
                   parallel_for);
}

static int32_t ss2d_backward(const Ss2dProblem& p, ParallelFor parallel_for) {
  return run_items(p, Ss2dStrip::items(p), Ss2dStrip::floats(p, true), backward_ss2d,
                   parallel_for);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
