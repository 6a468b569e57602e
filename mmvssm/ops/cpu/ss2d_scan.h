// ss2d_scan over (batch, strip of channels): projection of the step sizes,
// scan along the four routes and merge, forward and backward.
//
// A strip is read along rows where it lies. For the two column routes it is
// transposed once, since a walk down the columns of a wide map meets the same
// few sets of the cache again and again.
#pragma once

#include "selective_scan.h"

namespace mmvssm {
namespace MMVSSM_ISA {

constexpr int64_t kRoutes = 4;

// The positions of one strip of a map in the order of rows or of columns.
struct Line {
  float* data;
  int64_t stride;
};

// dt = softplus(bias + weight f) for rows of features f; `weight` is (rank, width).
template <int V>
static void project_steps(const float* const* features, int64_t rows, int64_t rank,
                          const float* weight, const float* bias, int64_t width,
                          float* dt, const Rows& x, const Rows& y) {
  for (int64_t t = 0; t < rows; t += 2) {
    for (int i = 0; i < 2; ++i)
    for (int v = 0; v < V * kLanes; v += 16) {
      __builtin_prefetch(x.data + (t + i) * x.stride + v);
      __builtin_prefetch(y.data + (t + i) * y.stride + v);
    }
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
  static int64_t items(const Ss2dProblem& p) {
    return p.batch * strips_of(p.channels);
  }

  static int64_t floats(const Ss2dProblem& p, bool backward) {
    const int64_t width = kMaxVectors * kLanes;
    const int64_t padded = padded_states(p.states);
    const int64_t lines = backward ? 6 : 4;
    return StripRecurrence::floats(p.states, backward) +
           lines * p.height * p.width * width + 2 * kTile * padded +
           (kTile + p.rank + 1) * width +
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
        length(p.height * p.width),
        scan(arena, p.states, strip, backward),
        dt(arena->take(kTile * width)),
        weight(arena->take(p.rank * width)),
        bias(arena->take(width)),
        B(arena->take(kTile * scan.padded())),
        C(arena->take(kTile * scan.padded())) {}

  // The strip of a map (batch, height, width, channel) by rows and by columns.
  // Where the strip does not fill its vectors the rows are copied, too.
  void open(const float* map, Arena* arena, Line* lines) const {
    allocate(const_cast<float*>(map), arena, lines);
    const float* from = map + batch * length * p.channels + strip.first;
    if (!strip.full()) {
      load_rows(from, 1, p.channels, strip.count, length, lines[0].data, width);
    }
    transpose_positions(lines[0], p.height, p.width, [this, lines](
        const float* row, int64_t column_position) {
      float* to = lines[1].data + column_position * width;
      for (int64_t c = 0; c < width; c += kLanes) store(to + c, load(row + c));
    });
  }

  // The same for a map that is to be written.
  void allocate(float* map, Arena* arena, Line* lines) const {
    lines[0] = strip.full()
                   ? Line{map + batch * length * p.channels + strip.first, p.channels}
                   : Line{arena->take(length * width), width};
    lines[1] = {arena->take(length * width), width};
  }

  // Writes the sum of both lines to the map.
  bool merge(float* map, const Line* lines) const {
    vint nan = {};
    transpose_positions(lines[0], p.height, p.width, [&](
        float* row, int64_t column_position) {
      const float* from = lines[1].data + column_position * width;
      for (int64_t c = 0; c < width; c += kLanes) {
        const vfloat sum = load(row + c) + load(from + c);
        nan |= sum != sum;
        store(row + c, sum);
      }
    });
    if (!strip.full())
      store_rows(map + batch * length * p.channels + strip.first, 1, p.channels,
                 strip.count, length, lines[0].data, width);
    return any(nan);
  }

  void set_route(int64_t k) {
    route = k;
    const int64_t first = k * p.channels;
    scan.set_parameters(p.A + first * p.states, p.D + first);
    read_channels(p.dt_bias + first, strip, bias);
    load_rows(p.dt_weight + (first + strip.first) * p.rank, p.rank, 1, strip.count,
              p.rank, weight, width);
  }

  // The rows of a tile that starts at step `start` of the route.
  Rows rows_of(const Line* lines, int64_t start) const {
    const Line& line = lines[route % 2];
    if (route < 2) return {line.data + start * line.stride, line.stride};
    return {line.data + (length - 1 - start) * line.stride, -line.stride};
  }

  // Reads the projections of a tile and makes dt, B and C of them.
  Tile read_tile(const Line* x, const Line* y, int64_t start, int64_t rows) {
    const int64_t padded = scan.padded();
    for (int64_t t = 0; t < rows; ++t) {
      positions[t] = position_of(start + t);
      features[t] = p.projected +
                    (batch * length + positions[t]) * p.projected_stride +
                    route * (p.rank + 2 * p.states);
      const float* weights = features[t] + p.rank;
      for (int64_t n = 0; n < padded; ++n) {
        B[t * padded + n] = n < p.states ? weights[n] : 0.0f;
        C[t * padded + n] = n < p.states ? weights[p.states + n] : 0.0f;
      }
    }
    switch (strip.vectors) {
      case 1: project_steps<1>(features, rows, p.rank, weight, bias, width, dt, rows_of(x, start), rows_of(y, start)); break;
      case 2: project_steps<2>(features, rows, p.rank, weight, bias, width, dt, rows_of(x, start), rows_of(y, start)); break;
      case 3: project_steps<3>(features, rows, p.rank, weight, bias, width, dt, rows_of(x, start), rows_of(y, start)); break;
      default: project_steps<4>(features, rows, p.rank, weight, bias, width, dt, rows_of(x, start), rows_of(y, start));
    }
    return {rows, dt, rows_of(x, start), {B, padded}, {C, padded}};
  }

  // The saved state before a tile other than the first.
  float* saved(int64_t tile) const {
    const int64_t tiles = (length + kTile - 1) / kTile;
    return p.saved + ((route * (tiles - 1) + tile - 1) * p.batch + batch) *
                         p.states * p.channels;
  }

  const Ss2dProblem& p;
  const int64_t index, batch;
  const Strip strip;
  const int64_t width, length;
  int64_t route = 0;
  StripRecurrence scan;
  float *dt, *weight, *bias, *B, *C;  // of the tile at hand; (rank, width) weight
  const float* features[kTile];
  int64_t positions[kTile];  // in the image

 private:
  int64_t position_of(int64_t step) const {
    const int64_t at = route < 2 ? step : length - 1 - step;
    return route % 2 ? at % p.height * p.width + at / p.height : at;
  }

  // Calls function(row position's data, its place in the order of columns) for
  // all positions, some rows at once for longer runs in both orders.
  template <class Function>
  static void transpose_positions(const Line& rows, int64_t height, int64_t width,
                                  Function function) {
    constexpr int64_t kRows = 4;
    for (int64_t top = 0; top < height; top += kRows) {
      const int64_t bottom = top + kRows < height ? top + kRows : height;
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = top; i < bottom; ++i)
          function(rows.data + (i * width + j) * rows.stride, j * height + i);
    }
  }
};

static bool forward_ss2d(const Ss2dProblem& p, int64_t item, Arena* arena) {
  Ss2dStrip s(p, item, arena, false);
  Line x[2], y[2];
  s.open(p.x, arena, x);
  s.allocate(p.out, arena, y);
  for (int64_t route = 0; route < kRoutes; ++route) {
    s.set_route(route);
    s.scan.set_state_to_zero();
    for (int64_t start = 0; start < s.length; start += kTile) {
      const int64_t rows = s.length - start < kTile ? s.length - start : kTile;
      if (start > 0) s.scan.get_state(s.saved(start / kTile), p.channels);
      const Tile tile = s.read_tile(x, y, start, rows);
      const Rows out = s.rows_of(y, start);
      s.scan.forward(tile, route < 2 ? Write::kStore : Write::kAdd,
                     const_cast<float*>(out.data), out.stride);
    }
  }
  return s.merge(p.out, y);
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
                                int64_t rows, int64_t rank, int64_t width,
                                float* sum, float* rest) {
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

  void start_route(const Ss2dStrip& s) {
    const int64_t first = s.route * s.p.channels + s.strip.first;
    load_rows(s.p.dt_weight + first * s.p.rank, 1, s.p.rank, s.p.rank, s.strip.count,
              by_channel, padded_rank);
    __builtin_memset(by_channel + s.strip.count * padded_rank, 0,
                     (s.width - s.strip.count) * padded_rank * 4);
    __builtin_memset(weight, 0, s.p.rank * s.width * 4);
    __builtin_memset(weight_rest, 0, s.p.rank * s.width * 4);
    D.set_to_zero(s.width);
    bias.set_to_zero(s.width);
  }

  void finish_route(const Ss2dStrip& s) const {
    const Ss2dProblem& p = s.p;
    const int64_t at = s.batch * kRoutes + s.route;
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
static void finish_projections(const Ss2dStrip& s, const Ss2dGradients& g,
                               int64_t rows) {
  const Ss2dProblem& p = s.p;
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
    const int64_t at = (s.index * p.batch + s.batch) * s.length + s.positions[t];
    float* to = p.grad_projected + (at * kRoutes + s.route) * columns;
    for (int64_t r = 0; r < p.rank; ++r) to[r] = g.features[t * g.padded_rank + r];
    to += p.rank;
    for (int64_t n = 0; n < p.states; ++n) {
      to[n] = g.B[t * padded + n];
      to[p.states + n] = g.C[t * padded + n];
    }
  }
}

static void backward_ss2d(const Ss2dProblem& p, int64_t item, Arena* arena) {
  Ss2dStrip s(p, item, arena, true);
  Ss2dGradients g(s, arena);
  const int64_t padded = s.scan.padded();
  Line x[2], grad_y[2], grad_x[2];
  s.open(p.x, arena, x);
  s.open(p.grad_out, arena, grad_y);
  s.allocate(p.grad_x, arena, grad_x);
  const int64_t tiles = (s.length + kTile - 1) / kTile;
  for (int64_t route = 0; route < kRoutes; ++route) {
    s.set_route(route);
    s.scan.set_state_to_zero();
    s.scan.set_gradients_to_zero();
    g.start_route(s);
    for (int64_t index = tiles - 1; index >= 0; --index) {
      const int64_t start = index * kTile;
      const int64_t rows = s.length - start < kTile ? s.length - start : kTile;
      const Tile tile = s.read_tile(x, grad_y, start, rows);
      for (int64_t n = 0; n < padded; ++n)
        read_channels(index > 0 && n < p.states ? s.saved(index) + n * p.channels
                                                : nullptr,
                      s.strip, g.before + n * s.width);
      __builtin_memset(g.dt, 0, rows * s.width * 4);
      __builtin_memset(g.dtu, 0, rows * s.width * 4);
      __builtin_memset(g.B, 0, rows * padded * 4);
      __builtin_memset(g.C, 0, rows * padded * 4);
      const Rows by_y = s.rows_of(grad_y, start);
      s.scan.backward(tile, g.before,
                      {by_y.data, by_y.stride, g.dt, g.dtu, g.B, g.C, padded},
                      nullptr);
      finish_tile(tile, s.width, s.scan.D(), by_y, true, g.dtu, g.dt,
                  {g.dtu, s.width, false}, {g.dt, s.width, false}, g.D, g.bias);
      finish_projections(s, g, rows);
      const Rows to = s.rows_of(grad_x, start);
      for (int64_t t = 0; t < rows; ++t) {
        float* row = const_cast<float*>(to.data) + t * to.stride;
        for (int64_t c = 0; c < s.width; c += kLanes) {
          const vfloat grad = load(g.dtu + t * s.width + c);
          store(row + c, route < 2 ? grad : grad + load(row + c));
        }
      }
    }
    g.finish_route(s);
  }
  s.merge(p.grad_x, grad_x);
}

struct Ss2dTask {
  const Ss2dProblem& p;
  bool backward;
  int32_t status;
};

static void run_ss2d(int64_t begin, int64_t end, void* context) {
  Ss2dTask* task = (Ss2dTask*)context;
  for (int64_t item = begin; item < end; ++item) {
    Arena arena(Ss2dStrip::floats(task->p, task->backward));
    if (arena.failed()) {
      __atomic_store_n(&task->status, (int32_t)kOutOfMemory, __ATOMIC_RELAXED);
      return;
    }
    if (task->backward) {
      backward_ss2d(task->p, item, &arena);
    } else if (forward_ss2d(task->p, item, &arena)) {
      int32_t none = kDone;
      __atomic_compare_exchange_n(&task->status, &none, (int32_t)kFoundNaN, false,
                                  __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    }
  }
}

static int32_t ss2d_forward(const Ss2dProblem& p, ParallelFor parallel_for) {
  Ss2dTask task = {p, false, kDone};
  parallel_for(0, Ss2dStrip::items(p), 1, run_ss2d, &task);
  return task.status;
}

static int32_t ss2d_backward(const Ss2dProblem& p, ParallelFor parallel_for) {
  Ss2dTask task = {p, true, kDone};
  parallel_for(0, Ss2dStrip::items(p), 1, run_ss2d, &task);
  return task.status;
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
